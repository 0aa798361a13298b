/* Statistics of raw tensor bytes at the speed memory reads: doctor/stats.py's Stats, histograms, zero groups, absmax.
 *
 * Two speeds. Every 8 KiB block (it stays in the first-level cache) is read by two short loops: the largest and
 * smallest *key* with a count of small magnitudes, and float32 sums flushed to float64. A key is the code with negative
 * values bit-flipped, so that keys order as the values do and one signed maximum and minimum bound everything. Only a
 * block whose bounds reach Inf, the fp16 overflow range or the small range is read again by a loop that counts exactly.
 *
 * Integers, minimum and maximum are exact. The sums are float64 over float32 partial sums of 1024 values, and float64
 * throughout in what remains and where float32 squares could overflow or vanish.
 */
#include "level.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

typedef struct {
    int64_t n_nan, n_inf, n_zero, n_subnormal, n_fp16_overflow, n_fp16_underflow;
    int64_t first_nonfinite;              /* index in this buffer, -1 if none */
    double absmax, min, max, sum, sumsq;  /* over finite values, 0 if none */
} scan_result;

enum { BLOCK_BYTES = 8192, SUM_RUN = 1024 };

static inline float float_of(uint32_t bits)
{
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

static inline double double_of(uint64_t bits)
{
    double value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_bf16(uint16_t code)
{
    return float_of((uint32_t)code << 16);
}

/* Exact for finite codes, and free of float32 subnormals, which some processors handle by slow microcode. */
static inline float float_of_f16(uint16_t code)
{
    uint32_t magnitude = (uint32_t)(code & 0x7fff) << 13;
    uint32_t subnormal = magnitude < 0x00800000u;
    float value = float_of(magnitude + 0x38000000u + (subnormal << 23)) - (subnormal ? 0x1p-14f : 0.0f);
    return code & 0x8000 ? -value : value;
}

/* The sums of SUM_RUN values below the fp16 overflow limit, in float32. The run is read as several streams side by
 * side: one accumulator alone waits four cycles for each of its additions (AVX2: 27 against 45 GB/s in cache). */
static void run_bf16(const u16 *x, double *sum, double *sumsq)
{
    enum { QUARTER = SUM_RUN / 4 };
    const u32 *pairs = (const u32 *)x;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, q0, q1, q2, q3)
    for (int i = 0; i < QUARTER; i++) {
        uint32_t one = pairs[i], two = pairs[QUARTER + i];
        float a = float_of(one << 16), b = float_of(one & 0xffff0000u);
        float c = float_of(two << 16), d = float_of(two & 0xffff0000u);
        s0 += a, s1 += b, s2 += c, s3 += d;
        q0 += a * a, q1 += b * b, q2 += c * c, q3 += d * d;
    }
    *sum += ((double)s0 + s1) + ((double)s2 + s3);
    *sumsq += ((double)q0 + q1) + ((double)q2 + q3);
}

static void run_f32(const u32 *x, double *sum, double *sumsq)
{
    enum { QUARTER = SUM_RUN / 4 };
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, q0, q1, q2, q3)
    for (int i = 0; i < QUARTER; i++) {
        float a = float_of(x[i]), b = float_of(x[QUARTER + i]);
        float c = float_of(x[2 * QUARTER + i]), d = float_of(x[3 * QUARTER + i]);
        s0 += a, s1 += b, s2 += c, s3 += d;
        q0 += a * a, q1 += b * b, q2 += c * c, q3 += d * d;
    }
    *sum += ((double)s0 + s1) + ((double)s2 + s3);
    *sumsq += ((double)q0 + q1) + ((double)q2 + q3);
}

static void run_f16(const u16 *x, double *sum, double *sumsq)
{
    float s0 = 0, s1 = 0, q0 = 0, q1 = 0;
#if defined(__AVX512F__)
    __m512 vs0 = _mm512_setzero_ps(), vq0 = vs0, vs1 = vs0, vq1 = vs0;
    for (int i = 0; i < SUM_RUN; i += 32) {
        __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i)));
        __m512 b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + i + 16)));
        vs0 = _mm512_add_ps(vs0, a);
        vs1 = _mm512_add_ps(vs1, b);
        vq0 = _mm512_fmadd_ps(a, a, vq0);
        vq1 = _mm512_fmadd_ps(b, b, vq1);
    }
    s0 = _mm512_reduce_add_ps(vs0), s1 = _mm512_reduce_add_ps(vs1);
    q0 = _mm512_reduce_add_ps(vq0), q1 = _mm512_reduce_add_ps(vq1);
