"""A quantized checkpoint in another stored format, without quantizing again: the edits, and why there are none.

Formats of integers on an affine grid hold each other's codes, scales and zero points unchanged, so the new file
computes with the same weights bit for bit. Every format that is read here becomes plain 16-bit floats, rounded once.
What the new format cannot hold is refused before anything is written, as far as headers and group indices tell, and
else by the linear that shows it (doctor/edits/repacked.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import PlanRefused
from doctor.core.facts import Unavailable
from doctor.core.lazy_numpy import np
from doctor.core.messages import Message, _
from doctor.core.methods import METHODS, method_of_format
from doctor.core.recipe import FORMATS, Recipe
from doctor.edits.decoding import decoding
from doctor.edits.gguf_floats import GgufAsFloats
from doctor.edits.kinds import (
    CastTensor,
    Dequantize,
    DropTensor,
    Edit,
    Repack,
    SetJson,
    ShiftZeros,
)
from doctor.formats.base import Format, Quantization
from doctor.formats.known import packed_tails, undoes_packing
from doctor.formats.registry import KNOWN, read_quantization, verbatim_tails
from doctor.lint.plain_fixes import (
    dequantize_beside,
    dequantize_packed,
    narrow_weights,
    packed_words,
    readable,
)
from doctor.model.quantization_config import quantization_of
from doctor.plan.groups import packed_size
from doctor.quant.conversion_config import AskLinears, config_edits, converted_config, set_key

FLOATS = {"bf16": "BF16", "f16": "F16"}
_CONFIG = {"BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Conversion:
    """What a conversion does. exact: codes and grid are the same; else each weight is rounded once to a 16-bit float.

    old, new: the formats as people write them. linears: how many change their format. notes: what else changes.
    """

    edits: tuple[Edit, ...]
    old: str
    new: str
    linears: int
    exact: bool
    notes: tuple[Message, ...] = ()


def targets() -> tuple[str, ...]:
    """The names that `convert` takes."""
    return (*FLOATS, *(name for name in FORMATS if KNOWN[name].affine))


def plan_conversion(checkpoint: Checkpoint, target: str, ask: AskLinears | None = None) -> Conversion:
    """The edits that turn a quantized checkpoint into `target`, one of targets(). Reads headers and group indices.

    ask: the Linear modules that a client builds (client.Client.linears), for the list of what stays in 16 bits. Raises
    PlanRefused with the reason where the formats do not allow it, BadCheckpoint for a GGUF model that is not read.
    """
    if checkpoint.gguf:
        return _of_gguf(checkpoint, target)
    block = quantization_of(checkpoint)
    packed, narrow = packed_words(checkpoint.tensors), narrow_weights(checkpoint.tensors)
    unread = [n for n in checkpoint.tensors if n.endswith(packed_tails()) and n not in {i.name for i in packed}]
    if not packed and not narrow and not unread:
        raise PlanRefused(
            _(
                "{checkpoint}: its weights are plain floats; convert goes from one stored format to another.",
                checkpoint=checkpoint.name,
            ),
            _("`doctor quantize` makes a quantized copy."),
        )
    try:
        if target in FLOATS:
            return _to_floats(checkpoint, block, packed, narrow, FLOATS[target])
        return _to_packed(checkpoint, block, packed, narrow, KNOWN[target], ask)
    except Unavailable as error:
        raise PlanRefused(
            _("{checkpoint}: {reason}.", checkpoint=checkpoint.name, reason=error.args[0]),
            _("Take the 16-bit original and quantize it."),
        ) from None


# to 16-bit floats


def _of_gguf(checkpoint: Checkpoint, target: str) -> Conversion:
    if target not in FLOATS:
        raise PlanRefused(
            _(
                "{checkpoint}: {old} has no integer codes on an affine grid; {new} holds only those.",
                checkpoint=checkpoint.name,
                old=KNOWN["gguf"].label,
                new=KNOWN[target].label,
            ),
            _("Convert it to bf16, or quantize the 16-bit original."),
        )
    view = GgufAsFloats(checkpoint, FLOATS[target])
    notes = view.notes or (_("config.json and the tokenizer are made of the metadata of {file}", file=view.model.name),)
    count = sum(len(tensor.shape) > 1 for tensor in view.stored.values())
    return Conversion(view.edits, KNOWN["gguf"].label, FLOATS[target], count, False, notes)


def _to_floats(
    checkpoint: Checkpoint,
    block: tuple[dict, str, str] | None,
    packed: list[TensorInfo],
    narrow: list[TensorInfo],
    kind: str,
) -> Conversion:
    tensors = checkpoint.tensors
    edits: list[Edit] = []
    old: list[str] = []
    if packed:
        if block is None:
            raise Unavailable(_("no quantization_config says how its words are packed"))
        quant = readable(read_quantization(*block))
        for info in packed:
            _require_parts(quant, info.name.rpartition(".")[0], tensors)
        edits += dequantize_packed(checkpoint, tensors, block, quant, kind).edits
        old.append(quant.format.label)
    if narrow:
        texts = {n: checkpoint.load(n).tobytes() for n in tensors if n.endswith(verbatim_tails())}
        fix = dequantize_beside(checkpoint, tensors, narrow, block, texts, dtype=kind)
        if fix is None:
            raise Unavailable(
                _(
                    "{tensor} is {dtype} {shape}, which is not unpacked here",
                    tensor=narrow[0].name,
                    dtype=narrow[0].dtype.name,
                    shape=list(narrow[0].shape),
                )
            )
        edits += fix.edits
        old += sorted({KNOWN[e.method].label for e in fix.edits if hasattr(e, "method")})
    count = len(packed) + len(narrow)
    if not edits:  # formats without words of their own: ExLlama's
        texts = {n: checkpoint.load(n).tobytes() for n in tensors if n.endswith(verbatim_tails())}
        found = decoding(checkpoint, tensors, block, texts)
        edits += [replace(e, dtype=kind) if isinstance(e, Dequantize) else e for e in found.edits]
        old.append(found.label)
        count = len(found.stored)
    other = [i for n, i in sorted(tensors.items()) if i.dtype.name in _CONFIG and i.dtype.name != kind]
    gone = {e.tensor for e in edits if isinstance(e, DropTensor)}
    cast = [i.name for i in other if i.name not in gone]
    written = {e.tensor for e in edits if isinstance(e, Dequantize)}
    left = next((n for n in sorted(tensors) if undoes_packing(n) and n not in gone and n not in written), None)
    if left is not None:
        raise Unavailable(
            _("{tensor} belongs to packed weights and is not read here: what it scales is not known", tensor=left)
        )
    edits += [CastTensor(name, kind) for name in cast]
    edits += _stated_dtype(checkpoint, kind)
    notes = (
        (_("{n:,} tensors that were not quantized are stored as {dtype} too", n=len(cast), dtype=kind),) if cast else ()
    )
    return Conversion(tuple(_once(edits)), " + ".join(dict.fromkeys(old)), kind, count, False, notes)


def _once(edits: Iterable[Edit]) -> Iterable[Edit]:
    """Each target's first edit: both kinds of weights ask to remove quantization_config."""
    found: dict[str, Edit] = {}
    for edit in edits:
        found.setdefault(edit.target, edit)
    return found.values()


