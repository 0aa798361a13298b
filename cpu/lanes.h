/* Vectors of float32 as wide as the instruction level has them, for the quantizer's loops (solve.c, round.c). */
#ifndef DOCTOR_LANES_H
#define DOCTOR_LANES_H

#include "level.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef int64_t longs __attribute__((vector_size(4 * LANES)));
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

/* Codes of 4 bits, two a byte, the first in the low half. */
static inline void store_halves(u8 *to, integers codes)
{
    const longs pairs = (longs)codes | (longs)codes >> 28;
#if defined(__AVX512F__)
    const __m128i out = _mm512_cvtepi64_epi8((__m512i)pairs);
    _mm_storel_epi64((__m128i *)to, out);
#elif defined(__AVX2__)
    const __m128i first = _mm_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)pairs), first);
    const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)pairs, 1), first);
    const int out = _mm_cvtsi128_si32(_mm_unpacklo_epi16(low, high));
    __builtin_memcpy(to, &out, sizeof out);
#else
    to[0] = (u8)pairs[0];
    to[1] = (u8)pairs[1];
#endif
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

/* a > b ? a : b. */
static inline lanes larger(lanes a, lanes b)
{
#if defined(__AVX512F__)
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return -smaller(-a, -b);
#endif
}

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
