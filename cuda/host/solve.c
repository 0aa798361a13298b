/* The inner loops of the quantizer on a CPU: the grid search of a group, and the loops over columns of GPTQ and of its
 * coordinate descent. doctor/quant/grid.py and gptq.py are their definitions; products of matrices stay with BLAS.
 *
 * Built without contraction (setup.py): a fused operation stands here as fused(), so that the error of a candidate is that
 * of grid.py but for the order of the sum. Every function takes a range of rows, which is how threads share the work; a row's
 * result does not depend on the range.
 */
#include "level.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef u8 bytes __attribute__((vector_size(LANES)));

enum { BLOCK = 128, COLUMNS = 4, WIDE = 2, ROWS = WIDE * LANES };

static inline lanes load(const float *from, int64_t count)
{
    lanes out = {0};
    if (count >= LANES)
        __builtin_memcpy(&out, from, sizeof out);
    else if (count > 0)
        __builtin_memcpy(&out, from, (size_t)count * 4);
    return out;
}

static inline void store(float *to, lanes value, int64_t count)
{
    if (count >= LANES)
        __builtin_memcpy(to, &value, sizeof value);
    else if (count > 0)
        __builtin_memcpy(to, &value, (size_t)count * 4);
}

static inline void store_codes(u8 *to, lanes value, int64_t count)
{
    bytes codes = __builtin_convertvector(__builtin_convertvector(value, integers), bytes);
    if (count > 0)
        __builtin_memcpy(to, &codes, count >= LANES ? LANES : (size_t)count);
}

static inline lanes all(float x)
{
    return x - (lanes){0};
}

/* a * b + c, rounded once where the level can. */
static inline lanes fused(lanes a, lanes b, lanes c)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* a < b ? a : b, which C has no operator for. */
static inline lanes smaller(lanes a, lanes b)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (lanes)_mm256_min_ps((__m256)a, (__m256)b);
#else
    const integers yes = a < b;
    return (lanes)(((integers)a & yes) | ((integers)b & ~yes));
#endif
}

static inline lanes larger(lanes a, lanes b) { return -smaller(-a, -b); }

/* Codes round(x) + zero clamped to 0..top, for x = w / scale. Values past 2^10 only ever clamp, and below it adding and
 * taking off 1.5 * 2^23 rounds to nearest even at every level. No NaN comes here: W, H and
 * scales were refused before. */
static inline lanes code_of(lanes x, lanes zero, float top)
{
    const lanes magic = all(0x1.8p23f);
    x = larger(smaller(x, all(1024.0f)), all(-1024.0f));
    return larger(smaller((x + magic) - magic + zero, all(top)), all(0.0f));
}

static inline float sum_of(lanes x)
{
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
}

/* The arguments of grid.fit that are one for a whole tensor; doctor/quant/solver.py mirrors this struct. */
typedef struct {
    float top, half, zero_min;
    int32_t sym, turn, mse, dtype;   /* dtype of stored scales: 0 float32, 1 float16, 2 bfloat16 */
    int32_t ratios, fine, refits;
} grid_rule;

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

