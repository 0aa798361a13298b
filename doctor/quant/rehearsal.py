"""What a run would write, from headers alone: the run's own steps up to its first tensor, and files without data.

The model is built on the meta device, every parameter finds its tensor, linears are chosen as a run chooses them, and
the output's config.json and headers are written beside a hole of the right size. A client that loads such a directory
on the meta device says in seconds what it would say after hours. What stops a run before it computes stops here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.header_text import header_bytes
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.formats.known import streams
from doctor.formats.registry import format_of
from doctor.model.fused_experts import find_fused_experts, unfuse
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec, build_spec
from doctor.quant import export
from doctor.quant.client import Linears
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.selection import names_in_config, require_widths, select_linears, why_kept
from doctor.quant.stream.choose import choose
from doctor.quant.vision import vision_linears

Header = tuple[str, str, tuple[int, ...], int]  # name, dtype, shape, bytes
_WIDE = ("F32", "F64")  # stored as bfloat16


def rehearse(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, linears: Callable[[Iterable[str]], Linears]
) -> tuple[str, ...]:
    """Write into `folder` what a run of this recipe would write, without data. Returns the names of linears that stay
    in 16 bits.

    linears: what the client answers about modules of the files (client.Client). Raises NotQuantizable or BadCheckpoint
    where a run would, before its first layer.
    """
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(
            _("{root}: config.json is absent or broken; quantizing needs the model's shape.", root=str(checkpoint.root))
        )
    spec = build_spec(config, checkpoint.tensors)
    found = find_fused_experts(spec, checkpoint.tensors, recipe)
    fused = {name.removesuffix(".weight"): stacks for stacks in found for name in stacks.tensors}
    view, spec = unfuse(checkpoint, spec, recipe)
    require_widths(spec, recipe)
    if streams(recipe):  # rounded as they are read: no model is built, so none can refuse
        return _rehearse_rounding(checkpoint, spec, recipe, folder, linears)
    skeleton = Skeleton(view, spec)
    skeleton.require_tensors()
    if recipe.calibrated:
        skeleton.require_one_after_another()
    headers, kept, packed = [], [], []
    for i in range(len(skeleton.layers)):
        chosen = select_linears(skeleton, view, fused, recipe, i)
        for stays in (*chosen.kept, *chosen.fused):
            kept += names_in_config(stays.record, fused, recipe)
        replaced = set()
        for linear, _module in chosen.modules.values():
            replaced.add(linear.tensor)
            packed.append(linear.name)
            headers += _packed(linear, recipe)
        headers += _stored(view, (n for n in skeleton.tensors_of(i) if n not in replaced))
    modules = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    known = linears(modules)
    seeing = {x.tensor: x for x in vision_linears(recipe, known, view.tensors) if not why_kept(recipe, x)}
    for linear in seeing.values():
        packed.append(linear.name)
        headers += _packed(linear, recipe)
    headers += _stored(view, (n for n in skeleton.outer_tensors() if n not in seeing))
    kept += [linear.name for linear in skeleton.outside]
    return _written(folder, checkpoint, recipe, (kept, packed, headers), known)


def _rehearse_rounding(
    checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, folder: Path, linears: Callable[[Iterable[str]], Linears]
) -> tuple[str, ...]:
    """The same where weights are rounded as they are read: no model is built (stream/)."""
    modules = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    known = linears(modules)
    chosen = choose(checkpoint, spec, recipe, known, Store())
    headers = [header for linear in chosen.rounded.values() for header in _packed(linear, recipe)]
    headers += _stored(chosen.view, (name for name in chosen.view.tensors if name not in chosen.rounded))
    packed = [linear.name for linear in chosen.rounded.values()]
    return _written(folder, checkpoint, recipe, (list(chosen.names), packed, headers), known)


def _written(
    folder: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    found: tuple[list[str], list[str], list[Header]],
    known: Linears,
) -> tuple[str, ...]:
    """config.json and headers, with a hole for the data. found: names kept, names packed, headers. Returns those
    kept. Raises NotQuantizable where nothing is packed.
    """
    kept, packed, headers = found
    if not packed:
        raise NotQuantizable(
            _(
                "{name}: none of its {n:,} tensors is a linear of a decoder layer that the plan quantizes.",
                name=checkpoint.name,
                n=len(checkpoint.tensors),
            ),
            _("Take fewer linears out with --ignore, or give tensors the names that their class is published with."),
        )
    stated = export.Output.stated(recipe, dict.fromkeys(kept), [name for name, *_rest in headers], known)
    export.write_configs(folder, checkpoint, recipe, stated)
    raw = header_bytes(sorted(headers, key=lambda header: -DTYPES[header[1]].bits))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + sum(h[3] for h in headers))
    return tuple(kept)


def _packed(linear: Linear, recipe: Recipe) -> list[Header]:
    """Headers of a linear in the output format."""
    own = recipe.for_linear(linear.name)
    parts = format_of(own).parts(linear.in_features, linear.out_features, own.scheme)
    return [(f"{linear.name}.{part.name}", part.dtype, part.shape, part.nbytes) for part in parts]


def _stored(checkpoint: Checkpoint, names: Iterable[str]) -> list[Header]:
    """Headers of tensors that stay, in the dtype in which a run keeps them."""
    found = []
    for name in names:
        info = checkpoint.tensors[name]
        wide = info.dtype.name in _WIDE
        nbytes = 2 * info.numel if wide else info.nbytes
        found.append((name, "BF16" if wide else info.dtype.name, info.shape, nbytes))
    return found