def _stated_dtype(checkpoint: Checkpoint, kind: str) -> list[Edit]:
    """config.json with the new dtype, wherever it states another."""
    config = checkpoint.value("config.json") or {}
    blocks = {"": config, **{f"/{name}": value for name, value in config.items() if isinstance(value, dict)}}
    return [
        SetJson("config.json", f"{where}/{key}", _CONFIG[kind], block[key])
        for where, block in blocks.items()
        for key in ("dtype", "torch_dtype")
        if isinstance(block.get(key), str) and block[key] != _CONFIG[kind]
    ]


# to another format of integers


def _to_packed(
    checkpoint: Checkpoint,
    block: tuple[dict, str, str] | None,
    packed: list[TensorInfo],
    narrow: list[TensorInfo],
    target: Format,
    ask: AskLinears | None,
) -> Conversion:
    if block is None:
        raise Unavailable(_("no quantization_config says how its weights are packed"))
    raw, file, where = block
    quant = readable(read_quantization(raw, file, where)) if packed else None
    if quant is None or not quant.format.affine or narrow:
        stated = next((f.label for f in KNOWN.values() if f.claims(raw)), str(raw.get("quant_method")))
        raise PlanRefused(
            _(
                "{checkpoint}: {old} has no integer codes on an affine grid; {new} holds only those.",
                checkpoint=checkpoint.name,
                old=stated,
                new=target.label,
            ),
            _("Convert it to bf16, or quantize the 16-bit original."),
        )
    if quant.format is target and quant.reader.claims(target.config(Recipe(format=target.name))):
        raise PlanRefused(_("{checkpoint}: is stored as {new} already.", checkpoint=checkpoint.name, new=target.label))
    modules = {info.name.rpartition(".")[0]: packed_size(quant, info) for info in packed}
    if (
        quant.format.twin == target.name
        and quant.reader.version_key(raw)
        and quant.reader.spelled(target) == target.name
    ):
        return _to_twin(checkpoint, block, quant, target, modules)
    scattered = _scattered(checkpoint, quant, modules)
    _require_fits(checkpoint, quant, target, modules, scattered)
    sym = quant.sym and METHODS[method_of_format(target.name)].sym
    edits: list[Edit] = []
    for module, (k, n) in modules.items():
        written = _repack(quant, target, module, k, n, sym)
        new = {edit.tensor for edit in written}
        edits += written
        edits += [
            DropTensor(name)
            for part in quant.format.part_names
            if (name := f"{module}.{part}") in checkpoint.tensors and name not in new
        ]
    config, copies = converted_config(checkpoint, quant, target, modules, sym, bool(scattered), ask)
    edits += config_edits(checkpoint, block, config, copies)
    return Conversion(tuple(edits), quant.reader.label, target.label, len(modules), True)