/* The nearest positive scale that a file can hold (ties to even), never 0; Inf past its range. */
static float stored_scale(float scale, int dtype)
{
    const float least = dtype == 1 ? 0x1p-24f : dtype == 2 ? 0x1p-133f : 0x1p-149f;
    const uint32_t bits = bits_of(scale);
    if (dtype == 1) {
        if (bits >= 0x477ff000u)
            return float_of(0x7f800000u);
        scale = bits < 0x38800000u ? (scale + 0.5f) - 0.5f : float_of((bits + 0xfffu + (bits >> 13 & 1)) & ~0x1fffu);
    } else if (dtype == 2)
        scale = float_of((bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u);
    return scale < least ? least : scale;
}

static const float LARGEST[3] = {0x1.fffffep127f, 65504.0f, 0x1.fep127f};

typedef struct {
    const float *w, *cost;           /* one group, filled up with zeros to a multiple of 2 * LANES */
    int64_t count;
    float scale, zero, error;
} group;

static float error_of(const group *g, float scale, float zero, float top)
{
    const lanes s = all(scale), z = all(zero);
    lanes sum[2] = {{0}, {0}};
    for (int64_t i = 0; i < g->count; i += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            const lanes w = load(g->w + i + half * LANES, LANES);
            const lanes off = (code_of(w / s, z, top) - z) * s - w;
            sum[half] += off * off * load(g->cost + i + half * LANES, LANES);
        }
    return sum_of(sum[0] + sum[1]);
}

static void consider(group *g, float scale, float zero, const grid_rule *rule)
{
    const float largest = LARGEST[rule->dtype];
    scale = stored_scale(scale < largest ? scale : largest, rule->dtype);
    const float error = error_of(g, scale, zero, rule->top);
    if (error < g->error) {
        g->scale = scale;
        g->zero = zero;
        g->error = error;
    }
}

static void refit(group *g, const grid_rule *rule)
{
    const lanes s = all(g->scale), z = all(g->zero);
    lanes norm = {0}, product = {0};
    for (int64_t i = 0; i < g->count; i += LANES) {
        const lanes w = load(g->w + i, LANES), level = code_of(w / s, z, rule->top) - z;
        const lanes weighted = level * load(g->cost + i, LANES);
        norm += weighted * level;
        product += weighted * w;
    }
    const float below = sum_of(norm), above = sum_of(product);
    consider(g, below > 0 && above / below > 0 ? above / below : g->scale, g->zero, rule);
}

static float clamped(float x, float low, float high)
{
    return x < low ? low : x > high ? high : x;
}

static float nearest_even(float x)   /* |x| < 2^22 */
{
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

static void fit_group(group *g, const grid_rule *rule, const float *candidates, float low, float high)
{
    const float span = rule->sym ? (high > -low ? high : -low) : high - low;
    const float raw = span > 0 ? span / (rule->sym ? rule->half - 0.5f : rule->top) : 1.0f;
    const float first = g->scale = stored_scale(raw, rule->dtype);
    const int live = span > 0;
    g->zero = live && !rule->sym ? clamped(nearest_even(-low / first), rule->zero_min, rule->top) : rule->half;
    const float start = g->zero;
    if (!rule->mse || !live || first > LARGEST[rule->dtype])
        return;
    g->error = error_of(g, first, start, rule->top);
    for (int i = 0; i < rule->ratios; i++)
        consider(g, first * candidates[i], start, rule);
    for (int i = 0; i < rule->fine; i++)
        consider(g, g->scale + first * candidates[rule->ratios + i], g->zero, rule);
    if (!rule->sym)
        for (int step = -1; step <= 1; step += 2)
            consider(g, g->scale, clamped(g->zero + (float)step, rule->zero_min, rule->top), rule);
    for (int i = 0; i < rule->refits; i++)
        refit(g, rule);
}

/* grid.fit of rows [from, to) of W f32[n, k], finite. cost f32[k] or NULL; candidates f32[ratios + fine]; scale f32[n, k / width];
 * zero i32[n, k / width]; scratch f32[2 * (width + 2 * 16)] of the caller's. A scale past the stored dtype comes out as Inf. */
void EXPORT(doctor_fit_grid)(const float *W, const float *cost, int64_t k, int64_t width, int64_t from, int64_t to,
                             const grid_rule *rule, const float *candidates, float *scale, int32_t *zero, float *scratch)
{
    const int64_t groups = k / width, padded = (width + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    float *w = scratch, *costs = scratch + padded;
    for (int64_t i = 0; i < padded; i++)
        w[i] = costs[i] = 0.0f;
    for (int64_t at = 0; at < groups; at++)
        for (int64_t row = from; row < to; row++) {
            const float *here = W + row * k + at * width;
            float low = 0.0f, high = 0.0f;
            for (int64_t i = 0; i < width; i++) {
                w[i] = here[i];
                low = w[i] < low ? w[i] : low;
                high = w[i] > high ? w[i] : high;
            }
            if (row == from)
                for (int64_t i = 0; i < width; i++)
                    costs[i] = cost ? cost[at * width + i] : 1.0f;
            const int turned = rule->sym && rule->mse && rule->turn && high > -low;
            for (int64_t i = 0; turned && i < width; i++)
                w[i] = -w[i];
            group g = {w, costs, padded, 0, 0, 0};
            fit_group(&g, rule, candidates, turned ? -high : low, turned ? -low : high);
            scale[row * groups + at] = turned ? -g.scale : g.scale;
            zero[row * groups + at] = (int32_t)g.zero;
        }
}

/* Columns of a block in fours: what the block's earlier columns owe to these, for ROWS rows at a time. */
typedef struct {
    lanes of[COLUMNS][WIDE];
} four;

/* P[j * BLOCK + i] = M[i, j] of a block M f32[count, count] that lies `stride` apart: a column's weights side by side. */
static void pack_block(float *P, const float *M, int64_t stride, int64_t count)
{
    const int64_t padded = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (int64_t j = 0; j < padded; j++)
        for (int64_t i = 0; i < BLOCK; i++)
            P[j * BLOCK + i] = i < count && j < count ? M[i * stride + j] : 0.0f;
}

static inline four owed(const float *P, lanes (*sent)[WIDE], int64_t first)
{
    four sum = {0};
    for (int64_t i = 0; i < first; i++)
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < WIDE; v++)
                sum.of[c][v] = fused(sent[i][v], all(P[(first + c) * BLOCK + i]), sum.of[c][v]);
    return sum;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* gptq._round_columns for `count` <= 128 columns of rows [from, to): T f32[count, n] with all corrections from before these
 * columns; U f32[count, count], rows `stride` apart; owner i32[count], the group of each column; scale and zero f32[G, n]. Writes
 * codes u8[count, n] and errors f32[count, n] = (w - value) / U_jj. P f32[128 * 128] is scratch. */
void EXPORT(doctor_round_columns)(const float *T, int64_t n, const float *U, int64_t stride, int64_t count, const int32_t *owner,
                                  const float *scale, const float *zero, float top, u8 *codes, float *errors, int64_t from,
                                  int64_t to, float *P)
{
    lanes sent[BLOCK][WIDE];
    pack_block(P, U, stride, count);
    for (int64_t row = from; row < to; row += ROWS)
        for (int64_t first = 0; first < count; first += COLUMNS) {
            four sum = owed(P, sent, first);
            for (int64_t j = first; j < least(first + COLUMNS, count); j++)
                for (int v = 0; v < WIDE; v++) {
                    const int64_t at = row + v * LANES, left = to - at;
                    if (left <= 0)
                        continue;
                    const lanes s = load(scale + owner[j] * n + at, left), z = load(zero + owner[j] * n + at, left);
                    const lanes w = load(T + j * n + at, left) - sum.of[j - first][v];
                    const lanes code = code_of(w / s, z, top);
                    const lanes error = (w - (code - z) * s) / all(P[j * BLOCK + j]);
                    sent[j][v] = error;
                    store_codes(codes + j * n + at, code, left);
                    store(errors + j * n + at, error, left);
                    for (int64_t later = j + 1; later < first + COLUMNS; later++)
                        sum.of[later - first][v] = fused(error, all(P[later * BLOCK + j]), sum.of[later - first][v]);
                }
        }
}

/* gptq.descend for `count` <= 128 columns of rows [from, to): T, pull and error f32[count, n]; H f32[count, count], rows `stride`
 * apart. Updates error, writes codes u8[count, n] and moved f32[count, n], the change of error. */
void EXPORT(doctor_descend)(const float *T, int64_t n, const float *H, int64_t stride, int64_t count, const int32_t *owner,
                            const float *scale, const float *zero, float top, const float *pull, float *error, u8 *codes,
                            float *moved, int64_t from, int64_t to, float *P)
{
    lanes sent[BLOCK][WIDE];
    pack_block(P, H, stride, count);
    for (int64_t row = from; row < to; row += ROWS)
        for (int64_t first = 0; first < count; first += COLUMNS) {
            four sum = owed(P, sent, first);
            for (int64_t j = first; j < least(first + COLUMNS, count); j++)
                for (int v = 0; v < WIDE; v++) {
                    const int64_t at = row + v * LANES, left = to - at;
                    if (left <= 0)
                        continue;
                    const float own = P[j * BLOCK + j];
                    const lanes s = load(scale + owner[j] * n + at, left), z = load(zero + owner[j] * n + at, left);
                    const lanes w = load(T + j * n + at, left), before = load(error + j * n + at, left);
                    const lanes drawn = load(pull + j * n + at, left) + sum.of[j - first][v];
                    const lanes best = own > 0 ? drawn / all(own) + w - before : w;
                    const lanes code = code_of(best / s, z, top), step = w - (code - z) * s - before;
                    sent[j][v] = step;
                    store_codes(codes + j * n + at, code, left);
                    store(error + j * n + at, before + step, left);
                    store(moved + j * n + at, step, left);
                    for (int64_t later = j + 1; later < first + COLUMNS; later++)
                        sum.of[later - first][v] = fused(step, all(P[later * BLOCK + j]), sum.of[later - first][v]);
                }
        }
}
