// The arithmetic of grids and codes, written once: doctor/quant/solve/grid.py says what each function means.
//
// Every function is a template over a lane type F that stands for one row of weights. `float` makes the CUDA kernels;
// a vector type makes SIMD code of the same source once it brings its own lane_* functions.
//
// Builds never contract a * b + c (--fmad=false, -ffp-contract=off): a fused operation stands here as lane_fma. So nvcc,
// NVRTC and g++ compute the same bits from this source, and what the host build proves holds on the device.
//
// No include: NVRTC has no headers of its own, and cuda_fp16.h would tie the source to one compiler.
#ifndef DOCTOR_CORE_CUH
#define DOCTOR_CORE_CUH

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define INLINE __device__ __forceinline__

// Shared memory is dynamic in every kernel, so that the host build can poison and bound it.
#ifndef SHARED_MEMORY
#define SHARED_MEMORY(T, name)                                   \
    extern __shared__ __align__(16) unsigned char doctor_shared[]; \
    T *name = reinterpret_cast<T *>(doctor_shared)
#endif
// Gives the host build an entry that takes its arguments as cuLaunchKernel does.
#ifndef HOST_ENTRY
#define HOST_ENTRY(kernel)
#endif

enum { F32 = 0, F16 = 1, BF16 = 2 };
enum { WARP = 32, RUN = 8 };  // RUN: neighbours that one thread takes at once where memory is the bound
#define ALL_LANES 0xffffffffu

// What a thread reads or writes at once where memory is the bound: with fewer bytes on their way, waiting is most of the time.
struct __align__(16) f32x4 {
    float v[4];
};
struct __align__(16) u32x4 {
    u32 v[4];
};
INLINE bool by_sixteen(const void *at) { return (reinterpret_cast<u64>(at) & 15u) == 0; }

// The arguments of grid.fit that are one for a whole tensor. doctor/quant/solve/kernels.py mirrors this struct.
struct Rule {
    float top;       // 2^bits - 1
    float half;      // 2^(bits - 1)
    float zero_min;  // 1 where the format stores zero - 1
    int sym;
    int turn;        // signed scales: a group whose largest weight is positive is turned round
    int mse;         // 0: min-max only
    int dtype;       // what scales are stored as: F32, F16, BF16
    int ratios;      // candidates[0 .. ratios): factors of the min-max scale
    int fine;        // candidates[ratios .. ratios + fine): steps around the best factor
    int refits;
};

INLINE float lane_round(float x) { return rintf(x); }                       // ties to even
INLINE float lane_fma(float a, float b, float c) { return fmaf(a, b, c); }
INLINE float lane_abs(float x) { return fabsf(x); }
INLINE float lane_min(float a, float b) { return fminf(a, b); }             // the other operand, where one is NaN
INLINE float lane_max(float a, float b) { return fmaxf(a, b); }
INLINE float lane_pick(bool yes, float a, float b) { return yes ? a : b; }

// 1 / x, nearest, for x well inside the normal range.
INLINE float lane_reciprocal(float x)
{
#ifdef __CUDA_ARCH__
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    r = fmaf(r, fmaf(-x, r, 1.0f), r);
    return fmaf(r, fmaf(-x, r, 1.0f), r);
#else
    return 1.0f / x;
#endif
}

INLINE float f32_of_bits(u32 bits) { return __uint_as_float(bits); }

// The nearest float16 (ties to even, Inf from 65520), as float32.
INLINE float lane_f16(float x)
{
#ifdef __CUDA_ARCH__
    float out;
    asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(out) : "f"(x));
    return out;
#else
    const u32 bits = __float_as_uint(x), sign = bits & 0x80000000u, size = bits ^ sign;
    if (size > 0x7f800000u)
        return x;
    if (size >= 0x477ff000u)
        return f32_of_bits(sign | 0x7f800000u);
    if (size < 0x38800000u)  // subnormal in float16: 0.5 has the units of 2^-24 that are wanted
        return f32_of_bits(sign | __float_as_uint((f32_of_bits(size) + 0.5f) - 0.5f));
    return f32_of_bits(sign | ((size + 0xfffu + (size >> 13 & 1u)) & ~0x1fffu));
#endif
}

INLINE float lane_bf16(float x)
{
    const u32 bits = __float_as_uint(x);
    return x == x ? f32_of_bits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u) : x;
}

INLINE float f32_of_f16(u16 code)
{
#ifdef __CUDA_ARCH__
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(code));
    return out;
#else
    const u32 sign = (u32)(code & 0x8000u) << 16, size = code & 0x7fffu;
    if (size >= 0x7c00u)
        return f32_of_bits(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    if (size < 0x400u)
        return f32_of_bits(sign | __float_as_uint((float)size * 5.9604644775390625e-8f));
    return f32_of_bits(sign | ((size << 13) + 0x38000000u));
#endif
}

