"""The ways in which engines store a KV cache: bits for each key and value, scales included, and their names."""

from collections.abc import Iterable
from dataclasses import dataclass

from doctor.core.errors import DoctorError
from doctor.core.messages import _

SCALE_BITS = 0.5  # one float16 scale for 32 values


@dataclass(frozen=True)
class Scheme:
    """Bits per cached key and value, scales included, and what engines call it; "" where an engine has no such
    cache.
    """

    name: str
    key_bits: float
    value_bits: float
    exllama: str = ""
    vllm: str = ""
    llama_cpp: str = ""


# llama.cpp counts a float16 scale for 32 values into its types' names: q8_0 is 8.5 bits, q4_0 4.5 (ggml-org/llama.cpp
# ggml-quants).
SCHEMES = (
    Scheme("FP16", 16, 16, "FP16", "auto", "f16"),
    Scheme("FP8", 8, 8, "FP8", "fp8_e5m2, fp8_e4m3"),
    Scheme("Q8", 8.5, 8.5, "Q8", "", "K q8_0, V q8_0"),
    Scheme("Q6", 8.5, 4.5, "Q6", "", "K q8_0, V q4_0"),
    Scheme("Q4", 4.5, 4.5, "Q4", "", "K q4_0, V q4_0"),
)
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def custom(key_bits: int, value_bits: int) -> Scheme:
    """A scheme with widths chosen apart, as ExLlamaV3 takes them. Raises DoctorError for widths that no engine has."""
    for side, bits in (("--k-bits", key_bits), ("--v-bits", value_bits)):
        if bits not in WIDTHS:
            raise DoctorError(_("{option} {bits}: must be 2 to 8, or 16.", option=side, bits=bits))
    key, value = (b + SCALE_BITS if b < 16 else 16 for b in (key_bits, value_bits))
    exllama = "" if 16 in (key_bits, value_bits) else f"-cq {key_bits},{value_bits} (V3)"
    return Scheme(f"K{key_bits} V{value_bits}", key, value, exllama)


def with_custom(key_bits: int | None, value_bits: int | None) -> Iterable[Scheme]:
    """The usual schemes, and one more where a width was asked for; a width not given is 16."""
    yield from SCHEMES
    if key_bits is not None or value_bits is not None:
        yield custom(key_bits or 16, value_bits or 16)