#elif defined(__F16C__)
    float lanes[4][8];
    __m256 vs0 = _mm256_setzero_ps(), vq0 = vs0, vs1 = vs0, vq1 = vs0;
    for (int i = 0; i < SUM_RUN; i += 16) {
        __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i)));
        __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i + 8)));
        vs0 = _mm256_add_ps(vs0, a);
        vs1 = _mm256_add_ps(vs1, b);
        vq0 = _mm256_fmadd_ps(a, a, vq0);
        vq1 = _mm256_fmadd_ps(b, b, vq1);
    }
    _mm256_storeu_ps(lanes[0], vs0), _mm256_storeu_ps(lanes[1], vs1);
    _mm256_storeu_ps(lanes[2], vq0), _mm256_storeu_ps(lanes[3], vq1);
    for (int lane = 0; lane < 8; lane++) {
        s0 += lanes[0][lane], s1 += lanes[1][lane];
        q0 += lanes[2][lane], q1 += lanes[3][lane];
    }
#else
    enum { HALF = SUM_RUN / 2 };
#pragma omp simd reduction(+ : s0, s1, q0, q1)
    for (int i = 0; i < HALF; i++) {
        float a = float_of_f16(x[i]), b = float_of_f16(x[HALF + i]);
        s0 += a, s1 += b;
        q0 += a * a, q1 += b * b;
    }
#endif
    *sum += (double)s0 + s1;
    *sumsq += (double)q0 + q1;
}

/* Per dtype: CODE (element type), KEY (signed type of its width) and the magnitude codes of
 *   INF        Inf; larger ones are NaN
 *   OVERFLOW   the smallest value that fp16 rounds to Inf, 65520 or the next representable one above
 *   UNDERFLOW  the largest value that fp16 rounds to 0, 2^-25 (a tie, which goes to the even 0)
 *   NORMAL     the smallest normal value
 *   SUM_FLOOR  a block whose absmax is below it is summed in float64: float32 squares would vanish (2^-40)
 * and RUN, the float32 sums; without it all sums are float64. */
#define TYPE bf16
#define CODE u16
#define KEY int16_t
#define INF 0x7f80
#define OVERFLOW 0x4780
#define UNDERFLOW 0x3300
#define NORMAL 0x0080
#define SUM_FLOOR 0x2b80
#define RUN run_bf16
#define VALUE(code) float_of_bf16(code)
#include "scan_type.h"

#define TYPE f16
#define CODE u16
#define KEY int16_t
#define INF 0x7c00
#define OVERFLOW 0x7c00
#define UNDERFLOW 0
#define NORMAL 0x0400
#define SUM_FLOOR 0
#define RUN run_f16
#define VALUE(code) float_of_f16(code)
#include "scan_type.h"

#define TYPE f32
#define CODE u32
#define KEY int32_t
#define INF 0x7f800000
#define OVERFLOW 0x477ff000
#define UNDERFLOW 0x33000000
#define NORMAL 0x00800000
#define SUM_FLOOR 0x2b800000
#define RUN run_f32
#define VALUE(code) float_of(code)
#include "scan_type.h"

#define TYPE f64
#define CODE u64
#define KEY int64_t
#define INF 0x7ff0000000000000
#define OVERFLOW 0x40effe0000000000
#define UNDERFLOW 0x3e60000000000000
#define NORMAL 0x0010000000000000
#define SUM_FLOOR 0
#define VALUE(code) double_of(code)
#include "scan_type.h"

/* counts i64[2][65536] += how often each 16-bit code occurs at even and at odd places of x[n]. Two tables, so that a run
 * of equal codes is not one chain of store-to-load forwards. */
void EXPORT(doctor_hist16)(const void *data, int64_t n, int64_t *counts)
{
    const u16 *x = data;
    int64_t *odd = counts + 65536;
    for (int64_t i = 0; i + 2 <= n; i += 2) {
        counts[x[i]]++;
        odd[x[i + 1]]++;
    }
    if (n % 2)
        counts[x[n - 1]]++;
}

/* counts i64[256] += how often each byte occurs in x[n]; four tables for the same reason. */
void EXPORT(doctor_hist8)(const void *data, int64_t n, int64_t *counts)
{
    int64_t part[4][256] = {{0}};
    const u8 *x = data;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word = *(const u64 *)(x + i);
        for (int b = 0; b < 8; b++)
            part[b % 4][(word >> (8 * b)) & 0xff]++;
    }
    for (; i < n; i++)
        part[0][x[i]]++;
    for (int c = 0; c < 256; c++)
        counts[c] += part[0][c] + part[1][c] + part[2][c] + part[3][c];
}
