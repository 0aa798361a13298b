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
};

extern "C" __global__ void __launch_bounds__(128) pack_stream(Stream s)
{
    const i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= s.lines)
        return;
    const u8 *codes = s.codes + line * s.line_stride;
    u32 *words = s.words + line * s.word_line_stride;
    for (i64 block = blockIdx.y; block * 32 < s.count; block += gridDim.y) {
        u64 open = 0;  // bits not yet written, lowest first
        int filled = 0;
        i64 word = block * s.bits;
        for (i64 e = block * 32; e < block * 32 + 32; e++) {
            open |= (u64)(e < s.count ? codes[e * s.code_stride] : 0) << filled;
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

// scale * (code - zero) of GPTQ and compressed-tensors. along_rows: neighbouring threads are neighbouring rows (GPTQ, where a
// word holds codes of one row and neighbouring words belong to neighbouring rows), else neighbouring columns.
extern "C" __global__ void __launch_bounds__(128) dequantize_stream(Packed p)
{
    const i64 fast = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (fast >= (p.along_rows ? p.n : p.k))
        return;
    for (i64 slow = blockIdx.y; slow < (p.along_rows ? p.k : p.n); slow += gridDim.y) {
        const i64 row = p.along_rows ? fast : slow, column = p.along_rows ? slow : fast;
        const i64 group = p.owner ? p.owner[column] : column / p.width;
        const int code = (int)field_of(p.words + row * p.word_line_stride, p.word_stride, column, p.bits);
        int zero = p.zero_offset;
        if (p.zeros)
            zero += (int)field_of(p.zeros + group * p.zero_line_stride, p.zero_stride, row, p.bits);
        const float scale = load_as_f32(p.scales, row * p.scale_row_stride + group * p.scale_group_stride, p.dtype);
        p.W[row * p.row_stride + column * p.column_stride] = value_of((float)code, scale, (float)zero);
    }
}
HOST_ENTRY(dequantize_stream)

// scale * (code - zero) of AWQ gemm: one thread unpacks the eight rows of a word.
extern "C" __global__ void __launch_bounds__(128) dequantize_awq(
    const u32 *words,    // u32[k, n / 8]
    const u32 *zeros,    // u32[k / width, n / 8]
    const void *scales,  // [k / width, n]
    float *W,            // f32[k, n]
    i64 n, i64 k, int width, int dtype)
{
    const i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= n / 8)
        return;
    for (i64 column = blockIdx.y; column < k; column += gridDim.y) {
        const i64 group = column / width;
        const u32 word = words[column * (n / 8) + j], zero = zeros[group * (n / 8) + j];
        for (int field = 0; field < 8; field++) {
            const i64 row = j * 8 + awq_row(field);
            const int level = (int)(word >> field * 4 & 15u) - (int)(zero >> field * 4 & 15u);
            W[column * n + row] = (float)level * load_as_f32(scales, group * n + row, dtype);
        }
    }
}
HOST_ENTRY(dequantize_awq)
