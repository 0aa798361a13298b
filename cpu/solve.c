/* The inner loops of the quantizer on a CPU: the grid search of a group, and the loops over columns of GPTQ and of its
 * coordinate descent. doctor/quant/solve/grid.py and gptq.py are their definitions; products of matrices stay with BLAS.
 *
 * Built without contraction (setup.py): a fused operation stands here as fused(), so that the error of a candidate is that
 * of grid.py but for the order of the sum. Every function takes a range of rows, which is how threads share the work; a row's
 * result does not depend on the range.
 */
#include "lanes.h"

enum { BLOCK = 128, COLUMNS = 4, PANELS = BLOCK / COLUMNS, WIDE = 3, ROWS = WIDE * LANES, DEPTH = 256, TILES = 8,
       STRIP = 16 };   /* rows that are packed together: their lines stay in the first-level cache */

/* The arguments of grid.fit that are one for a whole tensor; doctor/quant/solve/cpu.py mirrors this struct. */
typedef struct {
    float top, half, zero_min;
    int32_t sym, turn, mse, dtype;   /* of stored scales: 0 float32, 1 float16, 2 bfloat16, then those of 4-bit floats */
    int32_t ratios, fine, refits;
    float divisor;                   /* of 8-bit scales of 4-bit floats */
} grid_rule;

/* Scales of 4-bit floats: 8-bit floats under a divisor (NVFP4), powers of two (MXFP4). Codes are halves then, see code_of. */
enum { FLOATS = 3, POWERS = 4 };

/* Codes round(x) + zero clamped to 0..top, for x = w / scale. Values past 2^10 only ever clamp, and below it adding and
 * taking off 1.5 * 2^23 rounds to nearest even at every level. No NaN comes here: W, H and scales were refused before.
 * Of 4-bit floats x is in halves, and the levels lie 1 apart below 4, 2 apart below 8, 4 apart up to 12. A top below 0:
 * groups are symmetric and of several widths, so the zero point says it. */
static inline lanes code_of(lanes x, lanes zero, const grid_rule *rule)
{
    const lanes magic = all(0x1.8p23f);
    if (rule->dtype >= FLOATS) {
        x = larger(smaller(x, all(12.0f)), all(-12.0f));
        const lanes size = larger(x, -x), one = all(1.0f), two = all(2.0f), half = all(0.5f), quarter = all(0.25f);
        const integers middle = size >= all(4.0f), high = size >= all(8.0f);
        const lanes step = one + (lanes)((integers)one & middle) + (lanes)((integers)two & high);
        const lanes inverse = one - (lanes)((integers)half & middle) - (lanes)((integers)quarter & high);
        return ((x * inverse + magic) - magic) * step + zero;
    }
    x = larger(smaller(x, all(1024.0f)), all(-1024.0f));
    return larger(smaller((x + magic) - magic + zero, rule->top < 0 ? zero + zero - all(1.0f) : all(rule->top)), all(0.0f));
}

