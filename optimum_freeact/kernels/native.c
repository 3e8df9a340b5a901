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

#define GROUP 32    /* columns whose codes lie together, and that share a scale of the weight where it has several */
#define CHUNK 512   /* columns of a panel that are transposed at a time */
#define TOKENS 8    /* rows of the input whose sums stay in registers */
#define KEPT 4194304 /* bytes of scratch that a thread keeps for its next call */

/* `rows` (a constant) rows of in[., k] * right[k, stride], `vectors` (a constant) vectors of columns */
INLINE void tile(const float *in, const float *right, float *out, long k, long stride, int rows, int vectors) {
    Floats sums[8][2];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) sums[i][v] = no_floats();
    for (long c = 0; c < k; c++)
        for (int v = 0; v < vectors; v++) {
            const Floats r = load_floats(right + c * stride + v * LANES);
            for (int i = 0; i < rows; i++) sums[i][v] = multiply_add(every_float(in[i * k + c]), r, sums[i][v]);
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) store_floats(out + i * stride + v * LANES, sums[i][v]);
}

/* out[rows, stride] = in[rows, k] * right[k, stride], row-major; `stride` is a multiple of 16 */
static void product(const float *in, const float *right, float *out, long rows, long k, long stride) {
    long j = 0;
    for (; j + 2 * LANES <= stride; j += 2 * LANES) {
        long i = 0;
        for (; i + 4 <= rows; i += 4) tile(in + i * k, right + j, out + i * stride + j, k, stride, 4, 2);
        for (; i < rows; i++) tile(in + i * k, right + j, out + i * stride + j, k, stride, 1, 2);
    }
    for (; j < stride; j += LANES) {
        long i = 0;
        for (; i + 8 <= rows; i += 8) tile(in + i * k, right + j, out + i * stride + j, k, stride, 8, 1);
        for (; i < rows; i++) tile(in + i * k, right + j, out + i * stride + j, k, stride, 1, 1);
    }
}

/* Constants of one input, reference.InputTables; absent parts are NULL. `left` is transposed, the columns of `right` padded to
 * `b_padded`, a multiple of 16. `group` columns share a grid: a multiple of GROUP or of half of it, or all. */
typedef struct {
    const uint16_t *mean;
    const float *channel;
    const int8_t *basis;
    const float *basis_scale, *left, *right, *clip;
    long a, b, b_padded, n_means, n_clips, rank, width, group;
    int bits, symmetric;
} Side;

/* What one linear stores, reference.Weight; absent parts are NULL. `low_rank` is transposed; `group_scale` lies in panels:
 * (panels, groups of GROUP columns, LANES). */
typedef struct {
    const uint8_t *packed;
    const int8_t *group_scale;
    const float *qscale;
    const int32_t *row_sum;
    const int8_t *low_rank;
    const float *low_rank_scale, *bias;
    long m, half, rank, n_bias;
} Weight;

/* Rounded rows: codes (n, padded d), the grids of each (n, grids), the branch (n, width), and what products need of the grids,
 * `wide` numbers for every GROUP columns, which have grids for `halves` parts, or three for the whole row: `spread_grids`. */
typedef struct {
    int8_t *codes;
    float *scale, *offset, *branch, *spread;
    long n, stride, grids;
    int grouped, halves;
    long wide;
} Rows;

static void plan_rows(Rows *rows, long d, long group, int grouped) {
    rows->stride = (d + GROUP - 1) / GROUP * GROUP;
    rows->grids = (d + group - 1) / group;
    rows->grouped = grouped || rows->grids > 1;
    rows->halves = rows->grids > 1 && group % GROUP ? 2 : 1;
    rows->wide = rows->grouped ? 2 * rows->halves + 1 : 3;
}

static size_t spread_floats(const Rows *rows) {
    return (size_t)rows->n * rows->wide * (rows->grouped ? rows->stride / GROUP : 1);
}

