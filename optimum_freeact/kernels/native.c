/* The two kernels in C, for CPUs: what kernels/reference.py specifies, in float32, from packed weights.
 *
 * Plain loops that compilers vectorise, but for the product of bytes, which has AVX2 intrinsics: unsigned nibbles times
 * signed codes add up in pairs to 16 bits, and those are widened before they can overflow. Built without
 * -ffinite-math-only: NaN goes through.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

static inline float bf16_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* out[rows, m] = in[rows, k] * right[k, m], row-major */
static void product(const float *restrict in, const float *restrict right, float *restrict out, long rows, long k, long m) {
    for (long i = 0; i < rows; i++) {
        float *restrict o = out + i * m;
        const float *restrict u = in + i * k;
        for (long j = 0; j < m; j++) o[j] = 0.0f;
        long c = 0;
        for (; c + 4 <= k; c += 4) {
            const float *restrict r = right + c * m;
            const float u0 = u[c], u1 = u[c + 1], u2 = u[c + 2], u3 = u[c + 3];
            for (long j = 0; j < m; j++) o[j] += u0 * r[j] + u1 * r[m + j] + u2 * r[2 * m + j] + u3 * r[3 * m + j];
        }
        for (; c < k; c++)
            for (long j = 0; j < m; j++) o[j] += u[c] * right[c * m + j];
    }
}

/* x (n, d) float32 or bfloat16; left is transposed; codes (n, d): even columns, then odd ones; stats (3, n).
 * Returns 0, or 1 where memory is short. */
int freeact_round_rows(
    const void *x, int x_bf16, const int64_t *types, const uint16_t *mean, const float *channel, const int8_t *basis,
    const float *basis_scale, const float *left, const float *right, const float *clip, int8_t *codes, float *stats,
    float *branch, long n, long a, long b, long n_means, long n_clips, long rank, long width, int bits, int symmetric,
    int threads) {
    const long d = a * b, half = d / 2;
    const float qmin = -(float)(1 << (bits - 1)), qmax = (float)((1 << (bits - 1)) - 1);
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > 1) reduction(| : failed)
    for (long row = 0; row < n; row++) {
        float *u = malloc(2 * d * sizeof(float));
        if (!u) {
            failed |= 1;
            continue;
        }
        float *t = u + d;
        const long kind = types ? types[row] : 0;
        if (x_bf16) {
            const uint16_t *from = (const uint16_t *)x + row * d;
            for (long i = 0; i < d; i++) u[i] = bf16_to_float(from[i]);
        } else {
            memcpy(u, (const float *)x + row * d, d * sizeof(float));
        }
        if (mean) {
            const uint16_t *m = mean + (kind < n_means ? kind : n_means - 1) * d;
            for (long i = 0; i < d; i++) u[i] -= bf16_to_float(m[i]);
        }
        if (channel)
            for (long i = 0; i < d; i++) u[i] *= channel[i];
        if (rank) {
            float *p = branch + row * width;
            for (long r = 0; r < width; r++) {
                float sum = 0.0f;
                if (r < rank) {
                    const int8_t *v = basis + r * d;
                    for (long i = 0; i < d; i++) sum += u[i] * (float)v[i];
                    sum *= basis_scale[r];
                }
                p[r] = sum;
            }
            for (long r = 0; r < rank; r++) {
                const float share = p[r] * basis_scale[r];
                const int8_t *v = basis + r * d;
                for (long i = 0; i < d; i++) u[i] -= share * (float)v[i];
            }
        }
        product(u, right, t, a, b, b);
        product(left, t, u, a, a, b);
        float low = u[0], high = u[0], bad = 0.0f;
        for (long i = 0; i < d; i++) {
            low = u[i] < low ? u[i] : low;
            high = u[i] > high ? u[i] : high;
            bad += u[i] * 0.0f; /* NaN from NaN and infinity */
        }
        const float ratio = clip[kind < n_clips ? kind : n_clips - 1];
        float scale, offset;
        if (symmetric) {
            const float peak = fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high);
            scale = peak * ratio / (qmax + 0.5f);
            if (scale == 0.0f) scale = 1.0f;
            offset = 0.0f;
        } else {
            const float middle = high / 2 + low / 2, reach = (high / 2 - low / 2) * ratio;
            scale = reach / ((qmax - qmin) / 2);
            if (scale == 0.0f) scale = 1.0f;
            offset = middle - reach - (reach > 0 ? scale * qmin : 0.0f);
        }
        int8_t *q = codes + row * d;
        int32_t total = 0;
        if (bad == 0.0f) {
            for (long i = 0; i < half; i++) {
                float even = rintf((u[2 * i] - offset) / scale), odd = rintf((u[2 * i + 1] - offset) / scale);
                even = even < qmin ? qmin : even > qmax ? qmax : even;
                odd = odd < qmin ? qmin : odd > qmax ? qmax : odd;
                q[i] = (int8_t)even;
                q[half + i] = (int8_t)odd;
                total += (int32_t)even + (int32_t)odd;
            }
        } else {
            memset(q, 0, d);
            scale = offset = NAN;
        }
        stats[row] = scale;
        stats[n + row] = offset;
        stats[2 * n + row] = (float)total;
        free(u);
    }
    return failed;
}

