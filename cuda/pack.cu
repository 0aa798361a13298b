// Codes to the int32 words that engines read, and words to weights. doctor/quant/pack.py says what the formats are: along one
// axis codes are a little-endian bit stream, code e in bits [e * bits, e * bits + bits); AWQ orders the eight codes of
// a word its own way. All four kernels are bound by memory;
// their grids' second direction wraps round, since it ends at 65535 blocks.
#include "core.cuh"

// One thread packs 32 codes into `bits` words. Code e of line l stands at codes[l * line_stride + e * code_stride], word v of
// line l at words[l * word_line_stride + v * word_stride]: GPTQ's columns and compressed-tensors' rows differ in strides alone.
struct Stream {
    const u8 *codes;
    u32 *words;
    i64 lines, count, height;  // streams, codes in each, words in each = ceil(count * bits / 32)
    i64 line_stride, code_stride, word_line_stride, word_stride;
    int bits;
    int along_codes;  // neighbouring threads take neighbouring codes of a line, else neighbouring lines
};

extern "C" __global__ void __launch_bounds__(128) pack_stream(Stream s)
{
    const i64 fast = (i64)blockIdx.x * blockDim.x + threadIdx.x, blocks = (s.count + 31) / 32;
    if (fast >= (s.along_codes ? blocks : s.lines))
        return;
    for (i64 slow = blockIdx.y; slow < (s.along_codes ? s.lines : blocks); slow += gridDim.y) {
        const i64 line = s.along_codes ? slow : fast, block = s.along_codes ? fast : slow;
        const u8 *codes = s.codes + line * s.line_stride + block * 32 * s.code_stride;
        const int count = s.count - block * 32 < 32 ? (int)(s.count - block * 32) : 32;
        u32 *words = s.words + line * s.word_line_stride;
        u32 four[8] = {0, 0, 0, 0, 0, 0, 0, 0};  // the 32 codes, all asked for before the first is used
        if (s.code_stride == 1 && count == 32 && by_sixteen(codes)) {
            for (int half = 0; half < 2; half++) {
                const u32x4 sixteen = reinterpret_cast<const u32x4 *>(codes)[half];
                for (int i = 0; i < 4; i++)
                    four[half * 4 + i] = sixteen.v[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 32; i++, codes += s.code_stride)
                four[i / 4] |= (u32)(i < count ? *codes : 0) << i % 4 * 8;
        }
        u64 open = 0;  // bits not yet written, lowest first
        int filled = 0;
        i64 word = block * s.bits;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            open |= (u64)(four[i / 4] >> i % 4 * 8 & 255u) << filled;
            filled += s.bits;
            if (filled >= 32) {
                if (word < s.height)
                    words[word * s.word_stride] = (u32)open;
                word++;
                open >>= 32;
                filled -= 32;
            }
        }
    }
}
HOST_ENTRY(pack_stream)

// AWQ gemm: word j of column c holds rows 8 j .. 8 j + 7, in the order 0 2 4 6 1 3 5 7 from the lowest field.
INLINE int awq_row(int field) { return field < 4 ? field * 2 : field * 2 - 7; }

extern "C" __global__ void __launch_bounds__(128) pack_awq(
    const u8 *codes,  // code of row r, column c at codes[r * row_stride + c * column_stride]
    u32 *words,       // u32[columns, width]
    i64 columns, i64 width, i64 row_stride, i64 column_stride)
{
    const i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= width)
        return;
    for (i64 column = blockIdx.y; column < columns; column += gridDim.y) {
        u32 word = 0;
        for (int field = 0; field < 8; field++)
            word |= (u32)codes[(j * 8 + awq_row(field)) * row_stride + column * column_stride] << field * 4;
        words[column * width + j] = word;
    }
}
HOST_ENTRY(pack_awq)

// Field `index` of a bit stream whose words lie `stride` apart.
INLINE u32 field_of(const u32 *words, i64 stride, i64 index, int bits)
{
    const i64 bit = index * bits, word = bit / 32;
    const int shift = (int)(bit % 32);
    u32 value = words[word * stride] >> shift;
    if (shift + bits > 32)
        value |= words[(word + 1) * stride] << (32 - shift);
    return value & ((1u << bits) - 1u);
}

struct Packed {
    const u32 *words;    // of the codes
    const u32 *zeros;    // of the zero points; nullptr: every zero point is zero_offset
    const void *scales;
    const int *owner;    // i32[k], the group of each column; nullptr: runs of `width`
    float *W;            // out f32
    i64 n, k, groups;
    i64 word_line_stride, word_stride;  // word v of row r at words[r * word_line_stride + v * word_stride]
    i64 zero_line_stride, zero_stride;  // zero points run along n in group g: word v at zeros[g * zero_line_stride + v * zero_stride]
    i64 scale_row_stride, scale_group_stride;
    i64 row_stride, column_stride;      // of W
    int bits, zero_offset, dtype, width, along_rows;
};

