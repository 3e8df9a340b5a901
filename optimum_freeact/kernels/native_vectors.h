/* A vector of 32-bit lanes, one row of a weight in each, and the product of four unsigned by four signed bytes in a lane.
 *
 * AVX-512 with VNNI: sixteen lanes; AVX2: eight, with AVX-VNNI where the CPU has it; elsewhere eight in plain C.
 */

#ifndef FREEACT_NATIVE_VECTORS_H
#define FREEACT_NATIVE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define LANES 16
#define KIND "AVX-512 VNNI"
typedef __m512i Ints;
typedef __m512 Floats;
INLINE Ints zeros(void) { return _mm512_setzero_si512(); }
INLINE Ints load_ints(const void *p) { return _mm512_loadu_si512(p); }
INLINE void store_ints(void *p, Ints v) { _mm512_storeu_si512(p, v); }
INLINE Ints every_int(const void *p) {
    int32_t value;
    memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
}
INLINE Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi32(v, 4)); }
INLINE Ints dots(Ints sums, Ints bytes, Ints codes) { return _mm512_dpbusd_epi32(sums, bytes, codes); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Floats no_floats(void) { return _mm512_setzero_ps(); }
INLINE Floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats every_float(float v) { return _mm512_set1_ps(v); }
INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats signed_to_floats(const int8_t *p) {
    return to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats most(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Ints to_ints(Floats v) { return _mm512_cvtps_epi32(v); } /* half to even */
INLINE void store_bytes(int8_t *p, Ints v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(v)); }
/* Sixteen rows of sixteen words, `rows[i]` where row i begins -> word k of all rows in out[k] */
INLINE void transpose(const uint8_t *const *rows, long at, Ints *out) {
    Ints r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        out[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        out[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        out[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
typedef __m256i Ints;
typedef __m256 Floats;
INLINE Ints zeros(void) { return _mm256_setzero_si256(); }
INLINE Ints load_ints(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void store_ints(void *p, Ints v) { _mm256_storeu_si256((__m256i *)p, v); }
INLINE Ints every_int(const void *p) {
    int32_t value;
    memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
}
INLINE Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
INLINE Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi32(v, 4)); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
#if defined(__AVXVNNI__)
#define KIND "AVX-VNNI"
INLINE Ints dots(Ints sums, Ints bytes, Ints codes) { return _mm256_dpbusd_avx_epi32(sums, bytes, codes); }
#else
#define KIND "AVX2"
INLINE Ints dots(Ints sums, Ints bytes, Ints codes) { /* 2 * 15 * 128 fits into 16 bits */
    return add_ints(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, codes), _mm256_set1_epi16(1)));
}
#endif
INLINE Floats no_floats(void) { return _mm256_setzero_ps(); }
INLINE Floats load_floats(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store_floats(float *p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats every_float(float v) { return _mm256_set1_ps(v); }
INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats signed_to_floats(const int8_t *p) {
    return to_floats(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
INLINE Floats most(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Ints to_ints(Floats v) { return _mm256_cvtps_epi32(v); }
INLINE void store_bytes(int8_t *p, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}
INLINE void transpose(const uint8_t *const *rows, long at, Ints *out) {
    Ints r[8], t[8];
    for (int i = 0; i < 8; i++) r[i] = load_ints(rows[i] + at);
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        out[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
}

#else
#define LANES 8
#define KIND "plain C"
typedef struct {
    int32_t v[LANES];
} Ints;
typedef struct {
    float v[LANES];
} Floats;
#define EACH for (int i = 0; i < LANES; i++)
INLINE Ints zeros(void) {
    Ints r = {{0}};
    return r;
}
INLINE Ints load_ints(const void *p) {
    Ints r;
    memcpy(&r, p, sizeof(r));
    return r;
}
INLINE void store_ints(void *p, Ints v) { memcpy(p, &v, sizeof(v)); }
INLINE Ints every_int(const void *p) {
    Ints r;
    EACH memcpy(&r.v[i], p, 4);
    return r;
}
INLINE Ints low_nibbles(Ints a) {
    EACH a.v[i] &= 0x0f0f0f0f;
    return a;
}
INLINE Ints high_nibbles(Ints a) {
    EACH a.v[i] = (int32_t)(((uint32_t)a.v[i] >> 4) & 0x0f0f0f0f);
    return a;
}
INLINE Ints add_ints(Ints a, Ints b) {
    EACH a.v[i] += b.v[i];
    return a;
}
INLINE Ints dots(Ints sums, Ints bytes, Ints codes) {
    uint8_t w[4 * LANES];
    int8_t x[4 * LANES];
    memcpy(w, &bytes, sizeof(w));
    memcpy(x, &codes, sizeof(x));
    EACH for (int k = 0; k < 4; k++) sums.v[i] += w[4 * i + k] * x[4 * i + k];
    return sums;
}
INLINE Floats every_float(float value) {
    Floats r;
    EACH r.v[i] = value;
    return r;
}
INLINE Floats no_floats(void) { return every_float(0.0f); }
INLINE Floats load_floats(const float *p) {
    Floats r;
    memcpy(&r, p, sizeof(r));
    return r;
}
INLINE void store_floats(float *p, Floats v) { memcpy(p, &v, sizeof(v)); }
INLINE Floats to_floats(Ints v) {
    Floats r;
    EACH r.v[i] = (float)v.v[i];
    return r;
}
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}
INLINE Floats signed_to_floats(const int8_t *p) {
    Floats r;
    EACH r.v[i] = p[i];
    return r;
}
INLINE Floats least(Floats a, Floats b) {
    EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
INLINE Floats most(Floats a, Floats b) {
    EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}
INLINE Floats add(Floats a, Floats b) {
    EACH a.v[i] += b.v[i];
    return a;
}
INLINE Floats subtract(Floats a, Floats b) {
    EACH a.v[i] -= b.v[i];
    return a;
}
INLINE Floats multiply(Floats a, Floats b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
INLINE Floats divide(Floats a, Floats b) {
    EACH a.v[i] /= b.v[i];
    return a;
}
INLINE Ints to_ints(Floats v) {
    Ints r;
    EACH r.v[i] = (int32_t)rintf(v.v[i]);
    return r;
}
INLINE void store_bytes(int8_t *p, Ints v) { EACH p[i] = (int8_t)v.v[i]; }
INLINE void transpose(const uint8_t *const *rows, long at, Ints *out) {
    for (int k = 0; k < LANES; k++) EACH memcpy(&out[k].v[i], rows[i] + at + 4 * k, 4);
}
#endif

#define WORDS LANES /* 32-bit words of a row that one transposition takes: as many as rows */

INLINE Ints every_whole(int32_t value) { return every_int(&value); }

INLINE float sum_floats(Floats v) {
    float lanes[LANES], sum = 0.0f;
    store_floats(lanes, v);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

/* 32 bytes, the even ones before the odd ones */
INLINE void split_bytes(const int8_t *restrict from, int8_t *restrict to) {
#if defined(__AVX2__)
    const __m256i order = _mm256_setr_epi8(
        0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i halves = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)from), order);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(halves, 0xd8));
#else
    for (int j = 0; j < 16; j++) to[j] = from[2 * j], to[16 + j] = from[2 * j + 1];
#endif
}

INLINE float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

INLINE uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t nan = (uint16_t)((bits >> 16) | 0x40); /* NaN stays NaN */
    const uint16_t near = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? nan : near;
}

/* A vector as bfloat16, half to even; NaN stays NaN */
INLINE void store_bf16(uint16_t *to, Floats v) {
#if LANES == 16
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __m512i found = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), near, nan);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(found));
#else
    float lanes[LANES];
    store_floats(lanes, v);
    for (int i = 0; i < LANES; i++) to[i] = float_to_bf16(lanes[i]);
#endif
}

#endif