/* The nearest positive scale that a file can hold (ties to even), never 0; Inf past its range. */
static float stored_scale(float scale, const grid_rule *rule)
{
    const int dtype = rule->dtype;
    if (dtype == POWERS) {   /* nearest on a logarithmic scale: up from the square root of 2 */
        scale = scale < 0x1p-126f ? 0x1p-126f : scale > 0x1p126f ? 0x1p126f : scale;
        return float_of((bits_of(scale) + (0x800000u - 0x3504f3u)) & 0x7f800000u);
    }
    if (dtype == FLOATS) {
        float stored = scale * 2.0f * rule->divisor;
        stored = stored < 0x1p-9f ? 0x1p-9f : stored > 448.0f ? 448.0f : stored;
        if (stored < 0x1p-6f)
            stored = (stored + 0x1.8p14f) - 0x1.8p14f;
        else
            stored = float_of((bits_of(stored) + 0x7ffffu + (bits_of(stored) >> 20 & 1)) & ~0xfffffu);
        return stored / rule->divisor * 0.5f;
    }
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

static inline float largest_of(const grid_rule *rule)
{
    static const float LARGEST[3] = {0x1.fffffep127f, 65504.0f, 0x1.fep127f};
    return rule->dtype == POWERS ? 0x1p126f : rule->dtype == FLOATS ? 448.0f / rule->divisor * 0.5f : LARGEST[rule->dtype];
}

/* The scale that the absmax of a group asks for before any search, that of a group of zeros for 0. */
static float first_scale(float span, const grid_rule *rule)
{
    if (rule->dtype == POWERS)
        return span > 0 ? stored_scale(float_of((bits_of(span) + 0x200000u) & 0x7f800000u) / 8, rule) : 0.5f;
    if (rule->dtype == FLOATS)
        return span > 0 ? stored_scale(span / 12, rule) : 1.0f / rule->divisor * 0.5f;
    return stored_scale(span > 0 ? span / (rule->sym ? rule->half - 0.5f : rule->top) : 1.0f, rule);
}

typedef struct {
    const float *w, *cost;           /* one group, filled up with zeros to a multiple of 2 * LANES */
    int64_t count;
    float scale, zero, error;
} group;

static float error_of(const group *g, float scale, float zero, const grid_rule *rule)
{
    const lanes s = all(scale), z = all(zero);
    lanes sum[2] = {{0}, {0}};
    for (int64_t i = 0; i < g->count; i += 2 * LANES)
        for (int half = 0; half < 2; half++) {
            const lanes w = load(g->w + i + half * LANES, LANES);
            const lanes off = (code_of(w / s, z, rule) - z) * s - w;
            sum[half] += off * off * load(g->cost + i + half * LANES, LANES);
        }
    return sum_of(sum[0] + sum[1]);
}

static void consider(group *g, float scale, float zero, const grid_rule *rule)
{
    const float largest = largest_of(rule);
    scale = stored_scale(scale < largest ? scale : largest, rule);
    const float error = error_of(g, scale, zero, rule);
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
        const lanes w = load(g->w + i, LANES), level = code_of(w / s, z, rule) - z;
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
    const float first = g->scale = first_scale(span, rule);
    const int live = span > 0;
    g->zero = live && !rule->sym ? clamped(nearest_even(-low / first), rule->zero_min, rule->top) : rule->half;
    const float start = g->zero;
    if (!rule->mse || !live || first > largest_of(rule))
        return;
    g->error = error_of(g, first, start, rule);
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

/* Rows of W go through all columns in tiles of ROWS, one lane a row: E[j * ROWS + lane] is the error of column j. A factor or
 * a Hessian is packed beforehand in panels of COLUMNS columns, so that what earlier columns owe to a panel is a sum over i
 * of one broadcast value times one vector: 120 GF on a core where the BLAS at hand reaches 80. DEPTH values of i and the lanes
 * that belong to them stay in the first-level cache while every panel of a block takes them up; TILES tiles share a block's
 * panels while those are in the second-level cache. */
typedef struct {
    lanes of[COLUMNS][WIDE];
} panel;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* sum += P[i, c] * E[i] over `count` rows of P f32[., COLUMNS] and E f32[., ROWS]. */
static inline panel added(panel sum, const float *P, const float *E, int64_t count)
{
    for (int64_t i = 0; i < count; i++, P += COLUMNS, E += ROWS) {
        lanes sent[WIDE];
        for (int v = 0; v < WIDE; v++)
            sent[v] = load(E + v * LANES, LANES);
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < WIDE; v++)
                sum.of[c][v] = fused(sent[v], all(P[c]), sum.of[c][v]);
    }
    return sum;
}

static inline int64_t panels_of(int64_t count) { return (count + COLUMNS - 1) / COLUMNS; }

/* owed[tile][column] of the block P f32[panels][height][COLUMNS]: what the first `rows` rows of each tile's E send to its columns. */
static void gather_owed(panel *owed, const float *P, int64_t height, int64_t panels, int64_t rows, const float *E, int64_t k,
                        int64_t tiles)
{
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t at = 0; at < panels; at++)
            owed[tile * PANELS + at] = (panel){0};
    for (int64_t first = 0; first < rows; first += DEPTH)
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int64_t at = 0; at < panels; at++)
                owed[tile * PANELS + at] = added(owed[tile * PANELS + at], P + (at * height + first) * COLUMNS,
                                                 E + (tile * k + first) * ROWS, least(DEPTH, rows - first));
}

