/* Vectors of float32 as wide as the instruction level has them, for the quantizer's loops (solve.c, round.c). */
#ifndef DOCTOR_LANES_H
#define DOCTOR_LANES_H

#include "level.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef u8 bytes __attribute__((vector_size(LANES)));

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

static inline float sum_of(lanes x)
{
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
}

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

#endif
