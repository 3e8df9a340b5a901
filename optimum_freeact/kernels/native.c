/* Quantized linears on CPUs: what kernels/reference.py specifies, in float32, from packed weights.
 *
 * A row of the input is rounded to codes, on one grid or on one for every `group` columns. Products run in panels of LANES
 * rows of the weight: their words are transposed, so that a lane holds one row; four nibbles times four codes add up in a
 * lane, exactly; scales follow in floating point, per group or once. A panel's words are transposed once for all rows of
 * the input. Built without -ffinite-math-only: NaN goes through.
 *
 * Codes of 32 columns lie together, the even ones before the odd ones, as the nibbles of 16 bytes of a weight have them.
 */

#include <math.h>
#include <stdlib.h>
#include "native_vectors.h"

#define GROUP 32    /* columns whose codes lie together; grids of a group are multiples of it */
#define CHUNK 512   /* columns of a panel that are transposed at a time */
#define TOKENS 8    /* rows of the input whose sums stay in registers */
#define KEPT 4194304 /* bytes of scratch that a thread keeps for its next call */

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

/* Constants of one input, reference.InputTables; absent parts are NULL. `left` is transposed. `group` columns share a
 * grid: a multiple of GROUP, or all. */
typedef struct {
    const uint16_t *mean;
    const float *channel;
    const int8_t *basis;
    const float *basis_scale, *left, *right, *clip;
    long a, b, n_means, n_clips, rank, width, group;
    int bits, symmetric;
} Side;

/* What one linear stores, reference.Weight; absent parts are NULL. `low_rank` is transposed; `group_scale` lies in panels:
 * (panels, groups of GROUP columns, LANES). */
typedef struct {
    const uint8_t *packed, *group_scale;
    const float *qscale;
    const int32_t *row_sum;
    const int8_t *low_rank;
    const float *low_rank_scale, *bias;
    long m, half, rank, n_bias;
} Weight;

/* Rounded rows: codes (n, padded d), the grids of each (n, grids) and the sums of their codes, the branch (n, width). */
typedef struct {
    int8_t *codes;
    float *scale, *offset, *total, *branch;
    long n, stride, grids;
} Rows;

static long padded(long d) { return (d + GROUP - 1) / GROUP * GROUP; }

/* Grid and codes of `size` values; `q` takes them in their natural order. */
static void round_values(
    const float *restrict u, long size, float ratio, int bits, int symmetric, int8_t *restrict q, float *scale_out,
    float *offset_out, float *total_out) {
    const float qmin = -(float)(1 << (bits - 1)), qmax = (float)((1 << (bits - 1)) - 1);
    float low = u[0], high = u[0], bad = 0.0f;
    for (long i = 0; i < size; i++) {
        low = u[i] < low ? u[i] : low;
        high = u[i] > high ? u[i] : high;
        bad += u[i] * 0.0f; /* NaN from NaN and infinity */
    }
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
    int32_t total = 0;
    if (bad == 0.0f) {
        for (long i = 0; i < size; i++) {
            float code = rintf((u[i] - offset) / scale);
            code = code < qmin ? qmin : code;
            code = code > qmax ? qmax : code;
            q[i] = (int8_t)(int32_t)code;
            total += (int32_t)code;
        }
    } else {
        memset(q, 0, size);
        scale = offset = NAN;
    }
    *scale_out = scale, *offset_out = offset, *total_out = (float)total;
}

