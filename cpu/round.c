/* Rounding to nearest without calibration, at the pace of memory: the largest weight of each group, then codes under scales that
 * the caller chose from those (doctor/quant/stream/rounding.py is the definition). Weights are read as they are stored, bfloat16 or
 * float32, and each is read twice while it lies in the cache.
 *
 * Built without contraction, as solve.c is: a weight is divided by its scale and rounded once, so that codes are those of torch and
 * of compressed-tensors. No NaN and no Inf come here: the caller looks at the largest weights first.
 */
#include "lanes.h"

enum { BF16 = 2 };
enum { E4M3 = 0, INT8 = 1, E2M1 = 2 };
enum { RUN = 128 };   /* weights that are widened together */

/* `count` weights from `at` as float32. */
static inline void widen(float *to, const void *from, int64_t at, int64_t count, int dtype)
{
    if (dtype == BF16) {
        const uint16_t *codes = (const uint16_t *)from + at;
        for (int64_t i = 0; i < count; i++)
            to[i] = float_of((uint32_t)codes[i] << 16);
    } else
        __builtin_memcpy(to, (const float *)from + at, (size_t)count * 4);
}

static inline __attribute__((always_inline)) float largest_of(const void *W, int dtype, int64_t at, int64_t width)
{
    if (dtype == BF16) {
        const uint16_t *codes = (const uint16_t *)W + at;
        uint16_t most = 0;
        for (int64_t i = 0; i < width; i++) {
            const uint16_t size = codes[i] & 0x7fff;
            most = size > most ? size : most;
        }
        return float_of((uint32_t)most << 16);
    }
    const uint32_t *codes = (const uint32_t *)W + at;
    uint32_t most = 0;
    for (int64_t i = 0; i < width; i++) {
        const uint32_t size = codes[i] & 0x7fffffffu;
        most = size > most ? size : most;
    }
    return float_of(most);
}

/* span f32[n, k / width]: the largest |w| of each group of W[n, k]; NaN or Inf where a weight is. width divides k. */
void EXPORT(doctor_group_span)(const void *W, int dtype, int64_t n, int64_t k, int64_t width, float *span)
{
    const int64_t groups = n * (k / width);
    if (width == 16)
        for (int64_t group = 0; group < groups; group++)
            span[group] = largest_of(W, dtype, group * 16, 16);
    else if (width == 32)
        for (int64_t group = 0; group < groups; group++)
            span[group] = largest_of(W, dtype, group * 32, 32);
    else
        for (int64_t group = 0; group < groups; group++)
            span[group] = largest_of(W, dtype, group * width, width);
}

/* Codes of x = w / scale as whole numbers, and in `value` what they stand for. Ties go to the even code. */
static inline integers e4m3_of(lanes x, lanes *value)
{
    const integers sign = (integers)x & (int32_t)0x80000000;
    const lanes top = smaller((lanes)((integers)x & 0x7fffffff), all(448.0f)), magic = all(0x1.8p14f);
    const integers normal = top >= all(0x1p-6f), bits = (integers)top;
    const lanes small = (top + magic) - magic;                               /* multiples of 2^-9 */
    const integers even = (bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffff;
    const integers tiny = __builtin_convertvector(small * all(512.0f), integers);
    *value = (lanes)((((integers)small & ~normal) | (even & normal)) | sign);
    return (((even >> 20) - 960) & normal) | (tiny & ~normal) | (sign >> 24 & 0x80);
}

static inline integers int8_of(lanes x, lanes *value)
{
    const lanes magic = all(0x1.8p23f);
    *value = (larger(smaller(x, all(127.0f)), all(-128.0f)) + magic) - magic;
    return __builtin_convertvector(*value, integers) & 0xff;
}

/* |x| rounded to what 4-bit floats hold. Adding 1.5 * 2^p rounds to multiples of 2^(p - 23): of 1/2 below 2, of 1 below 4, of 2 up
 * to 6, so p is 22 above the exponent of what is rounded, or of 1.
 */
static inline lanes e2m1_size(lanes size)
{
    const lanes top = smaller(size, all(6.0f));
    const lanes magic = (lanes)(((integers)larger(top, all(1.0f)) & 0x7f800000) + (22 << 23 | 0x400000));
    return (top + magic) - magic;
}

/* Codes of such sizes, with the signs of w but for 0. From 1 on a code is exponent and first bit of the fraction. */
static inline integers e2m1_codes(lanes size, lanes w)
{
    const integers high = (integers)larger(size, all(0.5f)), half = size == all(0.5f), some = size > all(0.0f);
    return ((high >> 22) - 252 - half) | ((integers)w >> 28 & 8 & some);
}

/* Codes i32[count] of 8 bits and squared errors, in lanes, of w f32[count] under one scale; count a multiple of LANES. */
static inline __attribute__((always_inline)) lanes round_under(const float *w, int64_t count, int levels, float scale, int32_t *codes)
{
    const lanes s = all(scale);
    lanes sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const lanes x = load(w + i, LANES);
        lanes value;
        const integers code = levels == E4M3 ? e4m3_of(x / s, &value) : int8_of(x / s, &value);
        const lanes off = value * s - x;
        sum += off * off;
        __builtin_memcpy(codes + i, &code, sizeof code);
    }
    return sum;
}

