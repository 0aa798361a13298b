"""Fixes that write quantized weights as plain 16-bit numbers, the ones that an engine computes with."""

from collections.abc import Iterable, Mapping

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.finding import Fix
from doctor.core.messages import plural
from doctor.edits.kinds import Dequantize, DropFile, DropTensor, Edit, RemoveJson
from doctor.formats.base import KNOWN

OWN_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
Block = tuple[dict, str, str] | None  # quantization_config, its file and its pointer


def dequantize_beside(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    narrow: Iterable[TensorInfo],
    block: Block,
    texts: Mapping[str, bytes],
    by_name: bool = True,
) -> Fix | None:
    """For weights whose format keeps scales beside the weight's own name; None where one of them is not unpacked here.

    texts: the bytes of small tensors that describe weights, by name.
    """
    edits: list[Edit] = []
    kind = float_dtype(tensors)  # once: DeepSeek-V3 has 46,000 such weights
    raw = block[0] if block else None
    count = 0
    for info in narrow:
        found = ((form, form.scheme_beside(info, tensors, raw)) for form in KNOWN.values())
        form, scheme = next((pair for pair in found if pair[1] is not None), (None, None))
        shape = form.shape_beside(info, texts) if form is not None else None
        if form is None or scheme is None or shape is None:
            return None
        edits.append(Dequantize(info.name, shape, form.name, scheme.bits, block=scheme.tile, dtype=kind))
        module = info.name.removesuffix(".weight")
        edits += [DropTensor(f"{module}.{part}") for part in form.beside if f"{module}.{part}" in tensors]
        count += 1
    return plain_fix(checkpoint, block, edits, count, kind, by_name)


def plain_fix(
    checkpoint: Checkpoint, block: Block, edits: list[Edit], count: int, kind: str, by_name: bool = True
) -> Fix:
    """Write dequantized weights, and drop what described their quantization."""
    if block is not None and block[2]:
        edits.append(RemoveJson(block[1], block[2], block[0]))
    edits += [DropFile(name) for name in OWN_FILES if name in checkpoint.entries]
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


def float_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of the embedding, which these formats do not quantize."""
    kinds = {i.dtype.name for n, i in tensors.items() if "embed" in n or "wte" in n}
    return next((k for k in ("BF16", "F16", "F32") if k in kinds), "BF16")
