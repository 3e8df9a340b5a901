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

/* Constants of one input, reference.InputTables; absent parts are NULL. `left` is transposed. */
typedef struct {
    const uint16_t *mean;
    const float *channel;
    const int8_t *basis;
    const float *basis_scale, *left, *right, *clip;
    long a, b, n_means, n_clips, rank, width;
    int bits, symmetric;
} Side;

/* x (n, d) float32 or bfloat16; codes (n, d): even columns, then odd ones; stats (3, n).
 * Returns 0, or 1 where memory is short. */
int freeact_round_rows(
    const Side *side, const void *x, int x_bf16, const int64_t *types, int8_t *codes, float *stats, float *branch, long n,
    int threads) {
    const uint16_t *mean = side->mean;
    const float *channel = side->channel, *left = side->left, *right = side->right, *clip = side->clip;
    const float *basis_scale = side->basis_scale;
    const int8_t *basis = side->basis;
    const long a = side->a, b = side->b, n_means = side->n_means, n_clips = side->n_clips;
    const long rank = side->rank, width = side->width;
    const int bits = side->bits, symmetric = side->symmetric;
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
#define BLOCK 64

/* Sums of (code + 8) times codes, for `outs` rows of weights from `w` on and `tokens` rows of codes from `x` on; both are
 * constants where this is called, so that the sums stay in registers. `steps` 32-byte steps cannot overflow 16 bits. */
static inline __attribute__((always_inline)) void dots(
    const uint8_t *w, const int8_t *x, int outs, int tokens, long half, int steps, int32_t *sums, long stride) {
    long k = 0;
    int32_t total[4][TOKENS] = {{0}};
#if defined(__AVX2__)
    const __m256i nibble = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
    const long ahead = (outs * half) * (half < 600 ? 2 : 1);
    __m256i wide[4][TOKENS];
    for (int o = 0; o < outs; o++)
        for (int t = 0; t < tokens; t++) wide[o][t] = _mm256_setzero_si256();
    while (k + 32 <= half) {
        __m256i narrow[4][TOKENS];
        for (int o = 0; o < outs; o++)
            for (int t = 0; t < tokens; t++) narrow[o][t] = _mm256_setzero_si256();
        const long left = (half - k) / 32, now = left < steps ? left : steps;
        for (long s = 0; s < now; s++, k += 32) {
            __m256i low[4], high[4];
            if (tokens == 1) { /* rows follow each other in memory: fetch those that come next */
                _mm_prefetch((const char *)(w + ahead + outs * k), _MM_HINT_T0);
                _mm_prefetch((const char *)(w + ahead + outs * k + 64), _MM_HINT_T0);
            }
            for (int o = 0; o < outs; o++) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + o * half + k));
                low[o] = _mm256_and_si256(bytes, nibble);
                high[o] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
            }
            for (int t = 0; t < tokens; t++) {
                const __m256i even = _mm256_loadu_si256((const __m256i *)(x + t * 2 * half + k));
                const __m256i odd = _mm256_loadu_si256((const __m256i *)(x + t * 2 * half + half + k));
                for (int o = 0; o < outs; o++) {
                    const __m256i both =
                        _mm256_add_epi16(_mm256_maddubs_epi16(low[o], even), _mm256_maddubs_epi16(high[o], odd));
                    narrow[o][t] = _mm256_add_epi16(narrow[o][t], both);
                }
            }
        }
        for (int o = 0; o < outs; o++)
            for (int t = 0; t < tokens; t++)
                wide[o][t] = _mm256_add_epi32(wide[o][t], _mm256_madd_epi16(narrow[o][t], ones));
    }
    for (int o = 0; o < outs; o++)
        for (int t = 0; t < tokens; t++) {
            __m128i sum =
                _mm_add_epi32(_mm256_castsi256_si128(wide[o][t]), _mm256_extracti128_si256(wide[o][t], 1));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
            total[o][t] = _mm_cvtsi128_si32(sum);
        }
