"""How a quantized checkpoint is read as floats: for every weight in codes the edit that decodes it.

Packed linears (GPTQ, AWQ, compressed-tensors), weights under their own names with scales beside them (FP8, INT8, NVFP4,
bitsandbytes) and fused experts (MXFP4) may stand in one checkpoint. It is decoded whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.core.recipe import Recipe, is_kept
from doctor.edits.kinds import Dequantize, DropFile, DropTensor, Edit, RemoveJson
from doctor.edits.stored import Decoding, Stored
from doctor.formats.known import quantized
from doctor.formats.mixed import alone
from doctor.formats.registry import KNOWN, read_quantization, verbatim_tails, word_tails
from doctor.formats.requirements import stored_shape
from doctor.model.quantization_config import quantization_of
from doctor.model.spec import ModelSpec, build_spec
from doctor.plan.groups import packed_size

if TYPE_CHECKING:
    from doctor.edits.overlay import EditedCheckpoint

OWN_FILES = ("quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json")
GGUF_DTYPE = "BF16"  # of a decoded GGUF model: float16 does not hold the activations of every model
Block = tuple[dict, str, str] | None  # quantization_config, its file and its pointer


def decoding(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], block: Block, texts: Mapping[str, bytes]
) -> Decoding:
    """How to read this checkpoint as floats. texts: the bytes of small tensors that describe weights, by name.

    Raises Unavailable with the reason where a weight in codes is of no format that is read here, or lacks a part.
    """
    words, plain = word_tails(), build_spec(checkpoint.value("config.json") or {}, {})
    own = alone(block[0]) if block is not None else None
    stored = []
    for info in sorted(quantized(tensors.values()), key=lambda info: info.name):
        of = (dict(own(info.name.rpartition(".")[0])), *block[1:]) if own and block else None
        packed = info.name.endswith(words)
        stored.append(_packed(info, tensors, of) if packed else _beside(info, tensors, of, texts, plain))
    kind = float_dtype(tensors)
    edits: list[Edit] = []
    for one in stored:
        edits.append(
            Dequantize(one.weight, one.shape, one.format.name, one.scheme.bits, block=one.scheme.tile, dtype=kind)
        )
        parts = (one.format.part_of(one.weight, part) for part in (*one.format.part_names, *one.format.beside))
        edits += [DropTensor(part) for part in dict.fromkeys(parts) if part in tensors and part != one.weight]
    if block is not None and block[2]:
        edits.append(RemoveJson(block[1], block[2], block[0]))
    edits += [DropFile(name) for name in OWN_FILES if name in checkpoint.entries]
    return Decoding(tuple(stored), tuple(edits), kind)


def decoded(checkpoint: Checkpoint) -> tuple[EditedCheckpoint, Decoding]:
    """The checkpoint seen as floats, decoded while it is read. Raises Unavailable with the reason where it is not, and
    BadCheckpoint for a GGUF model that is not read.
    """
    from doctor.edits.overlay import EditedCheckpoint  # it needs NumPy, which a check of headers does not

    if checkpoint.gguf:
        from doctor.edits.gguf_floats import GgufAsFloats

        view = GgufAsFloats(checkpoint, GGUF_DTYPE)
        return view, view.decoding
    for shard in checkpoint.shards.values():
        if shard.defects:
            raise Unavailable(f"{shard.name}: {shard.defects[0].detail}")
    names = [name for name in checkpoint.tensors if name.endswith(verbatim_tails())]
    texts = {name: checkpoint.load(name).tobytes() for name in names}
    found = decoding(checkpoint, checkpoint.tensors, quantization_of(checkpoint), texts)
    return EditedCheckpoint(checkpoint, found.edits), found


def coarser(found: Decoding, recipe: Recipe) -> Stored | None:
    """A weight that the recipe would round a second time to a grid of as many bits that does not hold its numbers: in
    longer groups, or without the zero points that it is stored with. None where there is none: fewer bits make the file
    smaller, more bits lose next to nothing.
    """
    for one in found.stored:
        plan, own = recipe.for_linear(one.module).scheme, one.scheme
        longer = own.group_size != -1 and (plan.group_size == -1 or plan.group_size > own.group_size)
        if not is_kept(recipe, one.module) and plan.bits == own.bits and (longer or (plan.sym and not own.sym)):
            return one
    return None


def float_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of the embedding, which these formats do not quantize."""
    kinds = {i.dtype.name for n, i in tensors.items() if "embed" in n or "wte" in n}
    return next((k for k in ("BF16", "F16", "F32") if k in kinds), "BF16")


def _packed(info: TensorInfo, tensors: Mapping[str, TensorInfo], block: Block) -> Stored:
    """A linear in words, as quantization_config says."""
    if block is None:
        raise Unavailable(_("no quantization_config"))
    quant = read_quantization(*block)
    if not quant.readable or quant.bits not in quant.format.bits:
        raise Unavailable(_("{version} with {bits} bits is not unpacked here", version=quant.version, bits=quant.bits))
    module = info.name.rpartition(".")[0]
    _require(info, tensors, [quant.format.part_of(module, part) for part in quant.needed])
    width, height = packed_size(quant, info)
    return Stored(info, f"{module}.weight", (height, width), quant.format, quant.scheme_of(module))


def _beside(
    info: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    block: Block,
    texts: Mapping[str, bytes],
    plain: ModelSpec,
) -> Stored:
    """A weight whose format keeps scales beside it. plain: the model as config.json gives it, for its true sizes."""
    pairs = ((form, form.scheme_beside(info, tensors, block[0] if block else None)) for form in KNOWN.values())
    form, scheme = next((pair for pair in pairs if pair[1] is not None), (None, None))
    if form is None or scheme is None:
        raise Unavailable(_("{tensor} has no scales beside it that are read here", tensor=info.name))
    weight, shape = form.weight_name(info.name), form.shape_beside(info, texts)
    if shape is None:
        raise Unavailable(_("the shape of {tensor} stands among values that were not read", tensor=info.name))
    true = plain.expected_shape(weight) if form.padded != (1, 1) else None
    if true is not None and stored_shape(true, form.padded) == tuple(shape):
        shape = true
    return Stored(info, weight, shape, form, scheme)


def _require(info: TensorInfo, tensors: Mapping[str, TensorInfo], names: list[str]) -> None:
    absent = [name for name in names if name not in tensors]
    if absent:
        raise Unavailable(_("{tensor} is absent beside {words}", tensor=absent[0], words=info.name))
