"""The formats' packers, one call each, for tests that compare them with kernels and with other programs' words."""

import doctor.quant.pack  # noqa: F401 - hands the CUDA kernels to the formats
from doctor.core.recipe import Scheme
from doctor.formats.awq import pack_fields as awq_words  # noqa: F401
from doctor.formats.bits import pack_columns, pack_rows, unpack_columns, unpack_rows  # noqa: F401
from doctor.formats.registry import KNOWN


def gptq(version):
    return KNOWN["gptq" if version == 1 else "gptq_v2"]


def gptq_pack(codes, grid, g_idx, bits, *, version=1):
    return gptq(version).pack(codes, grid, g_idx, Scheme(bits))


def gptq_unpack(qweight, qzeros, scales, g_idx, bits, *, version=1):
    return gptq(version).codes(_given(qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx), Scheme(bits))


def gptq_dequantize(qweight, qzeros, scales, g_idx, bits, *, version=1):
    return gptq(version).unpack(_given(qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx), Scheme(bits))


def awq_pack(codes, grid):
    return KNOWN["awq"].pack(codes, grid, None, Scheme(4))


def awq_unpack(qweight, qzeros, scales):
    return KNOWN["awq"].codes({"qweight": qweight, "qzeros": qzeros, "scales": scales}, Scheme(4))


def awq_dequantize(qweight, qzeros, scales):
    return KNOWN["awq"].unpack({"qweight": qweight, "qzeros": qzeros, "scales": scales}, Scheme(4))


def compressed_pack(codes, grid, bits, sym):
    return KNOWN["compressed-tensors"].pack(codes, grid, None, Scheme(bits, sym=sym))


def compressed_unpack(weight_packed, weight_scale, weight_shape, bits, **optional):
    parts = _given(weight_packed=weight_packed, weight_scale=weight_scale, **optional)
    return KNOWN["compressed-tensors"].codes(parts, Scheme(bits), tuple(int(side) for side in weight_shape))


def compressed_dequantize(weight_packed, weight_scale, weight_shape, bits, **optional):
    parts = _given(weight_packed=weight_packed, weight_scale=weight_scale, **optional)
    return KNOWN["compressed-tensors"].unpack(parts, Scheme(bits), tuple(int(side) for side in weight_shape))


def _given(**parts):
    return {name: part for name, part in parts.items() if part is not None}