/* Round one row; `u` is scratch for 3 d floats. */
static void round_row(const Side *side, const void *x, int x_bf16, long kind, const Rows *rows, long row, float *restrict u) {
    const long d = side->a * side->b, rank = side->rank;
    float *restrict t = u + d;
    int8_t *natural = (int8_t *)(u + 2 * d);
    if (x_bf16) {
        const uint16_t *from = (const uint16_t *)x + row * d;
        for (long i = 0; i < d; i++) u[i] = bf16_to_float(from[i]);
    } else {
        memcpy(u, (const float *)x + row * d, d * sizeof(float));
    }
    if (side->mean) {
        const uint16_t *m = side->mean + (kind < side->n_means ? kind : side->n_means - 1) * d;
        for (long i = 0; i < d; i++) u[i] -= bf16_to_float(m[i]);
    }
    if (side->channel)
        for (long i = 0; i < d; i++) u[i] *= side->channel[i];
    if (rank) {
        float *p = rows->branch + row * side->width;
        for (long r = 0; r < side->width; r++) p[r] = 0.0f;
        for (long r = 0; r < rank; r++) {
            const int8_t *v = side->basis + r * d;
            float sum = 0.0f;
            for (long i = 0; i < d; i++) sum += u[i] * (float)v[i];
            p[r] = sum * side->basis_scale[r];
        }
        long r = 0;
        for (; r + 4 <= rank; r += 4) {
            const int8_t *v = side->basis + r * d;
            const float p0 = p[r] * side->basis_scale[r], p1 = p[r + 1] * side->basis_scale[r + 1];
            const float p2 = p[r + 2] * side->basis_scale[r + 2], p3 = p[r + 3] * side->basis_scale[r + 3];
            for (long i = 0; i < d; i++)
                u[i] -= p0 * (float)v[i] + p1 * (float)v[d + i] + p2 * (float)v[2 * d + i] + p3 * (float)v[3 * d + i];
        }
        for (; r < rank; r++) {
            const int8_t *v = side->basis + r * d;
            const float share = p[r] * side->basis_scale[r];
            for (long i = 0; i < d; i++) u[i] -= share * (float)v[i];
        }
    }
    product(u, side->right, t, side->a, side->b, side->b);
    product(side->left, t, u, side->a, side->a, side->b);
    const float ratio = side->clip[kind < side->n_clips ? kind : side->n_clips - 1];
    const long grids = rows->grids;
    float *scale = rows->scale + row * grids, *offset = rows->offset + row * grids, *total = rows->total + row * grids;
    int bad = 0;
    for (long g = 0; g < grids; g++) {
        const long from = g * side->group, size = d - from < side->group ? d - from : side->group;
        round_values(u + from, size, ratio, side->bits, side->symmetric, natural + from, scale + g, offset + g, total + g);
        bad |= isnan(scale[g]);
    }
    if (bad) /* what is not finite is in every coordinate after a rotation: the whole row is lost */
        for (long g = 0; g < grids; g++) scale[g] = offset[g] = NAN;
    int8_t *restrict q = rows->codes + row * rows->stride;
    for (long i = d; i < rows->stride; i++) natural[i] = 0;
    for (long from = 0; from < rows->stride; from += GROUP)
        for (long j = 0; j < GROUP / 2; j++) {
            q[from + j] = natural[from + 2 * j];
            q[from + GROUP / 2 + j] = natural[from + 2 * j + 1];
        }
}

/* What follows a panel's sums in a row of the output: value[i] for its `count` outputs from `first` on. */
INLINE void finish(const Weight *weight, const float *p, long kind, float *value, long first, long count) {
    for (long r = 0; r < weight->rank; r++) {
        const float share = p[r] * weight->low_rank_scale[r];
        const int8_t *factor = weight->low_rank + r * weight->m + first;
        if (count == LANES)
            for (long i = 0; i < LANES; i++) value[i] += share * (float)factor[i];
        else
            for (long i = 0; i < count; i++) value[i] += share * (float)factor[i];
    }
    if (weight->n_bias) {
        const float *added = weight->bias + (kind < weight->n_bias ? kind : weight->n_bias - 1) * weight->m + first;
        for (long i = 0; i < count; i++) value[i] += added[i];
    }
}

/* Sums of `tokens` rows (a constant) with the `words` words of a chunk at `panel`. With `grouped` (a constant) each GROUP
 * columns are scaled at once: codes as scale * (sum of nibbles * code) + offset * (sum of nibbles) + constant, times the
 * weight's own scale of the group. Without, integers are added up. */