// scale * (code - zero) of GPTQ and compressed-tensors: one thread makes RUN neighbouring columns of a row, which are one word or two.
// along_rows: neighbouring threads are neighbouring rows (GPTQ, where a word holds codes of one row and neighbouring words belong to
// neighbouring rows), else they are neighbouring columns.
extern "C" __global__ void __launch_bounds__(128) dequantize_stream(Packed p)
{
    const i64 fast = (i64)blockIdx.x * blockDim.x + threadIdx.x, runs = (p.k + RUN - 1) / RUN;
    if (fast >= (p.along_rows ? p.n : runs))
        return;
    for (i64 slow = blockIdx.y; slow < (p.along_rows ? runs : p.n); slow += gridDim.y) {
        const i64 row = p.along_rows ? fast : slow, first = (p.along_rows ? slow : fast) * RUN, bit = first * p.bits;
        const int count = p.k - first < RUN ? (int)(p.k - first) : (int)RUN, shift = (int)(bit % 32);
        const u32 *words = p.words + row * p.word_line_stride + bit / 32 * p.word_stride;
        u64 open = words[0];
        if (shift + count * p.bits > 32)
            open |= (u64)words[p.word_stride] << 32;
        open >>= shift;
        i64 group = 0, next = 0;  // next: where a run of `width` ends
        float scale = 0.0f, zero = 0.0f, values[RUN];
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            values[i] = 0.0f;
            if (i >= count)
                continue;
            bool fresh = i == 0;
            if (p.owner) {
                const int owner = p.owner[first + i];
                fresh = fresh || owner != group;
                group = owner;
            } else if (fresh || first + i == next) {
                group = fresh ? (u32)first / (u32)p.width : group + 1;
                next = (group + 1) * p.width;
                fresh = true;
            }
            if (fresh) {
                zero = (float)(p.zero_offset + (p.zeros ? (int)field_of(p.zeros + group * p.zero_line_stride, p.zero_stride, row, p.bits) : 0));
                scale = load_as_f32(p.scales, row * p.scale_row_stride + group * p.scale_group_stride, p.dtype);
            }
            values[i] = value_of((float)((u32)open & ((1u << p.bits) - 1u)), scale, zero);
            open >>= p.bits;
        }
        float *W = p.W + row * p.row_stride + first * p.column_stride;
        if (p.column_stride == 1 && count == RUN && by_sixteen(W)) {
            for (int half = 0; half < 2; half++)
                reinterpret_cast<f32x4 *>(W)[half] = {{values[half * 4], values[half * 4 + 1], values[half * 4 + 2], values[half * 4 + 3]}};
        } else {
#pragma unroll
            for (int i = 0; i < RUN; i++)
                if (i < count)
                    W[i * p.column_stride] = values[i];
        }
    }
}
HOST_ENTRY(dequantize_stream)

// scale * (code - zero) of AWQ gemm: one thread unpacks the eight rows of a word.
extern "C" __global__ void __launch_bounds__(128) dequantize_awq(
    const u32 *words,    // u32[k, n / 8]
    const u32 *zeros,    // u32[k / width, n / 8]
    const void *scales,  // [k / width, n]
    float *W,            // f32[k, n], 16 bytes aligned
    i64 n, i64 k, int width, int dtype)
{
    const i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n / 8)
        return;
    for (i64 column = blockIdx.y; column < k; column += gridDim.y) {
        const i64 group = (u32)column / (u32)width, at = group * n + j * 8;
        const u32 word = words[column * (n / 8) + j], zero = zeros[group * (n / 8) + j];
        float values[8];
        if (dtype != F32 && by_sixteen(static_cast<const u16 *>(scales) + at)) {
            const u32x4 eight = *reinterpret_cast<const u32x4 *>(static_cast<const u16 *>(scales) + at);
#pragma unroll
            for (int i = 0; i < 8; i++)
                values[i] = f32_of_code((u16)(eight.v[i / 2] >> i % 2 * 16), dtype);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                values[i] = load_as_f32(scales, at + i, dtype);
        }
#pragma unroll
        for (int field = 0; field < 8; field++)
            values[awq_row(field)] *= (float)((int)(word >> field * 4 & 15u) - (int)(zero >> field * 4 & 15u));
        f32x4 *out = reinterpret_cast<f32x4 *>(W + column * n + j * 8);
        for (int half = 0; half < 2; half++)
            out[half] = {{values[half * 4], values[half * 4 + 1], values[half * 4 + 2], values[half * 4 + 3]}};
    }
}
HOST_ENTRY(dequantize_awq)