/* Everything that the two loops over columns share; doctor/quant/solve/cpu.py mirrors this struct. Step p of the loop treats
 * column order[p] of W, and owner[p] is its group. */
typedef struct {
    const float *W;                  /* [n, k] */
    const int32_t *order, *owner;    /* [k] */
    const float *packed;             /* the factor or the Hessian, in panels */
    const float *extra;              /* [k], by step: what damping added to diag(H) */
    float *scale;                    /* [n, G] */
    int32_t *zero;                   /* [n, G] */
    u8 *codes;                       /* [n, k] */
    double *loss, *excess;           /* [n]: e H e^T of the damped H, and the share of it that damping added */
    const float *cost;               /* [k], by step: of grids that are fitted on the way, or NULL */
    const float *candidates;
    int64_t n, k, groups, block, width;   /* width: of groups fitted or refitted on the way, 0 for none */
    int64_t first, last;             /* the steps of this call, whole blocks, and those that `packed` holds */
} columns_of;

/* W f32[., ROWS] of steps [first, last), and zeros in the lanes past row `to`. */
static void take_weights(float *to_tile, const columns_of *all_of, int64_t row, int64_t to, int64_t first, int64_t last)
{
    const int64_t lanes_here = least(ROWS, to - row);
    for (int64_t lane = 0; lane < ROWS; lane++) {
        const float *from = all_of->W + (row + lane) * all_of->k;
        for (int64_t p = first; p < last; p++)
            to_tile[(p - first) * ROWS + lane] = lane < lanes_here ? from[all_of->order[p]] : 0.0f;
    }
}

static void put_codes(const columns_of *all_of, const u8 *tile, int64_t row, int64_t to, int64_t first, int64_t last)
{
    for (int64_t lane = 0; lane < least(ROWS, to - row); lane++) {
        u8 *codes = all_of->codes + (row + lane) * all_of->k;
        for (int64_t p = first; p < last; p++)
            codes[all_of->order[p]] = tile[(p - first) * ROWS + lane];
    }
}

/* Scales and zeros f32[G, ROWS] of a tile; scale 1 in the lanes past row `to`. */
static void take_grid(float *scale, float *zero, const columns_of *all_of, int64_t row, int64_t to)
{
    for (int64_t lane = 0; lane < ROWS; lane++)
        for (int64_t g = 0; g < all_of->groups; g++) {
            const int here = row + lane < to;
            scale[g * ROWS + lane] = here ? all_of->scale[(row + lane) * all_of->groups + g] : 1.0f;
            zero[g * ROWS + lane] = here ? (float)all_of->zero[(row + lane) * all_of->groups + g] : 0.0f;
        }
}

static void put_grid(const columns_of *all_of, const float *scale, const float *zero, int64_t row, int64_t to)
{
    for (int64_t lane = 0; lane < least(ROWS, to - row); lane++)
        for (int64_t g = 0; g < all_of->groups; g++) {
            all_of->scale[(row + lane) * all_of->groups + g] = scale[g * ROWS + lane];
            all_of->zero[(row + lane) * all_of->groups + g] = (int32_t)zero[g * ROWS + lane];
        }
}

static void put_sums(double *sums, const lanes *of, int64_t row, int64_t to)
{
    for (int64_t lane = 0; lane < least(ROWS, to - row); lane++)
        sums[row + lane] += of[lane / LANES][lane % LANES];
}

/* Step p of a panel whose first step is `start`: the value that a column may still change by others' hands goes to those after it. */
static inline void send(panel *sum, const float *P, int64_t p, int64_t start, const lanes *value)
{
    for (int64_t later = p + 1 - start; later < COLUMNS; later++)
        for (int v = 0; v < WIDE; v++)
            sum->of[later][v] = fused(value[v], all(P[p * COLUMNS + later]), sum->of[later][v]);
}

/* The grid of the group of steps [first, first + width), on weights that carry every correction from steps before it: owed to
 * column j is A_j = sum_i<first E_i M_ij, and X M = A within the group is what all of them change W by. Scratch: X
 * f32[BLOCK, ROWS], rows f32[2 * padded]. */