def _repack(quant: Quantization, target: Format, module: str, k: int, n: int, sym: bool) -> list[Repack]:
    """The parts of one linear in the new format."""
    scheme = quant.scheme_of(module)._replace(sym=sym)
    return [
        Repack(
            f"{module}.{part.name}",
            quant.format.name,
            target.name,
            part.name,
            part.dtype,
            part.shape,
            (n, k),
            scheme.bits,
            scheme.group_size,
            scheme.sym,
        )
        for part in target.parts(k, n, scheme)
    ]


def _to_twin(
    checkpoint: Checkpoint,
    block: tuple[dict, str, str],
    quant: Quantization,
    target: Format,
    modules: Mapping[str, tuple[int, int]],
) -> Conversion:
    """Formats that differ in how a zero point is stored alone: words, scales and the rest of the config stay."""
    step = quant.format.zero_offset - target.zero_offset
    edits: list[Edit] = []
    for module, (k, n) in modules.items():
        bits = quant.bits_of(module)
        if 32 % bits == 0:
            edits.append(ShiftZeros(f"{module}.{quant.format.zeros}", bits, step))
        else:  # fields that cross words
            edits += _repack(quant, target, module, k, n, quant.sym)
    for file, where in [(block[1], block[2]), *((name, "") for name in target.config_files if name != block[1])]:
        held = checkpoint.value(file)
        for part in filter(None, where.split("/")):
            held = held.get(part) if isinstance(held, dict) else None
        if isinstance(held, dict):
            edits += [
                set_key(file, where, key, value, held) for key, value in quant.reader.restated(held, target).items()
            ]
    return Conversion(tuple(edits), quant.format.label, target.label, len(modules), True)


def _scattered(checkpoint: Checkpoint, quant: Quantization, modules: Mapping[str, tuple[int, int]]) -> list[str]:
    """Linears whose groups are not neighbouring columns."""
    found = []
    for module, (k, _n) in modules.items():
        name = f"{module}.{quant.format.index}"
        if quant.format.index and name in checkpoint.tensors:
            width = k if quant.group_size == -1 else quant.group_size
            if not np.array_equal(checkpoint.load(name), np.arange(k, dtype=np.int32) // width):
                found.append(module)
    return found


def _require_parts(quant: Quantization, module: str, tensors: Mapping[str, TensorInfo]) -> None:
    missing = [part for part in quant.needed if f"{module}.{part}" not in tensors]
    if missing:
        raise PlanRefused(
            _("{module}: {part} is absent; its words cannot be read without it.", module=module, part=missing[0]),
            _("Run `doctor check`: it lists what is missing."),
        )


def _require_fits(
    checkpoint: Checkpoint,
    quant: Quantization,
    target: Format,
    modules: Mapping[str, tuple[int, int]],
    scattered: list[str],
) -> None:
    """PlanRefused for what headers and group indices show that the target cannot hold."""
    advice = _("Choose another format; `--format bf16` holds every weight.")
    widths = {module: quant.bits_of(module) for module in modules}
    for module, (k, n) in modules.items():
        _require_parts(quant, module, checkpoint.tensors)
        if widths[module] not in target.bits:
            raise PlanRefused(
                _(
                    "{module}: has {bits} bits; {label} holds {known}.",
                    module=module,
                    bits=widths[module],
                    label=target.label,
                    known=", ".join(map(str, target.bits)),
                ),
                advice,
            )
        if reason := target.unfit(quant.scheme_of(module), k, n):
            raise PlanRefused(_("{module}: {reason}.", module=module, reason=reason), advice)
    if len(set(widths.values())) > 1 and not target.own_widths:
        raise PlanRefused(
            _(
                "{checkpoint}: its linears have {widths} bits; {label} has one width for all.",
                checkpoint=checkpoint.name,
                widths=", ".join(map(str, sorted(set(widths.values())))),
                label=target.label,
            ),
            advice,
        )
    if scattered and not target.order_key:
        raise PlanRefused(
            _(
                "{module}: its groups are scattered over columns (act-order), in {n:,} of {all:,} linears; {label} "
                "has groups of neighbours alone.",
                module=scattered[0],
                n=len(scattered),
                all=len(modules),
                label=target.label,
            ),
            advice,
        )
