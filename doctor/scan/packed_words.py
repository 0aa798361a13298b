"""Statistics of packed tensors, taken by the scan: of zero points and g_idx all words, of codes whether they differ."""

from dataclasses import dataclass

from doctor.core.facts import FactKey, fact, provide


@dataclass(frozen=True)
class PackedWordStats:
    """Int32 words of a packed tensor. kinds: word (unsigned) -> count, None once more than 16 differ."""

    count: int
    smallest: int
    largest: int
    rising: bool  # no word is smaller than the one before it
    full_fields: int  # words in which some 4-bit field is 15
    kinds: dict[int, int] | None = None


PACKED_WORDS: FactKey[PackedWordStats] = provide(
    "words", "tensor", "values", "Statistics of the int32 words of a qzeros or g_idx tensor (PackedWordStats)."
)


REPEATED: FactKey[int | None] = provide(
    "repeated_code",
    "tensor",
    "values",
    "The element (unsigned) that every element of a packed tensor is, None where two differ.",
)


STORED_BYTES: FactKey[bytes] = provide(
    "stored_bytes", "tensor", "values", "The bytes of a small tensor that describes how a weight is packed."
)
ZERO_CODE_ROWS: FactKey[int] = provide(
    "zero_code_rows", "tensor", "values", "Rows whose codes are all 0, of a matrix of 8-bit integers."
)


@fact("checkpoint")
def packed_words(checkpoint, every_words) -> dict[str, PackedWordStats]:
    """Tensor name -> PackedWordStats of every qzeros and g_idx tensor."""
    return every_words