#define TOKENS 4

/* Sums of (code + 8) of `w` times codes of up to four rows; `steps` 32-byte steps keep 16-bit sums from overflowing. */
static inline void dots(const uint8_t *w, const int8_t *const x[TOKENS], int tokens, long half, int steps, int32_t sums[TOKENS]) {
    long k = 0;
    for (int t = 0; t < tokens; t++) sums[t] = 0;
#if defined(__AVX2__)
    const __m256i nibble = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
    __m256i wide[TOKENS];
    for (int t = 0; t < tokens; t++) wide[t] = _mm256_setzero_si256();
    while (k + 32 <= half) {
        __m256i narrow[TOKENS];
        for (int t = 0; t < tokens; t++) narrow[t] = _mm256_setzero_si256();
        const long left = (half - k) / 32, now = left < steps ? left : steps;
        for (long s = 0; s < now; s++, k += 32) {
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + k));
            const __m256i low = _mm256_and_si256(bytes, nibble);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
            for (int t = 0; t < tokens; t++) {
                const __m256i even = _mm256_loadu_si256((const __m256i *)(x[t] + k));
                const __m256i odd = _mm256_loadu_si256((const __m256i *)(x[t] + half + k));
                const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
                narrow[t] = _mm256_add_epi16(narrow[t], both);
            }
        }
        for (int t = 0; t < tokens; t++) wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(narrow[t], ones));
    }
    for (int t = 0; t < tokens; t++) {
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(wide[t]), _mm256_extracti128_si256(wide[t], 1));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
        sums[t] = _mm_cvtsi128_si32(sum);
    }
#else
    (void)steps;
#endif
    for (; k < half; k++)
        for (int t = 0; t < tokens; t++) sums[t] += (w[k] & 15) * (int32_t)x[t][k] + (w[k] >> 4) * (int32_t)x[t][half + k];
}

/* y (n, m) float32 or bfloat16. */
void freeact_w4_linear(
    const int8_t *codes, const float *stats, const float *branch, const int64_t *types, const uint8_t *packed,
    const float *qscale, const int32_t *row_sum, const int8_t *low_rank, const float *low_rank_scale, const float *bias,
    void *y, int y_bf16, long n, long m, long half, long rank, long width, long n_bias, int bits, int threads) {
    const int steps = bits == 4 ? 64 : 4; /* 64 * 2 * 2 * 15 * 8 and 4 * 2 * 2 * 15 * 128 stay below 2^15 */
    const long block = 64, blocks = (m + block - 1) / block;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long at = 0; at < blocks; at++) {
        const long last = (at + 1) * block < m ? (at + 1) * block : m;
        for (long first = 0; first < n; first += TOKENS) {
            const int tokens = n - first < TOKENS ? (int)(n - first) : TOKENS;
            const int8_t *x[TOKENS];
            float p[TOKENS][64];
            for (int t = 0; t < tokens; t++) {
                x[t] = codes + (first + t) * 2 * half;
                for (long r = 0; r < rank; r++) p[t][r] = branch[(first + t) * width + r] * low_rank_scale[r];
            }
            for (long o = at * block; o < last; o++) {
                int32_t sums[TOKENS];
                const uint8_t *w = packed + o * half;
                if (tokens == TOKENS)
                    dots(w, x, TOKENS, half, steps, sums);
                else if (tokens == 1)
                    dots(w, x, 1, half, steps, sums);
                else
                    dots(w, x, tokens, half, steps, sums);
                for (int t = 0; t < tokens; t++) {
                    const long row = first + t;
                    const float product = (float)(sums[t] - 8 * (int32_t)stats[2 * n + row]);
                    float value = (product * stats[row] + stats[n + row] * (float)row_sum[o]) * qscale[o];
                    if (rank) {
                        const int8_t *v = low_rank + o * rank;
                        float sum = 0.0f;
                        for (long r = 0; r < rank; r++) sum += p[t][r] * (float)v[r];
                        value += sum;
                    }
                    if (n_bias) {
                        const long kind = types ? types[row] : 0;
                        value += bias[(kind < n_bias ? kind : n_bias - 1) * m + o];
                    }
                    if (y_bf16)
                        ((uint16_t *)y)[row * m + o] = float_to_bf16(value);
                    else
                        ((float *)y)[row * m + o] = value;
                }
            }
        }
    }
}
