/* Statistics of raw tensor bytes at the speed memory reads: doctor/scan/counters.py's Stats, histograms, zero groups, absmax.
 *
 * Two speeds. Every 8 KiB block (it stays in the first-level cache) is read by two short loops: the largest code taken
 * as signed (the largest positive value), the largest taken as unsigned (the most negative one) and the least magnitude;
 * and float32 sums flushed to float64. Only a block whose bounds reach Inf, the fp16 overflow range or the small range
 * is read again by loops that count exactly.
 *
 * Integers, minimum and maximum are exact. The sums are float64 over float32 partial sums of 1024 values, and float64
 * throughout in what remains and where float32 squares could overflow or vanish.
 */
#include <errno.h>
#include <unistd.h>

#include "level.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

typedef struct {
    int64_t n_nan, n_inf, n_zero, n_subnormal, n_fp16_overflow, n_fp16_underflow;
    int64_t first_nonfinite;              /* index in this buffer, -1 if none */
    double absmax, min, max, sum, sumsq;  /* over finite values, 0 if none */
} scan_result;

/* PIECE_BYTES is a whole number of blocks, so that a read piece by piece counts and adds as one over a whole buffer does. */
enum { BLOCK_BYTES = 8192, SUM_RUN = 1024, PIECE_BYTES = 128 << 10 };

/* n bytes at offset, fewer only at the end of the file; -errno if reading fails. */
static int64_t read_fully(int fd, void *data, size_t n, int64_t offset)
{
    size_t done = 0;
    while (done < n) {
        ssize_t got = pread(fd, (char *)data + done, n - done, (off_t)(offset + (int64_t)done));
        if (got == 0)
            break;
        if (got < 0 && errno != EINTR)
            return -errno;
        done += got > 0 ? (size_t)got : 0;
    }
    return (int64_t)done;
}

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

/* Exact for finite codes, and free of float32 subnormals, which some processors handle by slow microcode: a subnormal
 * is read as 2^-14 * (1 + fraction), and 2^-14 is taken off again. */
static inline float float_of_f16(uint16_t code)
{
    uint32_t magnitude = (uint32_t)(code & 0x7fff) << 13;
    uint32_t subnormal = magnitude < 0x00800000u;
    float value = float_of(magnitude + 0x38000000u + (subnormal << 23)) - (subnormal ? 0x1p-14f : 0.0f);
    return code & 0x8000 ? -value : value;
}

/* Vectors of the level's width for the sums, where the order of additions is fixed by hand. */
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef double wide __attribute__((vector_size(8 * LANES)));

static inline words load_words(const void *address)
{
    words out;
    __builtin_memcpy(&out, address, sizeof out);
    return out;
}

/* load4_*: the next 4 * LANES values, in any order. Two bf16 share a word and need a shift and a mask, no widening. */
static inline void load4_bf16(const u16 *x, lanes v[4])
{
    words one = load_words(x), two = load_words(x + 2 * LANES);
    v[0] = (lanes)(one << 16);
    v[1] = (lanes)(one & 0xffff0000u);
    v[2] = (lanes)(two << 16);
    v[3] = (lanes)(two & 0xffff0000u);
}

static inline void load4_f32(const u32 *x, lanes v[4])
{
    for (int i = 0; i < 4; i++)
        v[i] = (lanes)load_words(x + i * LANES);
}

static inline void load4_f16(const u16 *x, lanes v[4])
{
    for (int i = 0; i < 4; i++, x += LANES) {
#if defined(__AVX512F__)
        v[i] = (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif defined(__F16C__)
        v[i] = (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#else
        halves codes;
        __builtin_memcpy(&codes, x, sizeof codes);
        words code = __builtin_convertvector(codes, words), magnitude = (code & 0x7fff) << 13;
        words subnormal = (words)(magnitude < 0x00800000u); /* as in float_of_f16, all ones where true */
        lanes value = (lanes)(magnitude + 0x38000000u + (subnormal & 0x00800000u)) - (lanes)(subnormal & 0x38800000u);
        v[i] = (lanes)((words)value | (code & 0x8000) << 16);
#endif
    }
}

/* Per dtype: CODE (element as it lies in memory), KEY and UKEY (integers of its width) and the magnitude codes of
 *   INF        Inf; larger ones are NaN
 *   OVERFLOW   the smallest value that fp16 rounds to Inf, 65520 or the next representable one above
 *   UNDERFLOW  the largest value that fp16 rounds to 0, 2^-25 (a tie, which goes to the even 0)
 *   NORMAL     the smallest normal value
 *   SUM_FLOOR  a block whose absmax is below it is summed in float64: float32 squares would vanish (2^-40)
 * and LOAD4, the vector load of the float32 sums; without it all sums are float64. */
#define TYPE bf16
#define CODE u16
#define KEY int16_t
#define UKEY uint16_t
#define INF 0x7f80
#define OVERFLOW 0x4780
#define UNDERFLOW 0x3300
#define NORMAL 0x0080
#define SUM_FLOOR 0x2b80
#define LOAD4 load4_bf16
#define VALUE(code) float_of_bf16(code)
#include "scan_type.h"

#define TYPE f16
#define CODE u16
#define KEY int16_t
#define UKEY uint16_t
#define INF 0x7c00
#define OVERFLOW 0x7c00
#define UNDERFLOW 0
#define NORMAL 0x0400
#define SUM_FLOOR 0
#define LOAD4 load4_f16
#define VALUE(code) float_of_f16(code)
#include "scan_type.h"

#define TYPE f32
#define CODE u32
#define KEY int32_t
#define UKEY uint32_t
#define INF 0x7f800000
#define OVERFLOW 0x477ff000
#define UNDERFLOW 0x33000000
#define NORMAL 0x00800000
#define SUM_FLOOR 0x2b800000
#define LOAD4 load4_f32
#define VALUE(code) float_of(code)
#include "scan_type.h"

#define TYPE f64
#define CODE u64
#define KEY int64_t
#define UKEY uint64_t
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