// The code of an x that is exact in float16 (lane_f16 has been there), NaN as the quiet 0x7fff.
INLINE u16 f16_code(float x)
{
#ifdef __CUDA_ARCH__
    u16 code;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(code) : "f"(x));
    return code;
#else
    const u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u)
        return 0x7fffu;
    if (size == 0x7f800000u)
        return (u16)(sign | 0x7c00u);
    if (size < 0x38800000u)
        return (u16)(sign | (u32)(f32_of_bits(size) * 16777216.0f));
    return (u16)(sign | (size - 0x38000000u) >> 13);
#endif
}

// Two float16 sums at once. On the host each is a float32 sum rounded: that is exact, since float32 has more than twice the digits.
INLINE u32 add_f16x2(u32 a, u32 b)
{
#ifdef __CUDA_ARCH__
    u32 sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
#else
    const float low = f32_of_f16((u16)a) + f32_of_f16((u16)b), high = f32_of_f16((u16)(a >> 16)) + f32_of_f16((u16)(b >> 16));
    return f16_code(lane_f16(low)) | (u32)f16_code(lane_f16(high)) << 16;
#endif
}

INLINE float f32_of_code(u16 code, int dtype) { return dtype == F16 ? f32_of_f16(code) : f32_of_bits((u32)code << 16); }

INLINE float load_as_f32(const void *data, i64 index, int dtype)
{
    if (dtype == F32)
        return static_cast<const float *>(data)[index];
    return f32_of_code(static_cast<const u16 *>(data)[index], dtype);
}

// grid.store_scale: what a file can hold, never 0. Not lane_max: that would turn NaN into the least scale.
template <class F> INLINE F store_scale(F scale, int dtype)
{
    const float least = dtype == F16 ? 5.9604644775390625e-8f : dtype == BF16 ? 9.18354961579912e-41f : 1.401298464324817e-45f;
    const F stored = dtype == F16 ? lane_f16(scale) : dtype == BF16 ? lane_bf16(scale) : scale;
    return lane_pick(stored < least, F(least), stored);
}

INLINE float largest_of(int dtype)
{
    return dtype == F16 ? 65504.0f : dtype == BF16 ? 3.3895313892515355e38f : 3.4028234663852886e38f;
}

// a / b for many a and one b, in five operations and no subroutine (nvcc's own division calls one for extreme operands, and spills
// around the call). Correctly rounded where the quotient's bits can matter here: a product with the reciprocal, then one
// exact remainder (Markstein 1990). Powers of two keep the reciprocal and the remainder in range; quotients past 2^96
// may come out as Inf, which every caller clamps.
template <class F> struct Divisor {
    F b, reciprocal, factor;

    INLINE explicit Divisor(F by)
    {
        const F size = lane_abs(by);
        factor = lane_pick(size < 5.421010862427522e-20f, F(7.922816251426434e28f),  // below 2^-64: times 2^96
                           lane_pick(size > 1.8446744073709552e19f, F(1.262177448353619e-29f), F(1.0f)));
        b = by * factor;
        reciprocal = lane_reciprocal(b);
    }

    INLINE F under(F a) const
    {
        a = a * factor;
        const F q = a * reciprocal, corrected = lane_fma(lane_fma(-q, b, a), reciprocal, q);
        return lane_pick(lane_abs(q) < 7.922816251426434e28f, corrected, q);  // Inf and NaN stay what they are
    }
};

template <class F> INLINE F divide(F a, F b) { return Divisor<F>(b).under(a); }

template <class F> INLINE F clamp(F x, float low, float high) { return lane_min(lane_max(x, F(low)), F(high)); }

// grid.quantize. A NaN gets code 0, and shows in w - value_of(...).
template <class F> INLINE F code_of(F w, const Divisor<F> &scale, F zero, float top)
{
    return clamp(lane_round(scale.under(w)) + zero, 0.0f, top);
}

template <class F> INLINE F value_of(F code, F scale, F zero) { return (code - zero) * scale; }