#else
    (void)steps;
#endif
    for (; k < half; k++)
        for (int o = 0; o < outs; o++)
            for (int t = 0; t < tokens; t++)
                total[o][t] += (w[o * half + k] & 15) * (int32_t)x[t * 2 * half + k] +
                               (w[o * half + k] >> 4) * (int32_t)x[t * 2 * half + half + k];
    for (int o = 0; o < outs; o++)
        for (int t = 0; t < tokens; t++) sums[t * stride + o] = total[o][t];
}

/* What one linear stores, reference.Weight; absent parts are NULL. `low_rank` is transposed. */
typedef struct {
    const uint8_t *packed;
    const float *qscale;
    const int32_t *row_sum;
    const int8_t *low_rank;
    const float *low_rank_scale, *bias;
    long m, half, rank, n_bias;
} Weight;

/* y (n, m) float32 or bfloat16; `width` columns of the branch, `bits` of the codes. */
void freeact_w4_linear(
    const Weight *weight, const int8_t *codes, const float *stats, const float *branch, const int64_t *types, void *y,
    int y_bf16, long n, long width, int bits, int threads) {
    const uint8_t *packed = weight->packed;
    const float *qscale = weight->qscale, *low_rank_scale = weight->low_rank_scale, *bias = weight->bias;
    const int32_t *row_sum = weight->row_sum;
    const int8_t *low_rank = weight->low_rank;
    const long m = weight->m, half = weight->half, rank = weight->rank, n_bias = weight->n_bias;
    const int steps = bits == 4 ? 64 : 4; /* 64 * 2 * 2 * 15 * 8 and 4 * 2 * 2 * 15 * 128 stay below 2^15 */
    const long blocks = (m + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long at = 0; at < blocks; at++) {
        const long from = at * BLOCK, count = m - from < BLOCK ? m - from : BLOCK;
        for (long first = 0; first < n; first += TOKENS) {
            const int tokens = n - first < TOKENS ? (int)(n - first) : TOKENS;
            const int8_t *x = codes + first * 2 * half;
            int32_t sums[TOKENS * BLOCK];
            long o = 0;
            if (tokens == TOKENS)
                for (; o + 2 <= count; o += 2)
                    dots(packed + (from + o) * half, x, 2, TOKENS, half, steps, sums + o, BLOCK);
            else
                for (int t = 0; t < tokens; t++)
                    for (o = 0; o + 4 <= count; o += 4)
                        dots(packed + (from + o) * half, x + t * 2 * half, 4, 1, half, steps, sums + t * BLOCK + o, BLOCK);
            for (; o < count; o++)
                for (int t = 0; t < tokens; t++)
                    dots(packed + (from + o) * half, x + t * 2 * half, 1, 1, half, steps, sums + t * BLOCK + o, BLOCK);
            for (int t = 0; t < tokens; t++) {
                const long row = first + t, kind = types ? types[row] : 0;
                const float scale = stats[row], offset = stats[n + row];
                const int32_t shift = 8 * (int32_t)stats[2 * n + row];
                float value[BLOCK];
                for (long i = 0; i < count; i++)
                    value[i] = ((float)(sums[t * BLOCK + i] - shift) * scale + offset * (float)row_sum[from + i]) * qscale[from + i];
                for (long r = 0; r < rank; r++) {
                    const float p = branch[row * width + r] * low_rank_scale[r];
                    const int8_t *factor = low_rank + r * m + from;
                    for (long i = 0; i < count; i++) value[i] += p * (float)factor[i];
                }
                if (n_bias) {
                    const float *added = bias + (kind < n_bias ? kind : n_bias - 1) * m + from;
                    for (long i = 0; i < count; i++) value[i] += added[i];
                }
                if (y_bf16)
                    for (long i = 0; i < count; i++) ((uint16_t *)y)[row * m + from + i] = float_to_bf16(value[i]);
                else
                    memcpy((float *)y + row * m + from, value, count * sizeof(float));
            }
        }
    }
}