static void fit_on_the_way(const columns_of *all_of, const grid_rule *rule, const panel *owed, const float *P, int64_t height,
                           const float *E, const float *W, int64_t begin, int64_t first, float *X, float *rows, float *scale,
                           float *zero)
{
    const int64_t last = first + all_of->width, padded = (all_of->width + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    lanes low[WIDE] = {{0}}, high[WIDE] = {{0}};
    for (int64_t start = first; start < last; start += COLUMNS) {
        const int64_t at = (start - begin) / COLUMNS;
        const float *mine = P + at * height * COLUMNS;
        panel sum = added(owed[at], mine + begin * COLUMNS, E + begin * ROWS, first - begin);
        sum = added(sum, mine + first * COLUMNS, X, start - first);
        for (int64_t p = start; p < start + COLUMNS; p++) {
            lanes back[WIDE];
            for (int v = 0; v < WIDE; v++) {
                const lanes x = sum.of[p - start][v] / all(mine[p * COLUMNS + p - start]);
                const lanes w = load(W + (p - begin) * ROWS + v * LANES, LANES) + x;
                back[v] = -x;
                low[v] = smaller(low[v], w);
                high[v] = larger(high[v], w);
                store(X + (p - first) * ROWS + v * LANES, back[v], LANES);
            }
            send(&sum, mine, p, start, back);
        }
    }
    for (int64_t i = 0; i < padded; i++) {
        rows[i] = 0.0f;
        rows[padded + i] = i < all_of->width ? (all_of->cost ? all_of->cost[first + i] : 1.0f) : 0.0f;
    }
    const int64_t g = all_of->owner[first];
    for (int64_t lane = 0; lane < ROWS; lane++) {
        const float bottom = low[lane / LANES][lane % LANES], top = high[lane / LANES][lane % LANES];
        const int turned = rule->sym && rule->mse && rule->turn && top > -bottom;
        for (int64_t i = 0; rule->mse && i < all_of->width; i++) {
            const float w = W[(first - begin + i) * ROWS + lane] - X[i * ROWS + lane];
            rows[i] = turned ? -w : w;
        }
        group found = {rows, rows + padded, padded, 0, 0, 0};
        fit_group(&found, rule, all_of->candidates, turned ? -top : bottom, turned ? -bottom : top);
        scale[g * ROWS + lane] = turned ? -found.scale : found.scale;
        zero[g * ROWS + lane] = found.zero;
    }
}

/* Whether one call takes all steps. Else errors and grids of all its rows stay in the scratch from call to call; in one
 * call those of TILES tiles do. */
static inline int takes_all(const columns_of *all_of) { return all_of->first == 0 && all_of->last == all_of->k; }

/* Size of the scratch that the two functions below want for `rows` rows, in floats; 0 rows where one call takes all steps. */
int64_t EXPORT(doctor_columns_scratch)(int64_t k, int64_t groups, int64_t width, int64_t rows)
{
    const int64_t tiles = rows ? (rows + ROWS - 1) / ROWS : TILES;
    return tiles * (k * ROWS + 2 * groups * ROWS) + TILES * PANELS * (int64_t)(sizeof(panel) / 4) + 3 * BLOCK * ROWS
           + 2 * (width + 2 * LANES) + 64;
}

typedef struct {
    float *E, *scale, *zero;         /* of TILES tiles, or of all that a call has */
    panel *owed;
    float *W, *X, *rows;
    u8 *codes;
} room;

static room rooms_of(float *scratch, const columns_of *all_of, int64_t rows)
{
    const int64_t tiles = takes_all(all_of) ? TILES : (rows + ROWS - 1) / ROWS;
    room r;
    scratch += (64 - (uintptr_t)scratch % 64) % 64 / 4;
    r.owed = (panel *)scratch;
    r.W = scratch + TILES * PANELS * (int64_t)(sizeof(panel) / 4);
    r.X = r.W + BLOCK * ROWS;
    r.codes = (u8 *)(r.X + BLOCK * ROWS);
    r.E = r.X + 2 * BLOCK * ROWS;
    r.scale = r.E + tiles * all_of->k * ROWS;
    r.zero = r.scale + tiles * all_of->groups * ROWS;
    r.rows = r.zero + tiles * all_of->groups * ROWS;
    return r;
}

/* The same, with errors and grids of the tiles from row `base` on, of rows that begin at `from`. */
static room room_at(room r, const columns_of *all_of, int64_t from, int64_t base)
{
    const int64_t tile = takes_all(all_of) ? 0 : (base - from) / ROWS;
    r.E += tile * all_of->k * ROWS;
    r.scale += tile * all_of->groups * ROWS;
    r.zero += tile * all_of->groups * ROWS;
    return r;
}

static void round_block(const columns_of *all_of, const grid_rule *rule, const room *r, const panel *owed, const float *P, int64_t begin,
                        int64_t end, int64_t row, int64_t to, float *E, float *scale, float *zero)
{
    lanes loss[WIDE] = {{0}}, excess[WIDE] = {{0}};
    take_weights(r->W, all_of, row, to, begin, end);
    for (int64_t start = begin; start < end; start += COLUMNS) {
        if (all_of->width && start % all_of->width == 0)
            fit_on_the_way(all_of, rule, owed, P, end, E, r->W, begin, start, r->X, r->rows, scale, zero);
        const float *mine = P + (start - begin) * end;
        panel sum = added(owed[(start - begin) / COLUMNS], mine + begin * COLUMNS, E + begin * ROWS, start - begin);
        for (int64_t p = start; p < least(start + COLUMNS, end); p++) {
            const lanes pivot = all(mine[p * COLUMNS + p - start]), more = all(all_of->extra[p]);
            lanes error[WIDE];
            for (int v = 0; v < WIDE; v++) {
                const int64_t lane = v * LANES;
                const lanes s = load(scale + all_of->owner[p] * ROWS + lane, LANES), z = load(zero + all_of->owner[p] * ROWS + lane, LANES);
                const lanes w = load(r->W + (p - begin) * ROWS + lane, LANES), drawn = w + sum.of[p - start][v] / pivot;
                const lanes code = code_of(drawn / s, z, rule), value = (code - z) * s, off = (drawn - value) * pivot;
                error[v] = w - value;
                loss[v] += off * off;
                excess[v] += error[v] * error[v] * more;
                store_codes(r->codes + (p - begin) * ROWS + lane, code, LANES);
                store(E + p * ROWS + lane, error[v], LANES);
            }
            send(&sum, mine, p, start, error);
        }
    }
    put_codes(all_of, r->codes, row, to, begin, end);
    put_sums(all_of->loss, loss, row, to);
    put_sums(all_of->excess, excess, row, to);
}

/* GPTQ of rows [from, to) in LDLQ form: with the damped H = M M^T, M upper triangular in the order of the steps, step p rounds
 * w_p + (sum_i<p E_i M_ip) / M_pp, E = W - Q, and its share of the loss is the square of what was rounded off times M_pp. These are the
 * codes of the form with U = M^-1, which is never computed. Fills codes, and scale and zero where width says that they are fitted on
 * the way; adds to loss and excess. packed: M by doctor_pack_factor. Several calls share the steps out, in order and with one
 * scratch. Chee et al. 2023 (arXiv 2307.13304) thm 6. */
void EXPORT(doctor_round_columns)(const columns_of *all_of, const grid_rule *rule, int64_t from, int64_t to, float *scratch)
{
    const room whole = rooms_of(scratch, all_of, to - from);
    const int64_t k = all_of->k, groups = all_of->groups;
    for (int64_t base = from; base < to; base += TILES * ROWS) {
        const int64_t tiles = (least(to - base, TILES * ROWS) + ROWS - 1) / ROWS;
        const room r = room_at(whole, all_of, from, base);
        const float *P = all_of->packed;
        for (int64_t tile = 0; tile < tiles && !all_of->width && all_of->first == 0; tile++)
            take_grid(r.scale + tile * groups * ROWS, r.zero + tile * groups * ROWS, all_of, base + tile * ROWS, to);
        for (int64_t begin = all_of->first; begin < all_of->last; begin += all_of->block) {
            const int64_t end = least(k, begin + all_of->block);
            gather_owed(r.owed, P, end, panels_of(end - begin), begin, r.E, k, tiles);
            for (int64_t tile = 0; tile < tiles; tile++)
                round_block(all_of, rule, &r, r.owed + tile * PANELS, P, begin, end, base + tile * ROWS, to, r.E + tile * k * ROWS,
                            r.scale + tile * groups * ROWS, r.zero + tile * groups * ROWS);
            P += panels_of(end - begin) * COLUMNS * end;
        }
        for (int64_t tile = 0; tile < tiles && all_of->width && all_of->last == k; tile++)
            put_grid(all_of, r.scale + tile * groups * ROWS, r.zero + tile * groups * ROWS, base + tile * ROWS, to);
    }
}

/* The scale of the group of steps [begin, end) to its least-squares value, given the codes and all other groups: with levels q and
 * v = H q, a change of the scale by d changes the loss by -2 d (q . pull) + d^2 (q . v), pull = H E. X: scratch of the levels. */
static void refit_scale(const columns_of *all_of, const grid_rule *rule, const room *r, const panel *owed, const float *P, int64_t begin,
                        int64_t end, float *E, const lanes *zero, float *scale, const float *moved, lanes *loss)
{
    const int64_t k = all_of->k;
    lanes drawn[WIDE] = {{0}}, own[WIDE] = {{0}};
    for (int64_t p = begin; p < end; p++)
        for (int v = 0; v < WIDE; v++) {
            const bytes code = *(const bytes *)(r->codes + (p - begin) * ROWS + v * LANES);
            store(r->X + (p - begin) * ROWS + v * LANES, __builtin_convertvector(code, lanes) - zero[v], LANES);
        }
    for (int64_t start = begin; start < end; start += COLUMNS) {
        const int64_t at = (start - begin) / COLUMNS;
        const panel reach = added((panel){0}, P + (at * k + begin) * COLUMNS, r->X, end - begin);
        for (int64_t p = start; p < end && p < start + COLUMNS; p++)
            for (int v = 0; v < WIDE; v++) {
                const int64_t place = (p - begin) * ROWS + v * LANES;
                const lanes level = load(r->X + place, LANES), here = reach.of[p - start][v];
                drawn[v] += level * owed[at].of[p - start][v] + load(moved + place, LANES) * here;
                own[v] += level * here;
            }
    }
    float change[ROWS];
    for (int64_t lane = 0; lane < ROWS; lane++) {
        const float q_pull = drawn[lane / LANES][lane % LANES], q_v = own[lane / LANES][lane % LANES], old = scale[lane];
        const float size = q_v > 0 ? (old + q_pull / q_v) * (old < 0 ? -1.0f : 1.0f) : 0.0f, largest = largest_of(rule);
        change[lane] = 0.0f;
        if (!(size > 0))
            continue;
        const float stored = stored_scale(size < largest ? size : largest, rule), d = (old < 0 ? -stored : stored) - old;
        const float gain = d * (2.0f * q_pull - d * q_v);
        if (gain > 0) {
            change[lane] = d;
            scale[lane] = old < 0 ? -stored : stored;   /* old + d may be its neighbour, which no file holds */
            loss[lane / LANES][lane % LANES] -= gain;
        }
    }
    for (int64_t p = begin; p < end; p++)
        for (int v = 0; v < WIDE; v++) {
            const int64_t place = v * LANES;
            const lanes now = load(E + p * ROWS + place, LANES) - load(change + place, LANES) * load(r->X + (p - begin) * ROWS + place, LANES);
            store(E + p * ROWS + place, now, LANES);
        }
}

static void refine_block(const columns_of *all_of, const grid_rule *rule, const room *r, const panel *owed, const float *P, int64_t begin,
                         int64_t end, int64_t row, int64_t to, float *E, float *scale, const float *zero)
{
    const int64_t k = all_of->k;
    float *moved = r->W;
    lanes loss[WIDE] = {{0}}, middle[WIDE] = {{0}};
    for (int64_t start = begin; start < end; start += COLUMNS) {
        const float *mine = P + (start - begin) * k;
        panel sum = added(owed[(start - begin) / COLUMNS], mine + begin * COLUMNS, moved, start - begin);
        for (int64_t p = start; p < least(start + COLUMNS, end); p++) {
            const float own = mine[p * COLUMNS + p - start];
            lanes step[WIDE];
            for (int v = 0; v < WIDE; v++) {
                const int64_t lane = v * LANES, place = (p - begin) * ROWS + lane;
                const lanes s = load(scale + all_of->owner[p] * ROWS + lane, LANES), z = load(zero + all_of->owner[p] * ROWS + lane, LANES);
                const lanes before = load(E + p * ROWS + lane, LANES), pull = sum.of[p - start][v];
                const lanes level = __builtin_convertvector(*(const bytes *)(r->codes + place), lanes) - z, w = before + level * s;
                const lanes best = own > 0 ? pull / all(own) + w - before : w;
                const lanes code = code_of(best / s, z, rule);
                step[v] = (level - (code - z)) * s;
                loss[v] += step[v] * (all(2.0f) * pull + step[v] * all(own));
                middle[v] = z;
                store_codes(r->codes + place, code, LANES);
                store(E + p * ROWS + lane, before + step[v], LANES);
                store(moved + place, step[v], LANES);
            }
            send(&sum, mine, p, start, step);
        }
    }
    if (all_of->width)
        refit_scale(all_of, rule, r, owed, P, begin, end, E, middle, scale + all_of->owner[begin] * ROWS, moved, loss);
    put_codes(all_of, r->codes, row, to, begin, end);
    put_sums(all_of->loss, loss, row, to);
}

/* The codes of steps [first, last) of a tile, and the errors that they leave. */
static void take_errors(const columns_of *all_of, float *E, const float *scale, const float *zero, int64_t row, int64_t to)
{
    take_weights(E, all_of, row, to, 0, all_of->k);
    for (int64_t lane = 0; lane < least(ROWS, to - row); lane++) {
        const u8 *codes = all_of->codes + (row + lane) * all_of->k;
        for (int64_t p = 0; p < all_of->k; p++) {
            const int64_t at = all_of->owner[p] * ROWS + lane;
            E[p * ROWS + lane] -= ((float)codes[all_of->order[p]] - zero[at]) * scale[at];
        }
    }
}

static void take_codes(const columns_of *all_of, u8 *tile, int64_t row, int64_t to, int64_t first, int64_t last)
{
    for (int64_t lane = 0; lane < ROWS; lane++)
        for (int64_t p = first; p < last; p++)
            tile[(p - first) * ROWS + lane] = row + lane < to ? all_of->codes[(row + lane) * all_of->k + all_of->order[p]] : 0;
}

/* One pass of refinement of rows [from, to): each code in turn to its best value given all others and, where width says so (then
 * it is block), each group's scale after its codes. Changes codes and scale, adds the change (never positive, but for rounding) to loss,
 * sets excess. packed: the damped H by doctor_pack_hessian. */
void EXPORT(doctor_refine)(const columns_of *all_of, const grid_rule *rule, int64_t from, int64_t to, float *scratch)
{
    const room whole = rooms_of(scratch, all_of, to - from);
    const int64_t k = all_of->k, groups = all_of->groups;
    for (int64_t base = from; base < to; base += TILES * ROWS) {
        const int64_t tiles = (least(to - base, TILES * ROWS) + ROWS - 1) / ROWS;
        const room r = room_at(whole, all_of, from, base);
        const float *P = all_of->packed;
        for (int64_t tile = 0; tile < tiles && all_of->first == 0; tile++) {
            float *scale = r.scale + tile * groups * ROWS, *zero = r.zero + tile * groups * ROWS;
            take_grid(scale, zero, all_of, base + tile * ROWS, to);
            take_errors(all_of, r.E + tile * k * ROWS, scale, zero, base + tile * ROWS, to);
        }
        for (int64_t begin = all_of->first; begin < all_of->last; begin += all_of->block) {
            const int64_t end = least(k, begin + all_of->block);
            gather_owed(r.owed, P, k, panels_of(end - begin), k, r.E, k, tiles);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t row = base + tile * ROWS, of_group = tile * groups * ROWS;
                take_codes(all_of, r.codes, row, to, begin, end);
                refine_block(all_of, rule, &r, r.owed + tile * PANELS, P, begin, end, row, to, r.E + tile * k * ROWS,
                             r.scale + of_group, r.zero + of_group);
            }
            P += panels_of(end - begin) * COLUMNS * k;
        }
        for (int64_t tile = 0; tile < tiles && all_of->last == k; tile++) {
            const int64_t row = base + tile * ROWS;
            put_grid(all_of, r.scale + tile * groups * ROWS, r.zero + tile * groups * ROWS, row, to);
            lanes excess[WIDE] = {{0}};
            for (int64_t p = 0; p < k; p++)
                for (int v = 0; v < WIDE; v++) {
                    const lanes error = load(r.E + (tile * k + p) * ROWS + v * LANES, LANES);
                    excess[v] += error * error * all(all_of->extra[p]);
                }
            put_sums(all_of->excess, excess, row, to);
        }
    }
}

