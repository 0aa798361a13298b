/* Fitting, rounding and packing of the block types of GGUF files, row by row; doctor/quant/solve/ggml.py drives it.
 *
 * A row is a run of blocks. Each has a head (its scales, as they are stored) and codes; a code q of sub-block g stands for
 * a_g * level(q) + b_g. Scales are snapped to what is stored before a code is computed from them. Three ways to weigh errors:
 * PLAIN and WEIGHED choose what ggml_quantize_chunk chooses without and with an importance of columns, in the same float32
 * operations in the same order (built without contraction, setup.py), so that their bytes are equal; COST takes the weights
 * as they are, which is what error feedback needs: there the weight of a column is the pivot of its Hessian's factor.
 *
 * Every function takes a range of rows, which is how threads share the work; a row's result does not depend on the range.
 *
 * Sources: ggml-org/llama.cpp ggml/src/ggml-common.h (layouts), ggml/src/ggml-quants.c (what is searched); Frantar et al. 2022
 * (arXiv 2210.17323), Chee et al. 2023 (arXiv 2307.13304) and Behdin et al. 2023 (arXiv 2309.01885) as in gptq.py.
 */
#include "level.h"

enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23 };
enum { PLAIN = 0, WEIGHED = 1, COST = 2 };
enum { WIDEST = 256, PARTS = 16 };

/* A block's scales: float16 values d and m (Q4_1's minimum, the scale of a K type's minima), and integer factors. */
typedef struct {
    float d, m;
    int8_t scale[PARTS];
    u8 low[PARTS];
} head;

typedef struct {
    int type, block, bytes, part;    /* elements and bytes of a block, elements under one scale */
    int top;                         /* largest code */
    int zero;                        /* the code of 0, for signed grids */
    int affine, nested, table;
} kind;

static const kind KINDS[] = {
    {Q4_0, 32, 18, 32, 15, 8, 0, 0, 0},      {Q4_1, 32, 20, 32, 15, 0, 1, 0, 0},   {Q5_0, 32, 22, 32, 31, 16, 0, 0, 0},
    {Q5_1, 32, 24, 32, 31, 0, 1, 0, 0},      {Q8_0, 32, 34, 32, 255, 128, 0, 0, 0}, {Q4_K, 256, 144, 32, 15, 0, 1, 1, 0},
    {Q5_K, 256, 176, 32, 31, 0, 1, 1, 0},    {Q6_K, 256, 210, 16, 63, 32, 0, 1, 0}, {IQ4_NL, 32, 18, 32, 15, 0, 0, 0, 1},
    {IQ4_XS, 256, 136, 32, 15, 0, 0, 1, 1},
};

static const float LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static const kind *kind_of(int type)
{
    for (unsigned i = 0; i < sizeof KINDS / sizeof KINDS[0]; i++)
        if (KINDS[i].type == type)
            return KINDS + i;
    return 0;
}

/* float16, to nearest even; past its range Inf. */
static uint16_t half_of(float x)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits >= 0x477ff000u)
        return (uint16_t)(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (bits < 0x38800000u) {        /* subnormal: the addition rounds */
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits + 0xfffu + (bits >> 13 & 1)) - 0x38000000u) >> 13);
}