/* The sum of all lanes, in pairs: additions that do not wait for each other. */
static inline float total(lanes x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

/* w f32[RUN] of `count` weights, zeros up to a multiple of LANES, which is returned; their squares are added to whole. */
static inline __attribute__((always_inline)) int64_t take(float *w, const void *W, int dtype, int64_t at, int64_t count, lanes *whole)
{
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    widen(w, W, at, count, dtype);
    for (int64_t i = count; i < padded; i++)
        w[i] = 0.0f;
    for (int64_t i = 0; i < padded; i += LANES)
        *whole += load(w + i, LANES) * load(w + i, LANES);
    return padded;
}

/* One run of up to RUN weights under one scale. off, whole: squared errors and squared weights so far, in lanes. */
static inline __attribute__((always_inline)) void round_run(const void *W, int dtype, int64_t at, int64_t count, int levels, float scale,
                                                            u8 *out, lanes *off, lanes *whole)
{
    float w[RUN];
    int32_t codes[RUN];
    const int64_t padded = take(w, W, dtype, at, count, whole);
    *off += round_under(w, padded, levels, scale, codes);
    for (int64_t i = 0; i < count; i++)
        out[at + i] = (u8)codes[i];
}

/* Sizes on the grid of 4-bit floats, in lanes, of w f32[count] under one scale, and their squared errors. */
static inline __attribute__((always_inline)) lanes size_under(const float *w, int64_t count, float scale, lanes *size)
{
    const lanes s = all(scale);
    lanes sum = {0};
    for (int64_t i = 0; i < count / LANES; i++) {
        const lanes x = (lanes)((integers)load(w + i * LANES, LANES) & 0x7fffffff);
        size[i] = e2m1_size(x / s);
        const lanes off = size[i] * s - x;
        sum += off * off;
    }
    return sum;
}

/* b where yes is -1, a where it is 0. */
static inline lanes chosen(integers yes, lanes a, lanes b)
{
    return (lanes)(((integers)b & yes) | ((integers)a & ~yes));
}

/* One group of 4-bit floats, `count` a multiple of 16, under the one of others + 1 scales that leaves the least error, which is put
 * into scale. Which is better is as often one as the other, so there are no branches.
 */
static inline __attribute__((always_inline)) void round_fp4(const void *W, int dtype, int64_t at, int64_t count, float *scale,
                                                            const float *more, int64_t stride, int64_t others, u8 *out, lanes *off,
                                                            lanes *whole)
{
    float w[RUN], best = *scale;
    lanes size[RUN / LANES], second[RUN / LANES];
    take(w, W, dtype, at, count, whole);
    lanes least = size_under(w, count, best, size);
    for (int64_t other = 0; other < others; other++) {
        const float candidate = more[other * stride];
        const lanes error = size_under(w, count, candidate, second);
        const int less = total(error) < total(least);
        const integers yes = (integers){0} - less;
        for (int64_t i = 0; i < count / LANES; i++)
            size[i] = chosen(yes, size[i], second[i]);
        least = chosen(yes, least, error);
        best = less ? candidate : best;
    }
    *scale = best;
    *off += least;
    for (int64_t i = 0; i < count / LANES; i++)
        store_halves(out + (at + i * LANES) / 2, e2m1_codes(size[i], load(w + i * LANES, LANES)));
}

/* Codes of W[n, k] under scales f32[n, k / width]; width a multiple of 16 or k. levels: E4M3 and INT8 make u8[n, k], E2M1
 * u8[n, k / 2], the even column in the low half. more f32[others, n, k / width]: other scales to try for E2M1, the one of least
 * squared error is taken and put into scale; its widths end at RUN. sums f64[2] grow by the squared errors and the squared weights. */
void EXPORT(doctor_round_groups)(const void *W, int dtype, int64_t n, int64_t k, int64_t width, int levels, float *scale,
                                 const float *more, int64_t others, u8 *out, double *sums)
{
    const int64_t groups = k / width, stride = n * groups;
    for (int64_t row = 0; row < n; row++) {
        lanes off = {0}, whole = {0};
        for (int64_t g = 0; g < groups; g++) {
            const int64_t here = row * groups + g, at = row * k + g * width;
            /* The sizes that formats have stand here as numbers, so that their loops are unrolled. */
            if (levels == E2M1 && width == 16 && others == 1)
                round_fp4(W, dtype, at, 16, scale + here, more + here, stride, 1, out, &off, &whole);
            else if (levels == E2M1 && width == 32 && !others)
                round_fp4(W, dtype, at, 32, scale + here, more, stride, 0, out, &off, &whole);
            else if (levels == E2M1)   /* one of more than RUN has no others to try */
                for (int64_t from = 0; from < width; from += RUN)
                    round_fp4(W, dtype, at + from, width - from < RUN ? width - from : RUN, scale + here, more + (others ? here : 0), stride,
                              others, out, &off, &whole);
            else if (levels == E4M3 && width == 32)
                round_run(W, dtype, at, 32, E4M3, scale[here], out, &off, &whole);
            else
                for (int64_t from = 0; from < width; from += RUN)
                    round_run(W, dtype, at + from, width - from < RUN ? width - from : RUN, levels, scale[here], out, &off, &whole);
        }
        sums[0] += total(off);
        sums[1] += total(whole);
    }
}