/* M of H = M M^T by blocks of columns, each f32[panels][end][COLUMNS], from the lower factor S f32[k, k] of H with its order
 * reversed: M[p, q] = S[k - 1 - p, k - 1 - q]; what lies above the diagonal of S is not read. Steps [from, to), whole blocks,
 * of which the rows [top, bottom) are filled: of a file no more than those of S are held. */
void EXPORT(doctor_pack_factor)(const float *S, int64_t k, int64_t block, int64_t from, int64_t to, int64_t top, int64_t bottom,
                                float *packed)
{
    for (int64_t begin = from; begin < to; begin += block) {
        const int64_t end = least(k, begin + block), panels = panels_of(end - begin), stop = least(end, bottom);
        for (int64_t first = top; first < stop; first += STRIP)
            for (int64_t at = 0; at < panels; at++)
                for (int64_t p = first; p < least(stop, first + STRIP); p++) {
                    const float *row = S + (k - 1 - p) * k + k - 1;
                    float *out = packed + (at * end + p) * COLUMNS;
                    for (int64_t c = 0; c < COLUMNS; c++) {
                        const int64_t q = begin + at * COLUMNS + c;
                        out[c] = q < end && p <= q ? row[-q] : 0.0f;
                    }
                }
        packed += panels * COLUMNS * end;
    }
}

