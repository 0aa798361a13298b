"""quantization_config of a converted checkpoint: in the spelling of the new format, with what stays in 16 bits, and the
edits that put it where readers look.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.json_text import pointer
from doctor.core.errors import PlanRefused
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.edits.kinds import MISSING, DropFile, Edit, RemoveJson, SetJson
from doctor.formats.base import Format, Quantization
from doctor.lint.plain_fixes import OWN_FILES
from doctor.model.spec import build_spec
from doctor.plan.loading import loading_options
from doctor.quant.client import Linears

AskLinears = Callable[[Path, Iterable[str]], Linears]


def converted_config(
    checkpoint: Checkpoint,
    quant: Quantization,
    target: Format,
    modules: Mapping[str, tuple[int, int]],
    sym: bool,
    scattered: bool,
    ask: AskLinears | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(quantization_config in the target's spelling, the files that hold a copy of it)."""
    from doctor.quant.export import config_of

    spec = build_spec(checkpoint.value("config.json") or {}, checkpoint.tensors)
    plain = [x.name for x in spec.linears if x.name not in modules and x.block is not None]
    fused = {
        name.rpartition(".")[0]
        for name, info in checkpoint.tensors.items()
        if "experts." in name and len(info.shape) == 3 and info.dtype.bits >= 16
    }
    kept = [*plain, *(name for module in sorted(fused) for name in target.names_of_kept(module))]
    recipe = Recipe(bits=quant.bits, group_size=quant.group_size, sym=sym, format=target.name)
    widths = {module: bits for module in modules if (bits := quant.bits_of(module)) != quant.bits}
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")]
    linears = ask(checkpoint.root, [*names, *modules]) if ask else {}
    stated = config_of(recipe, kept, modules, linears, widths)
    stated = _without_entries_for(target, stated, modules) | loading_options(
        target.name, str((checkpoint.value("config.json") or {}).get("model_type", ""))
    )
    if scattered:
        stated[target.order_key] = True
    return stated, target.config_files


def _without_entries_for(target: Format, stated: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """The config without the entry that excludes the output head, where the head is packed. PlanRefused where another
    entry would exclude a packed linear.
    """
    stated = json.loads(json.dumps(stated))
    for entry in reversed(target.exclusions(stated)):
        hit = next((module for module in modules if entry.matches(module)), None)
        if hit is None:
            continue
        key = entry.pointer.split("/")[1]
        if key == target.head_key:
            stated[key] = True
        elif entry.matches("lm_head") and isinstance(stated[key], list):
            stated[key].remove(entry.entry)
        else:
            raise PlanRefused(
                _(
                    "{module}: is packed, and {label} readers would exclude it by {entry!r}, which stays in 16 bits.",
                    module=hit,
                    label=target.label,
                    entry=entry.entry,
                ),
                _("Choose another format; `--format bf16` holds every weight."),
            )
    return stated


def config_edits(
    checkpoint: Checkpoint, block: tuple[dict, str, str], stated: dict[str, Any], copies: tuple[str, ...]
) -> list[Edit]:
    """One quantization_config at the top of config.json, its copies, and none of the old."""
    raw, file, where = block
    edits: list[Edit] = []
    if (file, where) == ("config.json", "/quantization_config"):
        edits.append(SetJson(file, where, stated, raw))
    else:
        edits.append(SetJson("config.json", "/quantization_config", stated))
        edits += [RemoveJson(file, where, raw)] if where else []
    edits += [DropFile(name) for name in OWN_FILES if name in checkpoint.entries and name not in copies]
    for name in copies:
        held = checkpoint.value(name) or {}
        edits += [RemoveJson(name, pointer(key), value) for key, value in held.items() if key not in stated]
        edits += [set_key(name, "", key, value, held) for key, value in stated.items()]
    return edits


def set_key(file: str, where: str, key: str, value: object, held: Mapping[str, Any]) -> SetJson:
    """The edit of one key of an object at `where`, which holds `held` now."""
    return SetJson(file, where + pointer(key), value, held.get(key, MISSING))