INLINE void chunk_sums(
    const Ints *panel, long words, const float *group_scale, const float *nibbles, const int8_t *codes, long stride,
    const float *grids, long grid_stride, void *sums, int tokens, int grouped) {
    Floats reals[TOKENS];
    Ints wholes[TOKENS];
    for (int t = 0; t < tokens; t++) {
        if (grouped)
            reals[t] = load_floats((float *)sums + t * LANES);
        else
            wholes[t] = load_ints((int32_t *)sums + t * LANES);
    }
    for (long word = 0, group = 0; word < words; word += 4, group++) {
        Ints now[TOKENS];
        for (int t = 0; t < tokens; t++) now[t] = grouped ? zeros() : wholes[t];
        for (int q = 0; q < 4; q++) {
            const Ints both = panel[word + q], even = low_nibbles(both), odd = high_nibbles(both);
            for (int t = 0; t < tokens; t++) {
                const int8_t *x = codes + t * stride + group * GROUP + 4 * q;
                now[t] = dots(dots(now[t], even, every_int(x)), odd, every_int(x + GROUP / 2));
            }
        }
        if (grouped) {
            const Floats scale = load_floats(group_scale + group * LANES), total = load_floats(nibbles + group * LANES);
            for (int t = 0; t < tokens; t++) {
                const float *grid = grids + t * grid_stride + 3 * group;
                const Floats shift = multiply_add(total, every_float(grid[1]), every_float(grid[2]));
                reals[t] = multiply_add(scale, multiply_add(to_floats(now[t]), every_float(grid[0]), shift), reals[t]);
            }
        } else {
            for (int t = 0; t < tokens; t++) wholes[t] = now[t];
        }
    }
    for (int t = 0; t < tokens; t++) {
        if (grouped)
            store_floats((float *)sums + t * LANES, reals[t]);
        else
            store_ints((int32_t *)sums + t * LANES, wholes[t]);
    }
}

/* One panel's outputs for all rows. `grids` holds (n, groups, 3): scale, offset, constant; NULL where rows and weight have
 * one grid each. `sums` is scratch (n, LANES). */
static void panel(
    const Weight *weight, const Rows *rows, const float *grids, long groups, const int64_t *types, long width, void *y,
    int y_bf16, long index, float *sums) {
    const long first = index * LANES, n = rows->n, half = weight->half;
    const long count = weight->m - first < LANES ? weight->m - first : LANES, words = rows->stride / 8;
    const uint8_t *starts[LANES];
    for (long i = 0; i < LANES; i++) starts[i] = weight->packed + (first + (i < count ? i : count - 1)) * half;
    const int more = first + 2 * LANES <= weight->m;
    memset(sums, 0, n * LANES * sizeof(float));
    for (long from = 0; from < words; from += CHUNK / 8) {
        const long now = words - from < CHUNK / 8 ? words - from : CHUNK / 8;
        Ints block[CHUNK / 8];
        float group_scale[CHUNK / GROUP * LANES], nibbles[CHUNK / GROUP * LANES];
        for (long word = 0; word < now; word += WORDS) {
            const long at = 4 * (from + word);
            if (at + 4 * WORDS <= half) {
                if (more)
                    for (long i = 0; i < LANES; i++) __builtin_prefetch(starts[i] + LANES * half + at, 0, 3);
                transpose(starts, at, block + word);
            } else { /* the last words of a row: what lies beyond it counts as zero */
                uint8_t tail[LANES][4 * WORDS];
                const uint8_t *tails[LANES];
                for (long i = 0; i < LANES; i++) {
                    memset(tail[i], 0, sizeof(tail[i]));
                    if (half > at) memcpy(tail[i], starts[i] + at, half - at);
                    tails[i] = tail[i];
                }
                transpose(tails, 0, block + word);
            }
        }
        if (grids) {
            const int8_t one[4] = {1, 1, 1, 1};
            for (long g = 0; g < now / 4; g++) {
                Ints total = zeros();
                for (int q = 0; q < 4; q++) {
                    const Ints both = block[4 * g + q], ones = every_int(one);
                    total = dots(dots(total, low_nibbles(both), ones), high_nibbles(both), ones);
                }
                store_floats(nibbles + g * LANES, to_floats(total));
                const uint8_t *scales = weight->group_scale;
                store_floats(
                    group_scale + g * LANES,
                    scales ? bytes_to_floats(scales + ((index * groups + from / 4 + g) * LANES)) : every_float(1.0f));
            }
        }
        long token = 0;
        const int8_t *codes = rows->codes + 8 * from;
        const float *grid = grids ? grids + 3 * (from / 4) : NULL;
#define RUN(count, grouped)                                                                                               \
    chunk_sums(                                                                                                           \
        block, now, group_scale, nibbles, codes + token * rows->stride, rows->stride, grid + token * 3 * groups,          \
        3 * groups, sums + token * LANES, count, grouped)
        if (grids) {
            for (; token + TOKENS <= n; token += TOKENS) RUN(TOKENS, 1);
            for (; token + 2 <= n; token += 2) RUN(2, 1);
            for (; token < n; token++) RUN(1, 1);
        } else {
            for (; token + TOKENS <= n; token += TOKENS) RUN(TOKENS, 0);
            for (; token + 2 <= n; token += 2) RUN(2, 0);
            for (; token < n; token++) RUN(1, 0);
        }
#undef RUN
    }
    for (long row = 0; row < n; row++) {
        const long kind = types ? types[row] : 0;
        float value[LANES];
        if (grids) {
            for (long i = 0; i < count; i++) value[i] = sums[row * LANES + i] * weight->qscale[first + i];
        } else {
            const int32_t *wholes = (const int32_t *)sums + row * LANES, shift = 8 * (int32_t)rows->total[row];
            const float scale = rows->scale[row], offset = rows->offset[row];
            for (long i = 0; i < count; i++)
                value[i] = ((float)(wholes[i] - shift) * scale + offset * (float)weight->row_sum[first + i]) *
                           weight->qscale[first + i];
        }
        finish(weight, rows->branch + row * width, kind, value, first, count);
        if (y_bf16)
            for (long i = 0; i < count; i++) ((uint16_t *)y)[row * weight->m + first + i] = float_to_bf16(value[i]);
        else
            memcpy((float *)y + row * weight->m + first, value, count * sizeof(float));
    }
}

