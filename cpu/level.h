/* What every source that is compiled once per instruction level shares: the symbol suffix and unaligned element types.
 *
 * LEVEL is set by the build (base, avx2, avx512). Loops are plain C marked `omp simd` (-fopenmp-simd, no OpenMP run
 * time): that permits reordering one reduction in one loop, where a fast-math build would also assume away NaN.
 */
#ifndef DOCTOR_LEVEL_H
#define DOCTOR_LEVEL_H

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors data is little-endian; this library reads it in place"
#endif

#ifndef LEVEL
#define LEVEL base
#endif
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define EXPORT(name) JOIN(name, LEVEL)

/* A shard's header may have any length, so elements lie at any address. */
typedef uint8_t u8;
typedef uint16_t u16 __attribute__((aligned(1), may_alias));
typedef uint32_t u32 __attribute__((aligned(1), may_alias));
typedef uint64_t u64 __attribute__((aligned(1), may_alias));

/* Vectors of float32 as wide as the instruction level has them. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));

#endif
