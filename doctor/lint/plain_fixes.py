"""Fixes that write quantized weights as plain 16-bit numbers, the ones that an engine computes with."""

from collections.abc import Iterable, Mapping

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import Unavailable
from doctor.core.finding import Fix
from doctor.core.messages import _, plural
from doctor.edits.decoding import OWN_FILES, Block, float_dtype
from doctor.edits.kinds import Dequantize, DropFile, DropTensor, Edit, RemoveJson
from doctor.edits.stored import Decoding
from doctor.formats.base import Quantization
from doctor.formats.registry import KNOWN, word_tails
from doctor.plan.groups import packed_size


def packed_words(tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """Tensors that hold words of codes, sorted by name."""
    tails = word_tails()
    return [info for name, info in sorted(tensors.items()) if name.endswith(tails)]


def narrow_weights(tensors: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """Weights under their own names in elements of less than 16 bits."""
    return [
        info
        for name, info in tensors.items()
        if name.endswith((".weight", "_blocks", "_proj"))
        and len(info.shape) >= 2
        and (info.dtype.bits < 16 and info.dtype.name != "BOOL")
    ]


def readable(quant: Quantization) -> Quantization:
    """The same; Unavailable where its words are not unpacked here."""
    if not quant.readable or quant.bits not in quant.format.bits:
        raise Unavailable(_("{version} with {bits} bits is not unpacked here", version=quant.version, bits=quant.bits))
    return quant


def dequantize_packed(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], block: Block, quant: Quantization, dtype: str = ""
) -> Fix:
    """For linears whose words stand under a name of their own. dtype: "" takes the embedding's. Raises Unavailable
    where words do not show their size.
    """
    edits: list[Edit] = []
    packed, kind = packed_words(tensors), dtype or float_dtype(tensors)
    for info in packed:
        module = info.name.rpartition(".")[0]
        width, height = packed_size(quant, info)
        edits.append(
            Dequantize(f"{module}.weight", (height, width), quant.format.name, quant.bits_of(module), dtype=kind)
        )
        parts = quant.format.part_names
        edits += [DropTensor(f"{module}.{part}") for part in parts if f"{module}.{part}" in tensors]
    return plain_fix(checkpoint, block, edits, len(packed), kind)


def dequantize_beside(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    narrow: Iterable[TensorInfo],
    block: Block,
    texts: Mapping[str, bytes],
    by_name: bool = True,
    dtype: str = "",
) -> Fix | None:
    """For weights whose format keeps scales beside the weight's own name; None where one of them is not unpacked here.

    texts: the bytes of small tensors that describe weights, by name.
    """
    edits: list[Edit] = []
    kind = dtype or float_dtype(tensors)  # once: DeepSeek-V3 has 46,000 such weights
    raw = block[0] if block else None
    count = 0
    for info in narrow:
        found = ((form, form.scheme_beside(info, tensors, raw)) for form in KNOWN.values())
        form, scheme = next((pair for pair in found if pair[1] is not None), (None, None))
        shape = form.shape_beside(info, texts) if form is not None else None
        if form is None or scheme is None or shape is None:
            return None
        weight = form.weight_name(info.name)
        edits.append(Dequantize(weight, shape, form.name, scheme.bits, block=scheme.tile, dtype=kind))
        parts = (form.part_of(weight, part) for part in form.beside)
        edits += [DropTensor(part) for part in parts if part in tensors]
        count += 1
    return plain_fix(checkpoint, block, edits, count, kind, by_name)


def plain_fix(
    checkpoint: Checkpoint, block: Block, edits: list[Edit], count: int, kind: str, by_name: bool = True
) -> Fix:
    """Write dequantized weights, and drop what described their quantization."""
    if block is not None and block[2]:
        edits.append(RemoveJson(block[1], block[2], block[0]))
    edits += [DropFile(name) for name in OWN_FILES if name in checkpoint.entries]
    return _fix(edits, count, kind, by_name)


def decoding_fix(found: Decoding, by_name: bool = True) -> Fix:
    """Write what a decoding reads."""
    return _fix(found.edits, len(found.stored), found.kind, by_name)


def _fix(edits: Iterable[Edit], count: int, kind: str, by_name: bool) -> Fix:
    return Fix(
        plural(
            "write {n:,} weight as plain {kind} numbers, without quantization_config",
            "write {n:,} weights as plain {kind} numbers, without quantization_config",
            count,
            kind=kind,
        ),
        tuple(edits),
        "unsafe",
        by_name=by_name,
    )