/* Scale, offset and constant of every GROUP columns of every row, where a product needs them: (n, groups, 3). */
static void spread_grids(const Rows *rows, long d, long group, float *grids) {
    const long groups = rows->stride / GROUP;
    for (long row = 0; row < rows->n; row++)
        for (long g = 0; g < groups; g++) {
            const long at = row * rows->grids + g * GROUP / group;
            const long real = d - g * GROUP < GROUP ? d - g * GROUP : GROUP;
            const float scale = rows->scale[at], offset = rows->offset[at];
            int32_t total = 0;
            const int8_t *q = rows->codes + row * rows->stride + g * GROUP;
            for (long i = 0; i < GROUP; i++) total += q[i];
            float *out = grids + 3 * (row * groups + g);
            out[0] = scale, out[1] = offset, out[2] = -8.0f * ((float)total * scale + (float)real * offset);
        }
}

static _Thread_local char *kept = NULL;
static _Thread_local size_t kept_bytes = 0;

static void *scratch(size_t bytes) {
    if (bytes > kept_bytes) {
        free(kept);
        kept = malloc(bytes);
        kept_bytes = kept ? bytes : 0;
    }
    return kept;
}

/* All linears that read one input, from its n rows `x` (float32 or bfloat16) to their outputs `ys[i]` (n, m_i).
 * Returns 0, or 1 where memory is short. */
int freeact_linears(
    const Side *side, const Weight *const *weights, void *const *ys, long count, const void *x, int x_bf16,
    const int64_t *types, int y_bf16, long n, int threads) {
    const long d = side->a * side->b, stride = padded(d), grids = (d + side->group - 1) / side->group;
    const long groups = stride / GROUP;
    int grouped = grids > 1, failed = 0;
    for (long i = 0; i < count; i++) grouped |= weights[i]->group_scale != NULL;
    const size_t floats = (size_t)n * (3 * grids + side->width + (grouped ? 3 * groups : 0));
    float *base = scratch(floats * sizeof(float) + (size_t)n * stride + 64);
    if (!base) return 1;
    Rows rows = {.n = n, .stride = stride, .grids = grids};
    rows.scale = base, rows.offset = base + n * grids, rows.total = base + 2 * n * grids, rows.branch = base + 3 * n * grids;
    float *spread = grouped ? rows.branch + n * side->width : NULL;
    rows.codes = (int8_t *)(base + floats);
    long starts[9] = {0};
    for (long i = 0; i < count; i++) starts[i + 1] = starts[i] + (weights[i]->m + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *u = malloc((3 * d + GROUP) * sizeof(float)), *sums = malloc(n * LANES * sizeof(float) + 1);
        failed |= !u || !sums;
#pragma omp for schedule(static)
        for (long row = 0; row < n; row++)
            if (u) round_row(side, x, x_bf16, types ? types[row] : 0, &rows, row, u);
        if (grouped) {
#pragma omp single
            spread_grids(&rows, d, side->group, spread);
        }
#pragma omp for schedule(static)
        for (long at = 0; at < starts[count]; at++) {
            long i = 0;
            while (at >= starts[i + 1]) i++;
            if (sums)
                panel(weights[i], &rows, spread, groups, types, side->width, ys[i], y_bf16, at - starts[i], sums);
        }
        free(u);
        free(sums);
    }
    if (kept_bytes > KEPT) {
        free(kept);
        kept = NULL, kept_bytes = 0;
    }
    return failed;
}

