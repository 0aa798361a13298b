"""What headers, flags and this machine refuse before torch is imported: said in a second, not after minutes of reading.

Each of these is refused again where the work is done, by what is measured there; here only what cannot end well.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError, NotQuantizable, PlanRefused
from doctor.core.facts import CHECKPOINT
from doctor.core.machine import GIVEN_MACHINE
from doctor.core.messages import Message, _, plural
from doctor.core.recipe import Recipe, matches
from doctor.edits.stored import Decoding
from doctor.fixing.assess import Assessment, assess
from doctor.fixing.outputs import check_output
from doctor.fixing.result import report_of
from doctor.formats.known import streams
from doctor.lint.as_floats import read_as_floats
from doctor.lint.engine import Report, load_rules, select_rules
from doctor.lint.rule import Rule
from doctor.model.fused_experts import unfuse
from doctor.model.quantization_config import holds_quantized, stored_recipe
from doctor.model.same_model import require_same_model
from doctor.model.spec import ModelSpec, build_spec
from doctor.plan.mixture import with_mixture
from doctor.quant import budget
from doctor.quant.allocation.ladder import refuse_budget
from doctor.quant.calibration.documents import require_text, require_text_of
from doctor.quant.calibration.rows import MAX_SEQ_LENGTH, ROWS
from doctor.quant.capacity import measure
from doctor.quant.stage import Stage, require_room
from doctor.quant.tuning.wanted import ARGUMENTS, AUTO, no_scales, refuse_tuning, require_memory
from doctor.scan.header import DECODED

# Rules that say that tensors, or files with them, cannot be read at all.
UNREADABLE = frozenset(("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F019", "F020", "F021", "F070", "F071"))
_MAPPINGS = ("auto_mappings.py", "configuration_auto.py")  # of transformers/models/auto: where model types are named


def refused_by_headers(
    source: Checkpoint,
    output: str | os.PathLike,
    recipe: Recipe,
    *,
    keep: Iterable[str] = (),
    fix: bool = False,
    unsafe_fixes: bool | Iterable[str] = False,
    memory: int | None = None,
    calibration: str | os.PathLike | None = None,
    rows: int = ROWS,
    max_seq_length: int = MAX_SEQ_LENGTH,
    tune: str | int = AUTO,
    preflight: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda text: None,
    **others: Any,
) -> Report | None:
    """The report of the headers where rules forbid what a run of `quantize` with these options begins, unless fixes
    were asked for, which may cure it.

    Raises PlanRefused for a pattern that names nothing, NotQuantizable for a family that
    transformers does not define, MachineError for too little memory or disk.
    """
    started = time.perf_counter()
    place = Path(os.path.abspath(output))
    rules = select_rules(load_rules(rules_dirs), select, ignore)
    recipe = replace(recipe, keep=(*recipe.keep, *keep), goal="quantize")
    refuse_tuning(tune, recipe, rows)
    if others.get("budget") is not None:
        refuse_budget(source, recipe, others["budget"])
    require_nothing_to_fix(source, fix or bool(unsafe_fixes))
    _require_named_as_stored(source, recipe)
    view, decoding = _as_gguf(source) if source.gguf else read_as_floats(source, recipe, rules)
    config = view.value("config.json")
    facts: list[tuple[str, str, object]] = [(CHECKPOINT, DECODED.name, decoding)] if decoding else []
    if recipe.calibrated:
        require_text_of(calibration)
    if config is not None:
        spec = build_spec(config, view.tensors)
        require_named(view, spec, recipe)
        recipe = with_mixture(recipe, spec)
        _require_machine(view, spec, config, recipe, memory)
        if not preflight:
            length = min(max_seq_length, spec.max_positions or max_seq_length)
            require_memory(tune, view, spec, recipe, rows, length, memory)
        machine = measure(view, spec, recipe, place)
        if not preflight and others.get("budget") is None:  # a mixture says itself how large it is
            folder = next(p for p in (place, *place.parents) if p.exists())
            require_room(folder, max(0, machine.disk_need - Stage(place).bytes_there()))
        facts.append((CHECKPOINT, GIVEN_MACHINE.name, machine))
    if fix or unsafe_fixes:
        return None
    report = report_of(assess(view, recipe, rules, facts=facts, stage="header"), recipe, fail_on, started)
    if report.ok:
        return None
    progress(plural("not quantized: {n:,} error", "not quantized: {n:,} errors", report.count("error")))
    return report


def errors_of_headers(source: Checkpoint, recipe: Recipe) -> tuple[Message, ...]:
    """What rules find in the headers that would end a run of `quantize` before its first layer."""
    rules = select_rules(load_rules())
    recipe = replace(recipe, goal="quantize")
    view, decoding = _as_gguf(source) if source.gguf else read_as_floats(source, recipe, rules)
    facts = [(CHECKPOINT, DECODED.name, decoding)] if decoding else []
    found = assess(view, recipe, rules, facts=facts, stage="header").findings
    wrong = [f for f in found if f.severity == "error" and not f.consequence_of]
    return tuple(_("{code}: {message}", code=f.code, message=f.message) for f in wrong)


def _require_machine(
    view: Checkpoint, spec: ModelSpec, config: Mapping[str, Any], recipe: Recipe, memory: int | None
) -> None:
    """Raises where transformers does not define the family, or `memory` is less than any run takes."""
    if not streams(recipe):  # which runs no model, and holds a few MiB of a tensor
        require_family(config, spec)
        budget.require(budget.needs(view, spec, recipe, int(recipe.calibrated), 1), memory)


def require_nothing_to_fix(source: Checkpoint, fix: bool) -> None:
    """Raises PlanRefused where fixes are asked for of a GGUF file, in which they change nothing."""
    if source.gguf and fix:
        raise PlanRefused(
            _("{name}: is GGUF; fixes are of safetensors and JSON files, and it has none.", name=source.name),
            _("Leave --fix out, or write it as a checkpoint first: `doctor convert --format bf16`."),
        )


def judged_alone(source: Checkpoint, rules: list[Rule], hint: Message, but: Collection[str] = ()) -> Assessment:
    """What headers show of a checkpoint by itself, without a plan. Raises PlanRefused for its first error, but for
    codes in `but` and what follows from them.
    """
    found = assess(source, alone(source), rules, stage="header")
    wrong = [f for f in found.findings if f.severity == "error" and not {f.code, f.consequence_of} & set(but)]
    if wrong:
        raise PlanRefused(
            _("{checkpoint}: {code}: {message}.", checkpoint=source.name, code=wrong[0].code, message=wrong[0].message),
            hint,
        )
    return found


def alone(checkpoint: Checkpoint) -> Recipe:
    """The recipe that judges the files of a checkpoint and no plan."""
    return replace(stored_recipe(checkpoint, Recipe()), goal="none")


def require_tunable(
    quantized: Checkpoint, original: Checkpoint, output: Path, rules: list[Rule], overwrite: bool = False
) -> Assessment:
    """Raises what `tune` refuses by headers: an output that may not be written, files that cannot be read, no codes,
    one checkpoint twice, two models, errors of the files.
    """
    check_output(quantized, output, overwrite)
    for checkpoint in (original, quantized):
        if checkpoint.gguf:
            raise PlanRefused(
                _("{name}: is GGUF; tune reads checkpoints in safetensors.", name=checkpoint.name),
                _("`doctor convert --format bf16` writes one of it."),
            )
    files = [rule for rule in rules if rule.code in UNREADABLE]
    for checkpoint in (original, quantized):
        judged_alone(checkpoint, files, _("`doctor check` says more, and what to do."))
    if not holds_quantized(quantized):
        raise no_scales(quantized)
    if quantized.root.resolve() == original.root.resolve():
        raise PlanRefused(
            _("{name}: is given as the quantized checkpoint and as its original; must be two.", name=quantized.name),
            ARGUMENTS,
        )
    require_same_model(original, quantized)
    config = original.value("config.json") or {}
    require_family(config, build_spec(config, original.tensors))
    return judged_alone(quantized, rules, _("Tuning changes scales alone: `doctor check` and `doctor fix` come first."))


def require_comparable(original: Checkpoint, quantized: Checkpoint, text: str | os.PathLike | None = None) -> None:
    """Raises what `verify` refuses by headers: files whose tensors cannot be read, two models, an unknown family, a
    text that cannot be read.
    """
    if text is not None:
        require_text(Path(text))
    files = [rule for rule in load_rules() if rule.code in UNREADABLE]
    for checkpoint in (original, quantized):
        judged_alone(checkpoint, files, _("`doctor check` says more, and what to do."))
        if not checkpoint.gguf and checkpoint.value("config.json") is None:
            raise BadCheckpoint(
                _("{name}: config.json is absent or broken; the model's shape stands there.", name=checkpoint.name)
            )
    first, second = (described(checkpoint) for checkpoint in (original, quantized))
    require_same_model(first, second)
    config = first.value("config.json") or {}
    require_family(config, build_spec(config, first.tensors))


def described(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself; a GGUF model as transformers sees it, for its config.json and headers. Raises
    BadCheckpoint.
    """
    return _as_gguf(checkpoint)[0] if checkpoint.gguf else checkpoint


