"""The element types of safetensors: their widths, and where NaN, Inf and the largest value lie in their bits.

Source: safetensors `safetensors/src/tensor.rs` (0.8); the E4M3/E5M2 layouts are those of the OCP 8-bit
floating point specification 1.0, the FNUZ ones those of arXiv 2206.02915.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One element type. `bits` is the width; `kind` is "float", "int", "uint", "bool" or "complex"."""

    name: str
    bits: int
    kind: str
    torch: str | None = None  # attribute of the torch module; None where torch has no such type

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    def nbytes(self, numel: int) -> int | None:
        """Bytes of `numel` elements, or None where they do not fill whole bytes (safetensors rejects that)."""
        total = numel * self.bits
        return total // 8 if total % 8 == 0 else None


DTYPES: dict[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("BOOL", 8, "bool", "bool"),
        Dtype("F4", 4, "float", "float4_e2m1fn_x2"),
        Dtype("F6_E2M3", 6, "float"),
        Dtype("F6_E3M2", 6, "float"),
        Dtype("U8", 8, "uint", "uint8"),
        Dtype("I8", 8, "int", "int8"),
        Dtype("F8_E5M2", 8, "float", "float8_e5m2"),
        Dtype("F8_E4M3", 8, "float", "float8_e4m3fn"),
        Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        Dtype("I16", 16, "int", "int16"),
        Dtype("U16", 16, "uint", "uint16"),
        Dtype("F16", 16, "float", "float16"),
        Dtype("BF16", 16, "float", "bfloat16"),
        Dtype("I32", 32, "int", "int32"),
        Dtype("U32", 32, "uint", "uint32"),
        Dtype("F32", 32, "float", "float32"),
        Dtype("C64", 64, "complex", "complex64"),
        Dtype("F64", 64, "float", "float64"),
        Dtype("I64", 64, "int", "int64"),
        Dtype("U64", 64, "uint", "uint64"),
    )
}

# How config.json spells the types that models are stored in ("torch_dtype" before transformers 5, "dtype" since).
CONFIG_NAMES = {
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def stored_float(name: str) -> str | None:
    """PyTorch's name of a type that plain weights are stored in, by its name in safetensors: floats of 16 bits and
    more; None for the rest.
    """
    kind = DTYPES.get(name)
    return kind.torch if kind is not None and kind.kind == "float" and kind.bits >= 16 else None


# The NumPy type that carries the raw codes. BF16 and the 8-bit floats have no NumPy type: their codes travel as
# unsigned integers, and quant/ turns them into torch tensors.
CODE_NUMPY = {
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "F8_E5M2": "u1",
    "F8_E4M3": "u1",
    "F8_E8M0": "u1",
    "F8_E4M3FNUZ": "u1",
    "F8_E5M2FNUZ": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<u2",
    "BF16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
    "C64": "<c8",
}