static float of_half(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, body = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t bits = body + 0x38000000u;
    float x;
    if (h >> 10 == 0 || h >> 10 == 0x20) {
        __builtin_memcpy(&x, &(uint32_t){body + 0x38800000u}, 4);
        x -= 0x1p-14f;
        __builtin_memcpy(&bits, &x, 4);
    } else if ((h & 0x7c00u) == 0x7c00u)
        bits = body + 0x70000000u;
    bits |= sign;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

static float stored(float x) { return of_half(half_of(x)); }

static int nearest(float x)          /* ties to even; |x| < 2^22 */
{
    return (int)((x + 0x1.8p23f) - 0x1.8p23f);
}

static int within(int x, int low, int high) { return x < low ? low : x > high ? high : x; }
static float size_of(float x) { return __builtin_fabsf(x); }

/* A quotient may be Inf or NaN where a scale is tiny: what cannot be a code is taken to the end it points at. */
static int code_near(float x, int low, int high)
{
    return !(x > (float)low) ? low : x >= (float)high ? high : within(nearest(x), low, high);
}

static int nearest_level(float x)
{
    int at = 0;
    while (at < 15 && x >= 0.5f * (LEVELS[at] + LEVELS[at + 1]))
        at++;
    return at;
}

/* The largest |x| with its sign. */
static float extreme(const float *x, int n)
{
    float most = 0, found = 0;
    for (int i = 0; i < n; i++)
        if (size_of(x[i]) > most) {
            most = size_of(x[i]);
            found = x[i];
        }
    return found;
}

/* Scale of a grid of integers -half..half-1 by least squares over 19 candidates; codes are integers plus half. w NULL: x^2. */
static float fit_signed(int n, int half, const float *x, const float *w, u8 *code)
{
    const float most = extreme(x, n);
    float scale = 0, best = 0;
    if (size_of(most) < 1e-15f) {
        for (int i = 0; i < n; i++)
            code[i] = 0;
        return 0;
    }
    for (int turn = 0; turn < 19; turn++) {
        const int step = turn == 0 ? 0 : turn <= 9 ? turn - 10 : turn - 9;   /* 0 first, then -9..-1, 1..9 */
        const float inverse = step ? -((float)half + 0.1f * (float)step) / most : (float)-half / most;
        float product = 0, norm = 0;
        for (int i = 0; i < n; i++) {
            const int l = within(nearest(inverse * x[i]), -half, half - 1);
            const float weight = w ? w[i] : x[i] * x[i];
            product += weight * x[i] * (float)l;
            norm += weight * (float)l * (float)l;
        }
        if (turn && !(norm > 0 && product * product > best * norm))
            continue;
        for (int i = 0; i < n; i++)
            code[i] = (u8)(half + within(nearest(inverse * x[i]), -half, half - 1));
        scale = norm != 0 ? product / norm : 0;
        best = scale * product;
    }
    return scale;
}

/* Scale and -minimum (never below 0) of codes 0..top by least squares over candidates of the inverse scale. */
static float fit_affine(int n, int top, const float *x, const float *w, u8 *code, float *below, float first, float step, int steps)
{
    float low = x[0], high = x[0], weights = w[0], sum = weights * x[0], best = 0;
    u8 tried[32];
    for (int i = 1; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        weights += w[i];
        sum += w[i] * x[i];
    }
    low = low > 0 ? 0 : low;
    if (!(high > low)) {
        for (int i = 0; i < n; i++)
            code[i] = 0;
        *below = -low;
        return 0;
    }
    float inverse = (float)top / (high - low), scale = 1 / inverse;
    const float bottom = low;
    float kept = bottom;
    for (int i = 0; i < n; i++) {
        code[i] = (u8)within(nearest(inverse * (x[i] - bottom)), 0, top);
        const float off = scale * (float)code[i] + bottom - x[i];
        best += w[i] * (off * off);
    }
    for (int turn = 0; turn <= steps; turn++) {
        float l = 0, l2 = 0, xl = 0, error = 0;
        inverse = (first + step * (float)turn + (float)top) / (high - kept);
        for (int i = 0; i < n; i++) {
            tried[i] = (u8)code_near(inverse * (x[i] - kept), 0, top);
            const float weighted = w[i] * (float)tried[i];
            l += weighted;
            l2 += weighted * (float)tried[i];
            xl += weighted * x[i];
        }
        const float divisor = weights * l2 - l * l;
        if (!(divisor > 0))
            continue;
        float own = (weights * xl - sum * l) / divisor, start = (l2 * sum - l * xl) / divisor;
        if (start > 0) {
            start = 0;
            own = xl / l2;
        }
        for (int i = 0; i < n; i++) {
            const float off = own * (float)tried[i] + start - x[i];
            error += w[i] * (off * off);
        }
        if (error < best) {
            best = error;
            scale = own;
            kept = start;
            __builtin_memcpy(code, tried, (size_t)n);
        }
    }
    *below = -kept;
    return scale;
}

/* Scale of values >= 0 on codes 0..top: nine candidates, least squares, then single codes moved while that helps. */
static float fit_positive(int n, int top, const float *x, const float *w, u8 *code)
{
    float most = 0, best = 0, product = 0, norm = 0;
    for (int i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    if (most < 1e-15f) {
        for (int i = 0; i < n; i++)
            code[i] = 0;
        return 0;
    }
    float inverse = (float)top / most;
    for (int turn = 0; turn < 9; turn++) {
        const int step = turn == 0 ? 0 : turn <= 4 ? turn - 5 : turn - 4;
        const float candidate = step ? (0.1f * (float)step + (float)top) / most : inverse, scale = 1 / candidate;
        float error = 0;
        for (int i = 0; i < n; i++) {
            const int l = nearest(candidate * x[i]);
            const float off = x[i] - scale * (float)(step && l > top ? top : l);
            error += w[i] * off * off;
        }
        if (turn == 0 || error < best) {
            best = error;
            inverse = candidate;
        }
    }
    for (int i = 0; i < n; i++) {
        const int l = nearest(inverse * x[i]);
        code[i] = (u8)(l > top ? top : l);
        product += w[i] * x[i] * (float)code[i];
        norm += w[i] * (float)code[i] * (float)code[i];
    }
    for (int turn = 0, moved = 1; turn < 5 && moved; turn++) {
        moved = 0;
        for (int i = 0; i < n; i++) {
            float p = product - w[i] * x[i] * (float)code[i], q = norm - w[i] * (float)code[i] * (float)code[i];
            if (!(p > 0 && q > 0))
                continue;
            int l = nearest(x[i] * q / p);
            l = l > top ? top : l;
            if (l == code[i])
                continue;
            p += w[i] * x[i] * (float)l;
            q += w[i] * (float)l * (float)l;
            if (p * p * norm > product * product * q) {
                code[i] = (u8)l;
                product = p;
                norm = q;
                moved = 1;
            }
        }
    }
    return norm > 0 ? product / norm : 0;
}

/* Scale of the uneven levels of IQ4, over 15 candidates. w: weights. */
static float fit_levels(int n, const float *x, const float *w)
{
    const float most = extreme(x, n);
    float scale = 0, best = 0;
    if (size_of(most) < 1e-15f)
        return 0;
    for (int turn = -1; turn < 15; turn++) {   /* the largest value on the last level, then that level moved by -7..7 */
        const float inverse = turn < 0 ? 1 / (-most / LEVELS[0]) : ((float)(turn - 7) + LEVELS[0]) / most;
        float product = 0, norm = 0;
        for (int i = 0; i < n; i++) {
            const float level = LEVELS[nearest_level(inverse * x[i])];
            product += w[i] * level * x[i];
            norm += w[i] * level * level;
        }
        if (turn < 0 || (norm > 0 && product * product > best * norm)) {
            scale = norm > 0 ? product / norm : 0;
            best = scale * product;
        }
    }
    return scale;
}

static float slope(const kind *k, const head *h, int part) { return k->nested ? h->d * (float)h->scale[part] : h->d; }

static float base(const kind *k, const head *h, int part)
{
    return !k->affine ? 0 : k->nested ? -(h->m * (float)h->low[part]) : h->m;
}

static float level_of(const kind *k, u8 code) { return k->table ? LEVELS[code] : (float)((int)code - k->zero); }

/* The code whose value is nearest to x; `old` where the scale is 0 and every code is the same. */
static u8 code_of(const kind *k, float a, float b, float x, u8 old)
{
    if (a == 0)
        return old;
    if (k->table)
        return (u8)nearest_level(x / a);
    const int least = k->type == Q8_0 ? 1 : 0;   /* -128 is no code of Q8_0 */
    return (u8)(code_near((x - b) / a, least - k->zero, k->top - k->zero) + k->zero);
}

/* Weights of the columns of one sub-block. spread: the mean square that ggml adds to that of each value. */
static void weigh(int n, const float *x, const float *importance, int mode, float spread, float *w)
{
    for (int i = 0; i < n; i++)
        w[i] = mode == COST ? importance[i] : importance[i] * __builtin_sqrtf(spread + x[i] * x[i]);
}

static float square_sum(const float *x, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

/* What Q4_0, Q5_0 and Q8_0 are without importance: the largest value decides. */
static void plain_signed(const kind *k, const float *x, head *h, u8 *code)
{
    const float most = extreme(x, 32), half = (float)k->zero;
    const float d = k->type == Q8_0 ? size_of(most) / 127.0f : most / -half, inverse = d != 0 ? 1.0f / d : 0.0f;
    h->d = stored(d);
    for (int i = 0; i < 32; i++) {
        const float v = x[i] * inverse;
        if (k->type == Q8_0) {
            int whole = (int)v;      /* half away from 0 */
            const float rest = v - (float)whole;
            whole += rest >= 0.5f ? 1 : rest <= -0.5f ? -1 : 0;
            code[i] = (u8)(whole + 128);
        } else
            code[i] = (u8)within((int)(v + (half + 0.5f)), 0, k->top);
    }
}

static void plain_affine(const kind *k, const float *x, head *h, u8 *code)
{
    float low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    const float d = (high - low) / (float)k->top, inverse = d != 0 ? 1.0f / d : 0.0f;
    h->d = stored(d);
    h->m = stored(low);
    for (int i = 0; i < 32; i++)
        code[i] = (u8)within((int)((x[i] - low) * inverse + 0.5f), 0, k->top);
}

/* Head and codes of a block of 32 with scales of its own. */
static void fit_single(const kind *k, const float *x, const float *importance, int mode, float spread, head *h, u8 *code)
{
    float w[32], below = 0;
    if (k->type == Q8_0 || (mode == PLAIN && !k->table)) {
        if (k->affine)
            plain_affine(k, x, h, code);
        else
            plain_signed(k, x, h, code);
        return;
    }
    if (mode == PLAIN)
        for (int i = 0; i < 32; i++)
            w[i] = x[i] * x[i];
    else
        weigh(32, x, importance, mode, spread, w);
    if (k->table) {
        h->d = stored(fit_levels(32, x, w));
        for (int i = 0; i < 32; i++)
            code[i] = code_of(k, h->d, 0, x[i], 0);
    } else if (k->affine) {
        h->d = stored(fit_affine(32, k->top, x, w, code, &below, -0.9f, 0.05f, 36));
        h->m = stored(-below);
    } else
        h->d = stored(fit_signed(32, k->zero, x, w, code));
}

/* Head and codes of 256 elements whose sub-blocks share float16 scales. */
static void fit_nested(const kind *k, const float *x, const float *importance, int mode, head *h, u8 *code)
{
    const int parts = 256 / k->part;
    const float spread = 2 * square_sum(x, 256) / 256;
    float scale[PARTS], below[PARTS], sums[PARTS], w[32];
    for (int g = 0; g < parts; g++) {
        const float *own = x + g * k->part;
        if (k->affine) {
            if (mode == PLAIN) {
                const float average = __builtin_sqrtf(square_sum(own, 32) / 32);
                for (int i = 0; i < 32; i++)
                    w[i] = average + size_of(own[i]);
                scale[g] = fit_affine(32, k->top, own, w, code + g * 32, below + g, k->type == Q4_K ? -1.0f : -0.5f, 0.1f,
                                      k->type == Q4_K ? 20 : 15);
            } else {
                weigh(32, own, importance + g * 32, mode, spread, w);
                sums[g] = 0;
                for (int i = 0; i < 32; i++)
                    sums[g] += w[i];
                scale[g] = fit_affine(32, k->top, own, w, code + g * 32, below + g, -0.9f, 0.05f, 36);
            }
        } else if (k->table) {
            if (mode == PLAIN)
                for (int i = 0; i < 32; i++)
                    w[i] = own[i] * own[i];
            else
                weigh(32, own, importance + g * 32, mode, spread, w);
            scale[g] = fit_levels(32, own, w);
        } else                       /* Q6_K: importance as it is */
            scale[g] = fit_signed(16, 32, own, mode == PLAIN ? 0 : importance + g * 16, code + g * 16);
    }
    if (k->affine && mode == PLAIN) {
        float most[2] = {0, 0};
        for (int g = 0; g < parts; g++) {
            most[0] = scale[g] > most[0] ? scale[g] : most[0];
            most[1] = below[g] > most[1] ? below[g] : most[1];
        }
        for (int g = 0; g < parts; g++) {
            h->scale[g] = (int8_t)within(nearest((most[0] > 0 ? 63.0f / most[0] : 0) * scale[g]), 0, 63);
            h->low[g] = (u8)within(nearest((most[1] > 0 ? 63.0f / most[1] : 0) * below[g]), 0, 63);
        }
        h->d = stored(most[0] / 63.0f);
        h->m = stored(most[1] / 63.0f);
    } else if (k->affine) {
        h->d = stored(fit_positive(parts, 63, scale, sums, (u8 *)h->scale));
        h->m = stored(fit_positive(parts, 63, below, sums, h->low));
    } else {
        const float most = extreme(scale, parts);
        const int last = k->table ? 32 : 128;
        if (size_of(most) < 1e-15f) {
            *h = (head){0};
            for (int i = 0; i < 256; i++)
                code[i] = (u8)(k->table ? nearest_level(0) : 0);
            return;
        }
        const float inverse = (float)-last / most;
        h->d = stored(1 / inverse);
        for (int g = 0; g < parts; g++)
            h->scale[g] = (int8_t)within(nearest(inverse * scale[g]), -last, last - 1);
    }
    for (int g = 0; g < parts; g++)
        for (int i = g * k->part; i < (g + 1) * k->part; i++)
            code[i] = code_of(k, slope(k, h, g), base(k, h, g), x[i], k->table ? 8 : code[i]);
}

/* One sub-block's weighted error under a scale and a minimum. */
static float error_under(const kind *k, float a, float b, const float *x, const float *w)
{
    float sum = 0;
    for (int i = 0; i < k->part; i++) {
        const float off = a * level_of(k, code_of(k, a, b, x[i], (u8)k->zero)) + b - x[i];
        sum += w[i] * off * off;
    }
    return sum;
}

/* The integer factors of one sub-block anew, under the float16 scales that its block has: the best of the least-squares ones,
 * their neighbours, and those there are. */
static void fit_part(const kind *k, const float *x, const float *w, head *h, int g)
{
    float below = 0, scale;
    u8 ignored[32];
    if (k->affine)
        scale = fit_affine(k->part, k->top, x, w, ignored, &below, -0.9f, 0.1f, 18);
    else
        scale = k->table ? fit_levels(k->part, x, w) : fit_signed(k->part, k->zero, x, w, ignored);
    const int least = k->affine ? 0 : k->table ? -32 : -128, most = k->affine ? 63 : k->table ? 31 : 127;
    const int s = h->d != 0 ? code_near(scale / h->d, least, most) : 0;
    const int m = k->affine && h->m != 0 ? code_near(below / h->m, 0, 63) : 0;
    float best = error_under(k, slope(k, h, g), base(k, h, g), x, w);
    head tried = *h;
    for (int ds = -1; ds <= 1; ds++)
        for (int dm = k->affine ? -1 : 0; dm <= (k->affine ? 1 : 0); dm++) {
            tried.scale[g] = (int8_t)within(s + ds, least, most);
            tried.low[g] = (u8)within(m + dm, 0, 63);
            const float error = error_under(k, slope(k, &tried, g), base(k, &tried, g), x, w);
            if (error < best) {
                best = error;
                h->scale[g] = tried.scale[g];
                h->low[g] = tried.low[g];
            }
        }
}

/* Rows [from, to) of whole blocks: heads and codes of x f32[n, width], without feedback. importance f32[width], NULL for PLAIN. */
void EXPORT(doctor_ggml_fit)(int32_t type, int32_t mode, const float *x, const float *importance, int64_t width, int64_t from, int64_t to,
                             head *heads, u8 *codes)
{
    const kind *k = kind_of(type);
    const int64_t blocks = width / k->block;
    for (int64_t row = from; row < to; row++) {
        const float *own = x + row * width;
        const float mean = mode == WEIGHED && !k->nested ? square_sum(own, width) / (float)width : 0;
        for (int64_t b = 0; b < blocks; b++) {
            const float *at = own + b * k->block, *weights = importance ? importance + b * k->block : 0;
            head h = {0};
            u8 *code = codes + row * width + b * k->block;
            if (k->nested)
                fit_nested(k, at, weights, mode, &h, code);
            else
                fit_single(k, at, weights, mode, k->table ? 2 * square_sum(at, 32) / 32 : mean, &h, code);
            heads[row * blocks + b] = h;
        }
    }
}

/* A panel of columns: whole blocks, WIDEST at most. W, T and Q f32[n, width]: weights, weights with what earlier panels owe, and
 * what a reader computes. square f32[width, width]: while rounding, what an error in column i owes to column j > i; while
 * refining, the damped Hessian. cost f32[width]. heads[n, width / block], codes u8[n, width]. */
typedef struct {
    const float *W, *T, *square, *cost;
    float *Q;
    head *heads;
    u8 *codes;
    int64_t width;
    int32_t type;
} panel;

/* GPTQ's loop over the columns of a panel, in stored order. A block's scales are fitted when its first column comes up, a
 * sub-block's integer factors when its own does. */
void EXPORT(doctor_ggml_round)(const panel *p, int64_t from, int64_t to)
{
    const kind *k = kind_of(p->type);
    const int64_t width = p->width, blocks = width / k->block;
    for (int64_t row = from; row < to; row++) {
        float t[WIDEST];
        const float *W = p->W + row * width;
        float *Q = p->Q + row * width;
        u8 *code = p->codes + row * width;
        __builtin_memcpy(t, p->T + row * width, (size_t)width * 4);
        for (int64_t b = 0; b < blocks; b++) {
            head *h = p->heads + row * blocks + b;
            *h = (head){0};
            const int64_t begin = b * k->block;
            if (k->nested)
                fit_nested(k, t + begin, p->cost + begin, COST, h, code + begin);
            else
                fit_single(k, t + begin, p->cost + begin, COST, 0, h, code + begin);
            for (int g = 0; g < k->block / k->part; g++) {
                const int64_t first = begin + g * k->part;
                if (k->nested && g)
                    fit_part(k, t + first, p->cost + first, h, g);
                const float a = slope(k, h, g), c = base(k, h, g);
                for (int64_t j = first; j < first + k->part; j++) {
                    const float *owes = p->square + j * width;
                    code[j] = code_of(k, a, c, t[j], code[j]);
                    Q[j] = a * level_of(k, code[j]) + c;
                    const float off = W[j] - Q[j];
#pragma omp simd
                    for (int64_t later = j + 1; later < width; later++)
                        t[later] += off * owes[later];
                }
            }
        }
    }
}

/* A step of `change` along direction v over columns [first, first + n): E loses it, and so does what pulls. */
static void take_step(const panel *p, float *pull, float *Q, int64_t first, int n, const float *v, float change)
{
    for (int i = 0; i < n; i++) {
        const float moved = change * v[i];
        if (moved == 0)
            continue;
        const float *along = p->square + (first + i) * p->width;
        Q[first + i] += moved;
#pragma omp simd
        for (int64_t j = 0; j < p->width; j++)
            pull[j] -= moved * along[j];
    }
}

/* The step along v that takes off most of the loss: (v . pull) / (v H v). curve gets v H v, 0 where v leads nowhere. */
static float best_step(const panel *p, const float *pull, int64_t first, int n, const float *v, float *curve)
{
    float gain = 0, bend = 0;
    for (int i = 0; i < n; i++) {
        const float *along = p->square + (first + i) * p->width + first;
        float reach = 0;
#pragma omp simd reduction(+ : reach)
        for (int j = 0; j < n; j++)
            reach += along[j] * v[j];
        gain += v[i] * pull[first + i];
        bend += v[i] * reach;
    }
    *curve = bend;
    return bend > 0 ? gain / bend : 0;
}

/* Coordinate descent: each code to its best value given all others, then each scale of its sub-block to its best stored one.
 * T holds pull f32[n, width], (E H) of the panel's columns over all columns. No step raises the loss but by rounding. */
void EXPORT(doctor_ggml_refine)(const panel *p, int64_t from, int64_t to)
{
    const kind *k = kind_of(p->type);
    const int64_t width = p->width, blocks = width / k->block;
    for (int64_t row = from; row < to; row++) {
        float pull[WIDEST], v[32], curve;
        float *Q = p->Q + row * width;
        u8 *code = p->codes + row * width;
        __builtin_memcpy(pull, p->T + row * width, (size_t)width * 4);
        for (int64_t b = 0; b < blocks; b++)
            for (int g = 0; g < k->block / k->part; g++) {
                head *h = p->heads + row * blocks + b;
                const int64_t first = b * k->block + g * k->part;
                const float a = slope(k, h, g), c = base(k, h, g), one = 1;
                for (int64_t j = first; j < first + k->part; j++) {
                    const float stiff = p->square[j * width + j];
                    if (!(stiff > 0))
                        continue;
                    const u8 found = code_of(k, a, c, Q[j] + pull[j] / stiff, code[j]);
                    if (found == code[j])
                        continue;
                    const float value = a * level_of(k, found) + c;
                    take_step(p, pull, Q, j, 1, &one, value - Q[j]);
                    Q[j] = value;
                    code[j] = found;
                }
                /* the scale: an integer factor of d, or d itself */
                for (int i = 0; i < k->part; i++)
                    v[i] = (k->nested ? h->d : 1) * level_of(k, code[first + i]);
                float step = best_step(p, pull, first, k->part, v, &curve);
                if (k->nested) {
                    const int least = k->affine ? 0 : k->table ? -32 : -128, most = k->affine ? 63 : k->table ? 31 : 127;
                    const int now = h->scale[g], next = code_near((float)now + step, least, most);
                    const float change = (float)(next - now);
                    if (change != 0 && curve > 0 && change * (2 * step - change) > 0) {
                        h->scale[g] = (int8_t)next;
                        take_step(p, pull, Q, first, k->part, v, change);
                    }
                } else {
                    const float next = stored(h->d + step), change = next - h->d;
                    if (change != 0 && next != 0 && curve > 0 && change * (2 * step - change) > 0) {
                        h->d = next;
                        take_step(p, pull, Q, first, k->part, v, change);
                    }
                }
                if (!k->affine)
                    continue;
                for (int i = 0; i < k->part; i++)
                    v[i] = k->nested ? -h->m : 1;
                step = best_step(p, pull, first, k->part, v, &curve);
                const int now = h->low[g], next = code_near((float)now + step, 0, 63);
                const float free = stored(h->m + step), change = k->nested ? (float)(next - now) : free - h->m;
                if (change != 0 && curve > 0 && change * (2 * step - change) > 0) {
                    if (k->nested)
                        h->low[g] = (u8)next;
                    else
                        h->m = free;
                    take_step(p, pull, Q, first, k->part, v, change);
                }
            }
    }
}

/* What a reader computes of heads and codes: Q f32[n, width]. */
void EXPORT(doctor_ggml_values)(int32_t type, const head *heads, const u8 *codes, int64_t width, int64_t from, int64_t to, float *Q)
{
    const kind *k = kind_of(type);
    const int64_t blocks = width / k->block;
    for (int64_t row = from; row < to; row++)
        for (int64_t j = 0; j < width; j++) {
            const head *h = heads + row * blocks + j / k->block;
            const int g = (int)(j % k->block) / k->part;
            Q[row * width + j] = slope(k, h, g) * level_of(k, codes[row * width + j]) + base(k, h, g);
        }
}

static void put_half(u8 *to, float x)
{
    const uint16_t bits = half_of(x);
    __builtin_memcpy(to, &bits, 2);
}

/* low halves of the first `half` codes in a byte's low bits, of the next ones in its high bits. */
static void put_nibbles(u8 *to, const u8 *code, int half)
{
    for (int i = 0; i < half; i++)
        to[i] = (u8)((code[i] & 15) | code[i + half] << 4);
}

static void put_single(const kind *k, const head *h, const u8 *code, u8 *to)
{
    put_half(to, h->d);
    to += 2;
    if (k->affine) {
        put_half(to, h->m);
        to += 2;
    }
    if (k->type == Q8_0) {
        for (int i = 0; i < 32; i++)
            to[i] = (u8)(code[i] - 128);
        return;
    }
    if (k->top == 31) {
        uint32_t fifth = 0;
        for (int i = 0; i < 32; i++)
            fifth |= (uint32_t)(code[i] >> 4 & 1) << i;
        __builtin_memcpy(to, &fifth, 4);
        to += 4;
    }
    put_nibbles(to, code, 16);
}

static void put_affine_k(const kind *k, const head *h, const u8 *code, u8 *to)
{
    put_half(to, h->d);
    put_half(to + 2, h->m);
    to += 4;
    for (int g = 0; g < 4; g++) {    /* six bits of eight scales and eight minima in twelve bytes */
        const int s = h->scale[g + 4], m = h->low[g + 4];
        to[g] = (u8)(h->scale[g] | s >> 4 << 6);
        to[g + 4] = (u8)(h->low[g] | m >> 4 << 6);
        to[g + 8] = (u8)((s & 15) | (m & 15) << 4);
    }
    to += 12;
    if (k->top == 31) {
        for (int i = 0; i < 32; i++) {
            to[i] = 0;
            for (int g = 0; g < 8; g++)
                to[i] |= (u8)((code[g * 32 + i] >> 4 & 1) << g);
        }
        to += 32;
    }
    for (int g = 0; g < 8; g += 2)
        put_nibbles(to + g * 16, code + g * 32, 32);
}

static void put_q6_k(const head *h, const u8 *code, u8 *to)
{
    for (int half = 0; half < 2; half++, code += 128)
        for (int i = 0; i < 32; i++) {
            to[half * 64 + i] = (u8)((code[i] & 15) | (code[i + 64] & 15) << 4);
            to[half * 64 + 32 + i] = (u8)((code[i + 32] & 15) | (code[i + 96] & 15) << 4);
            to[128 + half * 32 + i] = (u8)(code[i] >> 4 | code[i + 32] >> 4 << 2 | code[i + 64] >> 4 << 4 | code[i + 96] >> 4 << 6);
        }
    __builtin_memcpy(to + 192, h->scale, 16);
    put_half(to + 208, h->d);
}

static void put_iq4_xs(const head *h, const u8 *code, u8 *to)
{
    uint16_t high = 0;
    put_half(to, h->d);
    for (int g = 0; g < 8; g++) {
        const int s = h->scale[g] + 32;
        high = (uint16_t)(high | (s >> 4) << 2 * g);
        to[4 + g / 2] = (u8)(g % 2 ? (to[4 + g / 2] & 15) | (s & 15) << 4 : s & 15);
        put_nibbles(to + 8 + g * 16, code + g * 32, 16);
    }
    __builtin_memcpy(to + 2, &high, 2);
}

/* The bytes of rows [from, to): out u8[n, width / block * bytes]. */
void EXPORT(doctor_ggml_pack)(int32_t type, const head *heads, const u8 *codes, int64_t width, int64_t from, int64_t to, u8 *out)
{
    const kind *k = kind_of(type);
    const int64_t blocks = width / k->block;
    for (int64_t at = from * blocks; at < to * blocks; at++) {
        u8 *place = out + at * k->bytes;
        const u8 *code = codes + at * k->block;
        if (!k->nested)
            put_single(k, heads + at, code, place);
        else if (k->affine)
            put_affine_k(k, heads + at, code, place);
        else if (k->table)
            put_iq4_xs(heads + at, code, place);
        else
            put_q6_k(heads + at, code, place);
    }
}