/* Grid and codes of `size` values, a multiple of 16; `q` takes them in their natural order. */
static void round_values(
    const float *u, long size, float ratio, int bits, int symmetric, int8_t *q, float *scale_out, float *offset_out) {
    const float qmin = -(float)(1 << (bits - 1)), qmax = (float)((1 << (bits - 1)) - 1);
    Floats lows = load_floats(u), highs = lows, bads = no_floats();
    for (long i = 0; i < size; i += LANES) {
        const Floats v = load_floats(u + i);
        lows = least(lows, v), highs = most(highs, v);
        bads = multiply_add(v, no_floats(), bads); /* NaN from NaN and infinity */
    }
    float low_lanes[LANES], high_lanes[LANES];
    store_floats(low_lanes, lows), store_floats(high_lanes, highs);
    float low = low_lanes[0], high = high_lanes[0];
    for (int i = 1; i < LANES; i++) {
        low = low_lanes[i] < low ? low_lanes[i] : low;
        high = high_lanes[i] > high ? high_lanes[i] : high;
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
    if (isnan(sum_floats(bads))) {
        memset(q, 0, size);
        scale = offset = NAN;
    } else {
        const Floats by = every_float(scale), from = every_float(offset), first = every_float(qmin), last = every_float(qmax);
        for (long i = 0; i < size; i += LANES) {
            const Floats step = divide(subtract(load_floats(u + i), from), by);
            store_bytes(q + i, to_ints(least(most(step, first), last)));
        }
    }
    *scale_out = scale, *offset_out = offset;
}

/* Split the strongest directions off: p[r] = u . v_r, u -= sum_r p[r] v_r. */
static void split_branch(const Side *side, float *u, float *p) {
    const long d = side->a * side->b, rank = side->rank;
    for (long r = rank; r < side->width; r++) p[r] = 0.0f;
    for (long r = 0; r < rank; r += 4) {
        const int8_t *v[4];
        Floats sums[4];
        for (int k = 0; k < 4; k++) v[k] = side->basis + (r + k < rank ? r + k : rank - 1) * d, sums[k] = no_floats();
        for (long i = 0; i < d; i += LANES) {
            const Floats x = load_floats(u + i);
            for (int k = 0; k < 4; k++) sums[k] = multiply_add(x, signed_to_floats(v[k] + i), sums[k]);
        }
        for (int k = 0; k < 4 && r + k < rank; k++) p[r + k] = sum_floats(sums[k]) * side->basis_scale[r + k];
    }
    for (long r = 0; r < rank; r += 4) {
        const int8_t *v[4];
        Floats share[4];
        for (int k = 0; k < 4; k++) {
            v[k] = side->basis + (r + k < rank ? r + k : rank - 1) * d;
            share[k] = every_float(r + k < rank ? -p[r + k] * side->basis_scale[r + k] : 0.0f);
        }
        for (long i = 0; i < d; i += LANES) {
            Floats x = load_floats(u + i);
            for (int k = 0; k < 4; k++) x = multiply_add(share[k], signed_to_floats(v[k] + i), x);
            store_floats(u + i, x);
        }
    }
}

/* What products need of a row's grids. With groups: for each half (or all) of GROUP columns a scale s and an offset o, and one
 * constant c, such that the share of these columns is c + sum over halves of s * (sum of nibbles * codes) + o * (sum of
 * nibbles). Else: scale, offset, 8 * sum of codes. */
static void spread_grids(const Rows *rows, long d, long group, long row) {
    const long groups = rows->stride / GROUP, size = GROUP / rows->halves;
    float *out = rows->spread + row * rows->wide * (rows->grouped ? groups : 1);
    int32_t whole = 0;
    for (long g = 0; g < groups; g++) {
        const int8_t *q = rows->codes + row * rows->stride + g * GROUP;
        float constant = 0.0f;
        for (long h = 0; h < rows->halves; h++) {
            const long first = g * GROUP + h * size, left = d - first, real = left < 0 ? 0 : left < size ? left : size;
            int32_t total = 0;
            for (long i = h * size / 2; i < (h + 1) * size / 2; i++) total += q[i] + q[GROUP / 2 + i];
            whole += total;
            if (!rows->grouped) continue;
            const long at = row * rows->grids + first / group;
            const float scale = real ? rows->scale[at] : 0.0f, offset = real ? rows->offset[at] : 0.0f;
            out[rows->wide * g + 2 * h] = scale, out[rows->wide * g + 2 * h + 1] = offset;
            constant -= 8.0f * ((float)total * scale + (float)real * offset);
        }
        if (rows->grouped) out[rows->wide * (g + 1) - 1] = constant;
    }
    if (!rows->grouped) out[0] = rows->scale[row], out[1] = rows->offset[row], out[2] = 8.0f * (float)whole;
}

static size_t row_scratch(const Side *side) {
    return (2 * side->a * side->b_padded + 2 * side->a * side->b + GROUP) * sizeof(float);
}

/* Round one row; `u` is scratch of `row_scratch` bytes. */
static void round_row(const Side *side, const void *x, int x_bf16, long kind, const Rows *rows, long row, float *restrict u) {
    const long a = side->a, b = side->b, d = a * b, wide = a * side->b_padded;
    float *restrict t = u + d, *restrict z = t + wide;
    int8_t *natural = (int8_t *)(z + wide);
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
    if (side->rank) split_branch(side, u, rows->branch + row * side->width);
    product(u, side->right, t, a, b, side->b_padded);
    product(side->left, t, z, a, a, side->b_padded);
    if (b == side->b_padded)
        u = z;
    else
        for (long i = 0; i < a; i++) memcpy(u + i * b, z + i * side->b_padded, b * sizeof(float));
    const float ratio = side->clip[kind < side->n_clips ? kind : side->n_clips - 1];
    const long grids = rows->grids;
    float *scale = rows->scale + row * grids, *offset = rows->offset + row * grids;
    int bad = 0;
    for (long g = 0; g < grids; g++) {
        const long from = g * side->group, size = d - from < side->group ? d - from : side->group;
        round_values(u + from, size, ratio, side->bits, side->symmetric, natural + from, scale + g, offset + g);
        bad |= isnan(scale[g]);
    }
    if (bad) /* what is not finite is in every coordinate after a rotation: the whole row is lost */
        for (long g = 0; g < grids; g++) scale[g] = offset[g] = NAN;
    for (long i = d; i < rows->stride; i++) natural[i] = 0;
    for (long from = 0; from < rows->stride; from += GROUP)
        split_bytes(natural + from, rows->codes + row * rows->stride + from);
    if (rows->spread) spread_grids(rows, d, side->group, row);
}

/* Sums of `tokens` rows with the `words` words of a chunk at `panel`; tokens, grouped and halves are constants. With `grouped`
 * each GROUP columns are scaled at once, by the row's grids of its `halves` and the weight's own scale. Without, integers are
 * added up. */
INLINE void chunk_sums(
    const Ints *panel, long words, const float *group_scale, const float *nibbles, const int8_t *codes, long stride,
    const float *grids, long grid_stride, void *sums, int tokens, int grouped, int halves) {
    Floats reals[TOKENS];
    Ints wholes[TOKENS];
    const int wide = 2 * halves + 1;
    for (int t = 0; t < tokens; t++) {
        if (grouped)
            reals[t] = load_floats((float *)sums + t * LANES);
        else
            wholes[t] = load_ints((int32_t *)sums + t * LANES);
    }
    for (long word = 0, group = 0; word < words; word += 4, group++) {
        Floats shares[TOKENS];
        for (int h = 0; h < halves; h++) {
            Ints now[TOKENS];
            for (int t = 0; t < tokens; t++) now[t] = grouped ? zeros() : wholes[t];
            for (int q = h * 4 / halves; q < (h + 1) * 4 / halves; q++) {
                const Ints both = panel[word + q], even = low_nibbles(both), odd = high_nibbles(both);
                for (int t = 0; t < tokens; t++) {
                    const int8_t *x = codes + t * stride + group * GROUP + 4 * q;
                    now[t] = dots(dots(now[t], even, every_int(x)), odd, every_int(x + GROUP / 2));
                }
            }
            if (grouped) {
                const Floats total = load_floats(nibbles + (group * halves + h) * LANES);
                for (int t = 0; t < tokens; t++) {
                    const float *grid = grids + t * grid_stride + wide * group;
                    const Floats before = h ? shares[t] : every_float(grid[wide - 1]);
                    const Floats shift = multiply_add(total, every_float(grid[2 * h + 1]), before);
                    shares[t] = multiply_add(to_floats(now[t]), every_float(grid[2 * h]), shift);
                }
            } else {
                for (int t = 0; t < tokens; t++) wholes[t] = now[t];
            }
        }
        if (grouped) {
            const Floats scale = load_floats(group_scale + group * LANES);
            for (int t = 0; t < tokens; t++) reals[t] = multiply_add(scale, shares[t], reals[t]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        if (grouped)
            store_floats((float *)sums + t * LANES, reals[t]);
        else
            store_ints((int32_t *)sums + t * LANES, wholes[t]);
    }
}

/* Constants of a panel's outputs, LANES floats each: scale, sums of the rows, factors of the branch, biases of the types. */
static size_t panel_floats(const Weight *weight, long n) { return (size_t)LANES * (n + 2 + weight->rank + weight->n_bias); }

static void panel_constants(const Weight *weight, long first, long count, float *out) {
    memset(out, 0, LANES * (2 + weight->rank + weight->n_bias) * sizeof(float));
    memcpy(out, weight->qscale + first, count * sizeof(float));
    if (weight->row_sum)
        for (long i = 0; i < count; i++) out[LANES + i] = (float)weight->row_sum[first + i];
    out += 2 * LANES;
    for (long r = 0; r < weight->rank; r++, out += LANES) {
        const int8_t *factor = weight->low_rank + r * weight->m + first;
        const float scale = weight->low_rank_scale[r];
        if (count == LANES)
            store_floats(out, multiply(signed_to_floats(factor), every_float(scale)));
        else
            for (long i = 0; i < count; i++) out[i] = (float)factor[i] * scale;
    }
    for (long k = 0; k < weight->n_bias; k++, out += LANES)
        memcpy(out, weight->bias + k * weight->m + first, count * sizeof(float));
}

/* One panel's outputs for all rows; `sums` is scratch of `panel_floats`. */
static void panel(
    const Weight *weight, const Rows *rows, const int64_t *types, long width, void *y, int y_bf16, long index, float *sums) {
    const long first = index * LANES, n = rows->n, half = weight->half, groups = rows->stride / GROUP;
    const long count = weight->m - first < LANES ? weight->m - first : LANES, words = rows->stride / 8;
    const uint8_t *starts[LANES];
    for (long i = 0; i < LANES; i++) starts[i] = weight->packed + (first + (i < count ? i : count - 1)) * half;
    const int halves = rows->halves, more = first + 2 * LANES <= weight->m;
    memset(sums, 0, n * LANES * sizeof(float));
    for (long from = 0; from < words; from += CHUNK / 8) {
        const long now = words - from < CHUNK / 8 ? words - from : CHUNK / 8;
        Ints block[CHUNK / 8];
        float group_scale[CHUNK / GROUP * LANES], nibbles[2 * CHUNK / GROUP * LANES];
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
        if (rows->grouped) {
            const int8_t one[4] = {1, 1, 1, 1};
            for (long g = 0; g < now / 4; g++) {
                for (int h = 0; h < halves; h++) {
                    Ints total = zeros();
                    for (int q = h * 4 / halves; q < (h + 1) * 4 / halves; q++) {
                        const Ints both = block[4 * g + q], ones = every_int(one);
                        total = dots(dots(total, low_nibbles(both), ones), high_nibbles(both), ones);
                    }
                    store_floats(nibbles + (g * halves + h) * LANES, to_floats(total));
                }
                const int8_t *scales = weight->group_scale;
                store_floats(
                    group_scale + g * LANES,
                    scales ? signed_to_floats(scales + ((index * groups + from / 4 + g) * LANES)) : every_float(1.0f));
            }
        }
        long token = 0;
        const int8_t *codes = rows->codes + 8 * from;
        const long grid_stride = rows->wide * groups;
        const float *grid = rows->spread + rows->wide * (from / 4);
#define RUN(count, grouped, halves)                                                                                       \
    for (; token + count <= n; token += count)                                                                            \
    chunk_sums(                                                                                                           \
        block, now, group_scale, nibbles, codes + token * rows->stride, rows->stride, grid + token * grid_stride,         \
        grid_stride, sums + token * LANES, count, grouped, halves)
#define RUN_ALL(grouped, halves) \
    RUN(TOKENS, grouped, halves); \
    RUN(2, grouped, halves);      \
    RUN(1, grouped, halves)
        if (!rows->grouped) {
            RUN_ALL(0, 1);
        } else if (halves == 1) {
            RUN_ALL(1, 1);
        } else {
            RUN_ALL(1, 2);
        }
#undef RUN_ALL
#undef RUN
    }
    float *constants = sums + n * LANES;
    panel_constants(weight, first, count, constants);
    const Floats qscale = load_floats(constants), row_sum = load_floats(constants + LANES);
    const float *factors = constants + 2 * LANES, *biases = factors + weight->rank * LANES;
    for (long row = 0; row < n; row++) {
        Floats value = load_floats(sums + row * LANES);
        if (!rows->grouped) {
            const float *grid = rows->spread + 3 * row;
            const Ints whole = add_ints(load_ints(sums + row * LANES), every_whole(-(int32_t)grid[2]));
            value = multiply_add(to_floats(whole), every_float(grid[0]), multiply(every_float(grid[1]), row_sum));
        }
        value = multiply(value, qscale);
        const float *p = rows->branch + row * width;
        for (long r = 0; r < weight->rank; r++) value = multiply_add(every_float(p[r]), load_floats(factors + r * LANES), value);
        if (weight->n_bias) {
            const long kind = types ? types[row] : 0;
            value = add(value, load_floats(biases + (kind < weight->n_bias ? kind : weight->n_bias - 1) * LANES));
        }
        const long at = row * weight->m + first;
        float lanes[LANES];
        if (count == LANES) {
            if (y_bf16)
                store_bf16((uint16_t *)y + at, value);
            else
                store_floats((float *)y + at, value);
            continue;
        }
        store_floats(lanes, value);
        if (!y_bf16)
            memcpy((float *)y + at, lanes, count * sizeof(float));
        else
            for (long i = 0; i < count; i++) ((uint16_t *)y)[at + i] = float_to_bf16(lanes[i]);
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
    const long d = side->a * side->b;
    Rows rows = {.n = n};
    size_t most = 0;
    int grouped = 0;
    for (long i = 0; i < count; i++) {
        grouped |= weights[i]->group_scale != NULL;
        if (panel_floats(weights[i], n) > most) most = panel_floats(weights[i], n);
    }
    plan_rows(&rows, d, side->group, grouped);
    const long grids = rows.grids;
    const size_t floats = (size_t)n * (2 * grids + side->width) + spread_floats(&rows);
    float *base = scratch(floats * sizeof(float) + (size_t)n * rows.stride + 64);
    if (!base) return 1;
    rows.scale = base, rows.offset = base + n * grids, rows.branch = base + 2 * n * grids;
    rows.spread = rows.branch + n * side->width, rows.codes = (int8_t *)(base + floats);
    long starts[9] = {0};
    for (long i = 0; i < count; i++) starts[i + 1] = starts[i] + (weights[i]->m + LANES - 1) / LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *u = malloc(row_scratch(side)), *sums = malloc(most * sizeof(float));
        failed |= !u || !sums;
#pragma omp for schedule(static)
        for (long row = 0; row < n; row++)
            if (u) round_row(side, x, x_bf16, types ? types[row] : 0, &rows, row, u);
#pragma omp for schedule(static)
        for (long at = 0; at < starts[count]; at++) {
            long i = 0;
            while (at >= starts[i + 1]) i++;
            if (sums) panel(weights[i], &rows, types, side->width, ys[i], y_bf16, at - starts[i], sums);
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
    const long d = side->a * side->b, half = d / 2;
    Rows rows = {.n = n, .branch = branch};
    plan_rows(&rows, d, side->group, 0);
    const long stride = rows.stride, grids = rows.grids;
    rows.scale = stats, rows.offset = stats + n * grids;
    float *total = stats + 2 * n * grids;
    rows.codes = malloc(n * stride + 1);
    int failed = !rows.codes;
    if (failed) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1) reduction(| : failed)
    {
        float *u = malloc(row_scratch(side));
        failed |= !u;
#pragma omp for
        for (long row = 0; row < n; row++) {
            if (!u) continue;
            round_row(side, x, x_bf16, types ? types[row] : 0, &rows, row, u);
            memset(total + row * grids, 0, grids * sizeof(float));
            for (long i = 0; i < half; i++) {
                const int8_t *q = rows.codes + row * stride + i / 16 * GROUP + i % 16;
                codes[row * d + i] = q[0];
                codes[row * d + half + i] = q[GROUP / 2];
                total[row * grids + 2 * i / side->group] += (float)(q[0] + q[GROUP / 2]);
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
    const long half = weight->half, d = 2 * half;
    Rows rows = {.n = n};
    plan_rows(&rows, d, group, weight->group_scale != NULL);
    const long stride = rows.stride, grids = rows.grids;
    rows.scale = (float *)stats, rows.offset = rows.scale + n * grids, rows.branch = (float *)branch;
    rows.codes = calloc(n * stride + 1, 1);
    rows.spread = malloc(spread_floats(&rows) * sizeof(float) + 1);
    int failed = !rows.codes || !rows.spread;
    if (!failed) {
        for (long row = 0; row < n; row++) {
            for (long i = 0; i < half; i++) {
                int8_t *q = rows.codes + row * stride + i / 16 * GROUP + i % 16;
                q[0] = codes[row * d + i];
                q[GROUP / 2] = codes[row * d + half + i];
            }
            spread_grids(&rows, d, group, row);
        }
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
        {
            float *sums = malloc(panel_floats(weight, n) * sizeof(float));
            failed |= !sums;
#pragma omp for schedule(static)
            for (long at = 0; at < (weight->m + LANES - 1) / LANES; at++)
                if (sums) panel(weight, &rows, types, width, y, y_bf16, at, sums);
            free(sums);
        }
    }
    free(rows.codes);
    free(rows.spread);
    return failed;
}

/* Rows of a weight that a panel holds, and how its bytes are multiplied. */
long freeact_lanes(void) { return LANES; }
const char *freeact_kind(void) { return KIND; }