// grid.fit of one group. `Group` gives its weights and their costs to one thread (count(), w(i), cost(i)) and joins what
// several threads found (sum, least, most): a warp that shares a group, or one thread that owns it.
//
// A group with a NaN or Inf gets the scale NaN: 0 * w is 0 for every finite w.
template <class F, class Group> struct Fit {
    const Group &group;
    const Rule &rule;
    F turn, scale, zero, error;

    INLINE Fit(const Group &group_, const Rule &rule_) : group(group_), rule(rule_), turn(1.0f) {}

    INLINE F w(int i) const { return group.w(i) * turn; }

    INLINE F error_of(F s, F z) const
    {
        const Divisor<F> by(s);
        F sum = 0.0f;
#pragma unroll
        for (int i = 0; i < group.count(); i++) {
            const F off = value_of(code_of(w(i), by, z, rule.top), s, z) - w(i);
            sum = sum + off * off * group.cost(i);
        }
        return group.sum(sum);
    }

    INLINE void consider(F s, F z)
    {
        s = store_scale(lane_min(s, F(largest_of(rule.dtype))), rule.dtype);
        const F e = error_of(s, z);
        scale = lane_pick(e < error, s, scale);
        zero = lane_pick(e < error, z, zero);
        error = lane_pick(e < error, e, error);
    }

    INLINE void refit()
    {
        const Divisor<F> by(scale);
        F norm = 0.0f, product = 0.0f;
#pragma unroll
        for (int i = 0; i < group.count(); i++) {
            const F level = code_of(w(i), by, zero, rule.top) - zero, weighted = level * group.cost(i);
            norm = norm + weighted * level;
            product = product + weighted * w(i);
        }
        norm = group.sum(norm);
        product = group.sum(product);
        const F best = divide(product, norm);
        consider(lane_pick(norm > 0.0f && best > 0.0f, best, scale), zero);
    }

    INLINE void run(const float *candidates)
    {
        F low = 0.0f, high = 0.0f, poison = 0.0f;
#pragma unroll
        for (int i = 0; i < group.count(); i++) {
            low = lane_min(low, group.w(i));
            high = lane_max(high, group.w(i));
            poison = poison + group.w(i) * 0.0f;
        }
        low = group.least(low);
        high = group.most(high);
        poison = group.sum(poison);
        if (rule.sym && rule.mse && rule.turn)
            turn = lane_pick(high > -low, F(-1.0f), F(1.0f));
        const F span = rule.sym ? lane_max(high, -low) : high - low;
        const F raw = divide(span, F(rule.sym ? rule.half - 0.5f : rule.top));
        const F first = store_scale(lane_pick(span > 0.0f, raw, F(1.0f)), rule.dtype);
        const F start = lane_pick(span > 0.0f && !rule.sym, clamp(lane_round(divide(-low, first)), rule.zero_min, rule.top),
                                  F(rule.half));
        scale = first;
        zero = start;
        if (rule.mse) {
            error = error_of(first, start);
            for (int i = 0; i < rule.ratios; i++)
                consider(first * candidates[i], start);
            for (int i = 0; i < rule.fine; i++)
                consider(scale + first * candidates[rule.ratios + i], zero);
            if (!rule.sym)
                for (int step = -1; step <= 1; step += 2)
                    consider(scale, clamp(zero + (float)step, rule.zero_min, rule.top));
            for (int i = 0; i < rule.refits; i++)
                refit();
            scale = lane_pick(span > 0.0f, scale, first);
            zero = lane_pick(span > 0.0f, zero, start);
        }
        scale = scale * turn + poison;
    }
};

// A group whose weights lie one stride apart, owned by one thread.
struct ThreadGroup {
    const float *first;
    i64 stride;
    const float *costs;  // nullptr: equal
    int width;

    INLINE int count() const { return width; }
    INLINE float w(int i) const { return first[i * stride]; }
    INLINE float cost(int i) const { return costs ? costs[i] : 1.0f; }
    INLINE float sum(float x) const { return x; }
    INLINE float least(float x) const { return x; }
    INLINE float most(float x) const { return x; }
};

INLINE float warp_sum(float x)
{
    for (int lane = WARP / 2; lane; lane >>= 1)
        x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

INLINE float warp_least(float x)
{
    for (int lane = WARP / 2; lane; lane >>= 1)
        x = lane_min(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

INLINE float warp_most(float x) { return -warp_least(-x); }

// A group of neighbours shared by a warp: EACH weights a lane, 32 apart, filled up with zeros. A zero costs nothing on
// any grid, and bounds count 0 in any case.
template <int EACH> struct WarpGroup {
    float weights[EACH], costs[EACH];

    INLINE int count() const { return EACH; }
    INLINE float w(int i) const { return weights[i]; }
    INLINE float cost(int i) const { return costs[i]; }
    INLINE float sum(float x) const { return warp_sum(x); }
    INLINE float least(float x) const { return warp_least(x); }
    INLINE float most(float x) const { return warp_most(x); }
};

// The same of any width, read again for each candidate.
struct WideWarpGroup {
    const float *weights, *costs;  // costs nullptr: equal
    int width, lane;

    INLINE int count() const { return (width - lane + WARP - 1) / WARP; }
    INLINE float w(int i) const { return weights[lane + i * WARP]; }
    INLINE float cost(int i) const { return costs ? costs[lane + i * WARP] : 1.0f; }
    INLINE float sum(float x) const { return warp_sum(x); }
    INLINE float least(float x) const { return warp_least(x); }
    INLINE float most(float x) const { return warp_most(x); }
};

#endif