/* H[a, b], from what lies above the diagonal of S and from the diagonal. */
static inline float entry(const float *S, const float *diagonal, int64_t k, int64_t a, int64_t b)
{
    return a < b ? S[a * k + b] : a > b ? S[b * k + a] : diagonal[a];
}

/* H + diag(extra) with rows and columns in `order`, by blocks of columns, each f32[panels][k][COLUMNS]. H f32[k, k] lies above
 * the diagonal of S, which is apart; of an S that is symmetric a column is read as a row, so that of a file few pages are held.
 * Steps [from, to), whole blocks. */
void EXPORT(doctor_pack_hessian)(const float *S, const float *diagonal, const int32_t *order, const float *extra, int64_t k,
                                 int64_t symmetric, int64_t block, int64_t from, int64_t to, float *packed)
{
    for (int64_t begin = from; begin < to; begin += block) {
        const int64_t end = least(k, begin + block), panels = panels_of(end - begin);
        for (int64_t first = 0; first < k; first += STRIP)
            for (int64_t at = 0; at < panels; at++)
                for (int64_t p = first; p < least(k, first + STRIP); p++) {
                    float *out = packed + (at * k + p) * COLUMNS;
                    for (int64_t c = 0; c < COLUMNS; c++) {
                        const int64_t q = begin + at * COLUMNS + c;
                        if (q >= end)
                            out[c] = 0.0f;
                        else if (p == q)
                            out[c] = diagonal[order[p]] + extra[p];
                        else
                            out[c] = symmetric ? S[(int64_t)order[q] * k + order[p]] : entry(S, diagonal, k, order[p], order[q]);
                    }
                }
        packed += panels * COLUMNS * k;
    }
}

/* H with rows and columns in `order` into the lower triangle of `out`, diagonal included, for rows [from, to). H lies above the
 * diagonal of S, which is apart; it is not changed where out is S. Another S is symmetric, and read by rows. */
void EXPORT(doctor_arrange)(const float *S, const float *diagonal, const int32_t *order, int64_t k, int64_t from, int64_t to,
                            float *out)
{
    for (int64_t i = from; i < to; i++) {
        const int64_t a = order[i];
        float *row = out + i * k;
        for (int64_t j = 0; j <= i; j++)
            row[j] = out != S && j < i ? S[a * k + order[j]] : entry(S, diagonal, k, a, order[j]);
    }
}
