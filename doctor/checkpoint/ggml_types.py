"""Element types of GGUF files: how many elements a block has and how many bytes it takes.

A row of a tensor is a whole number of blocks. Where a block keeps float16 scales stands here too, because NaN or Inf
in one of them makes a whole block non-finite.

Sources: ggml-org/llama.cpp ggml/include/ggml.h (enum ggml_type), ggml/src/ggml-common.h; gguf 0.19 constants.py.
"""

from typing import Final, NamedTuple


class GgmlType(NamedTuple):
    """number: ggml's own. block: elements; nbytes: bytes of a block. halves: offsets of float16 scales in it. words:
    what people call it, as ggml's table of types does.
    """

    number: int
    name: str
    block: int
    nbytes: int
    halves: tuple[int, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether elements stand for themselves."""
        return self.name in ("F32", "F16", "BF16", "F64")

    @property
    def bits(self) -> float:
        """Bits an element."""
        return 8 * self.nbytes / self.block


GGML_TYPES: Final[dict[int, GgmlType]] = {
    kind.number: kind
    for kind in (
        GgmlType(0, "F32", 1, 4),
        GgmlType(1, "F16", 1, 2),
        GgmlType(2, "Q4_0", 32, 18, (0,)),
        GgmlType(3, "Q4_1", 32, 20, (0, 2)),
        GgmlType(6, "Q5_0", 32, 22, (0,)),
        GgmlType(7, "Q5_1", 32, 24, (0, 2)),
        GgmlType(8, "Q8_0", 32, 34, (0,)),
        GgmlType(9, "Q8_1", 32, 36, (0, 2)),
        GgmlType(10, "Q2_K", 256, 84, (80, 82)),
        GgmlType(11, "Q3_K", 256, 110, (108,)),
        GgmlType(12, "Q4_K", 256, 144, (0, 2)),
        GgmlType(13, "Q5_K", 256, 176, (0, 2)),
        GgmlType(14, "Q6_K", 256, 210, (208,)),
        GgmlType(15, "Q8_K", 256, 292),
        GgmlType(16, "IQ2_XXS", 256, 66, (0,)),
        GgmlType(17, "IQ2_XS", 256, 74, (0,)),
        GgmlType(18, "IQ3_XXS", 256, 98, (0,)),
        GgmlType(19, "IQ1_S", 256, 50, (0,)),
        GgmlType(20, "IQ4_NL", 32, 18, (0,)),
        GgmlType(21, "IQ3_S", 256, 110, (0,)),
        GgmlType(22, "IQ2_S", 256, 82, (0,)),
        GgmlType(23, "IQ4_XS", 256, 136, (0,)),
        GgmlType(24, "I8", 1, 1),
        GgmlType(25, "I16", 1, 2),
        GgmlType(26, "I32", 1, 4),
        GgmlType(27, "I64", 1, 8),
        GgmlType(28, "F64", 1, 8),
        GgmlType(29, "IQ1_M", 256, 56),
        GgmlType(30, "BF16", 1, 2),
        GgmlType(34, "TQ1_0", 256, 54, (52,)),
        GgmlType(35, "TQ2_0", 256, 66, (64,)),
        GgmlType(39, "MXFP4", 32, 17),
        GgmlType(40, "NVFP4", 64, 36),
        GgmlType(41, "Q1_0", 128, 18, (0,)),
    )
}
BY_NAME: Final[dict[str, GgmlType]] = {kind.name: kind for kind in GGML_TYPES.values()}

# general.file_type -> what llama.cpp calls the mixture of types. Source: include/llama.h (enum llama_ftype).
FILE_TYPES: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
}