/* The rounding alone, as reference.round_rows gives it: codes (n, d), even columns before odd ones; stats (3, n, grids). */
int freeact_round_rows(
    const Side *side, const void *x, int x_bf16, const int64_t *types, int8_t *codes, float *stats, float *branch, long n,
    int threads) {
    const long d = side->a * side->b, stride = padded(d), grids = (d + side->group - 1) / side->group, half = d / 2;
    Rows rows = {.n = n, .stride = stride, .grids = grids, .branch = branch};
    rows.scale = stats, rows.offset = stats + n * grids, rows.total = stats + 2 * n * grids;
    rows.codes = malloc(n * stride + 1);
    int failed = !rows.codes;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1) reduction(| : failed)
    {
        float *u = malloc((3 * d + GROUP) * sizeof(float));
        failed |= !u;
#pragma omp for
        for (long row = 0; row < n; row++) {
            if (!u) continue;
            round_row(side, x, x_bf16, types ? types[row] : 0, &rows, row, u);
            for (long i = 0; i < half; i++) {
                const int8_t *q = rows.codes + row * stride + i / 16 * GROUP + i % 16;
                codes[row * d + i] = q[0];
                codes[row * d + half + i] = q[GROUP / 2];
            }
        }
        free(u);
    }
    free(rows.codes);
    return failed;
}

/* The product alone, of rows as `freeact_round_rows` gives them, `group` columns a grid; y (n, m). */
int freeact_w4_linear(
    const Weight *weight, const int8_t *codes, const float *stats, const float *branch, const int64_t *types, void *y,
    int y_bf16, long n, long width, long group, int threads) {
    const long half = weight->half, d = 2 * half, stride = padded(d), grids = (d + group - 1) / group;
    const long groups = stride / GROUP;
    const int grouped = grids > 1 || weight->group_scale != NULL;
    Rows rows = {.n = n, .stride = stride, .grids = grids};
    rows.scale = (float *)stats, rows.offset = rows.scale + n * grids, rows.total = rows.scale + 2 * n * grids;
    rows.branch = (float *)branch;
    rows.codes = calloc(n * stride + 1, 1);
    float *spread = grouped ? malloc(n * groups * 3 * sizeof(float) + 1) : NULL;
    int failed = !rows.codes || (grouped && !spread);
    if (!failed) {
        for (long row = 0; row < n; row++)
            for (long i = 0; i < half; i++) {
                int8_t *q = rows.codes + row * stride + i / 16 * GROUP + i % 16;
                q[0] = codes[row * d + i];
                q[GROUP / 2] = codes[row * d + half + i];
            }
        if (grouped) spread_grids(&rows, d, group, spread);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *sums = malloc(n * LANES * sizeof(float) + 1);
            failed |= !sums;
#pragma omp for schedule(static)
            for (long at = 0; at < (weight->m + LANES - 1) / LANES; at++)
                if (sums) panel(weight, &rows, spread, groups, types, width, y, y_bf16, at, sums);
            free(sums);
        }
    }
    free(rows.codes);
    free(spread);
    return failed;
}

/* Rows of a weight that a panel holds, and how its bytes are multiplied. */
long freeact_lanes(void) { return LANES; }
const char *freeact_kind(void) { return KIND; }