def _as_gguf(checkpoint: Checkpoint) -> tuple[Checkpoint, Decoding]:
    """A GGUF model's view and how it is decoded, without its tokenizer, which takes seconds to make."""
    from doctor.edits.gguf_floats import GgufAsFloats  # it needs NumPy

    view = GgufAsFloats(checkpoint, tokenizer=False)
    return view, view.decoding


def require_cached(
    checkpoint: Checkpoint,
    *,
    context: int = 1,
    batch: int = 1,
    rows: int = 1,
    text: str | os.PathLike | None = None,
    measure: bool = False,
    **_others: Any,
) -> None:
    """Raises what `kvcache` refuses by options and headers: numbers below 1, no config.json, a GGUF model that is not
    read, and, where the model is to be run, an unknown family or a text that cannot be read.
    """
    for name, value in (("--context", context), ("--batch", batch), ("rows", rows)):
        if value < 1:
            raise DoctorError(_("{option} {value}: must be 1 or more.", option=name, value=value))
    checkpoint = described(checkpoint)
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(
            _("{name}: config.json is absent or broken; the cache's shape stands there.", name=checkpoint.name)
        )
    if measure:
        require_family(config, build_spec(config, checkpoint.tensors))
        if text is not None:
            require_text(Path(text))


def require_named(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> None:
    """Raises PlanRefused for a pattern of linears that no module of the checkpoint matches: it says what was not
    meant, and the linears would be quantized all the same.
    """
    asked = _patterns(recipe)
    if not asked:
        return
    names = set(_modules(*unfuse(checkpoint, spec, recipe)))
    for option, pattern in asked:
        if not any(matches(pattern, name) for name in names):
            raise PlanRefused(
                _(
                    "{option} {pattern}: matches none of the {n:,} modules of {name}, such as {example}.",
                    option=option,
                    pattern=pattern,
                    n=len(names - checkpoint.tensors.keys()),
                    name=checkpoint.name,
                    example=min((x.name for x in spec.linears), default=min(names, default="")),
                ),
                _("A pattern is a part of a name, or a shell pattern such as '*down_proj'."),
            )


def _patterns(recipe: Recipe) -> list[tuple[str, str]]:
    """(option, pattern) of every pattern of linears that a user gave."""
    asked = [("--ignore", p) for p in recipe.keep]
    return asked + [("--override", text.rpartition("=")[0]) for text in recipe.bits_for]


def _require_named_as_stored(source: Checkpoint, recipe: Recipe) -> None:
    """`require_named` before anything is judged or decoded, which takes seconds of a mixture of thousands of linears.
    Left to later where experts are stacked: their own names stand in no file.
    """
    config = source.value("config.json")
    stacked = any(len(info.shape) > 2 for info in source.tensors.values())
    if _patterns(recipe) and config is not None and source.tensors and not stacked and not source.gguf:
        require_named(source, build_spec(config, source.tensors), recipe)


def _modules(checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[str]:
    """Names that a pattern may mean: of linears, of every other tensor and its module, and of a head that is tied to
    the embedding and has no tensor.
    """
    yield from (linear.name for linear in spec.linears)
    for name in checkpoint.tensors:
        yield name
        yield name.rpartition(".")[0]
    yield from (t.tensor.rpartition(".")[0] for t in spec.templates if "{" not in t.tensor)
    yield "lm_head"


def require_family(config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raises NotQuantizable for a model type that the installed transformers does not define. Its sources are read for
    the name, since importing it takes seconds.
    """
    whole, part = (str(stated.get("model_type") or "") for stated in (config, spec.section(config)))
    defined = _defined()
    if not defined or any(kind and f'"{kind}"' in defined for kind in (whole, part)):
        return
    raise NotQuantizable(
        _(
            "config.json#/model_type: {kind!r} is not defined in transformers {version}.",
            kind=part or whole,
            version=version("transformers"),
        ),
        _("Install a transformers that has it: code that comes with a checkpoint is never run."),
    )


@cache
def _defined() -> str:
    """The sources of transformers that name every model type; "" where they cannot be read."""
    found = importlib.util.find_spec("transformers")
    folders = found.submodule_search_locations if found else None
    if not folders:
        return ""
    return "".join(_texts(Path(folders[0], "models", "auto")))


def _texts(folder: Path) -> Iterable[str]:
    for name in _MAPPINGS:
        try:
            yield (folder / name).read_text(encoding="utf-8")
        except OSError:  # transformers 4 has one of them
            continue
