"""`doctor tune` from end to end: read the quantized checkpoint and its original, tune, write a copy with new scales.

The output has the same tensors, shapes, dtypes and codes as the quantized checkpoint; only scales and norm gains
differ, so what loaded it before loads it now. Where tuning does not lower the divergence on rows that it did not see,
nothing is written.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from doctor.checkpoint.directory import Checkpoint
from doctor.core.messages import Message, _
from doctor.core.records import CalibrationFacts
from doctor.edits.donor_registry import donate, tensor_digest
from doctor.edits.kinds import TakeTensor
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.apply import apply_plan
from doctor.fixing.assess import Assessment, assess, no_progress
from doctor.fixing.assess import Progress as BytesProgress
from doctor.fixing.consent import Consent
from doctor.fixing.plan import Plan, caused, refuse
from doctor.fixing.result import report_of
from doctor.fixing.step import Step
from doctor.lint.engine import Report, load_rules
from doctor.lint.rule import Rule
from doctor.model.spec import build_spec
from doctor.quant.block_change import NewValue
from doctor.quant.budget import free_memory
from doctor.quant.calibration.rows import calibration_rows
from doctor.quant.client import Client
from doctor.quant.dequantize import as_float
from doctor.quant.device import device_free, device_memory, device_of
from doctor.quant.early import alone, require_tunable
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.tuning.layerwise import LAYERS, settle
from doctor.quant.tuning.parameters import Gain, Scales
from doctor.quant.tuning.saved import Saved
from doctor.quant.tuning.student import Student, tunable
from doctor.quant.tuning.train import Ends, Progress, Trainer, last_states, watched_of
from doctor.quant.tuning.wanted import LAYER_ROWS, LENGTH, stride

COMMAND = "tune"
ROWS = 64
FEW_ROWS = 48  # up to so many rows are seen twice: more gain the same from one pass
_DONOR = "tuned"  # what receipts call the place that the new values come from


@dataclass(frozen=True)
class Outcome:
    """What tuning found. values: new tensors by name, {} where it did not help. start and end: KL in nats a token of
    `watched` rows that were not trained on, before and with those values.
    """

    values: dict[str, NewValue]
    start: float
    end: float
    watched: int
    trained: int
    steps: int
    scales: int
    gains: int
    progress: Progress

    @property
    def helped(self) -> bool:
        return bool(self.values)


@dataclass
class Tuned:
    """What a run did. output and report: None where tuning did not help, and nothing was written."""

    outcome: Outcome
    calibration: CalibrationFacts
    output: Path | None = None
    report: Report | None = None
    notes: list[str | Message] = field(default_factory=list)
    seconds: float = 0.0


def tune(
    quantized: str | os.PathLike | Checkpoint,
    original: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    *,
    calibration: str | os.PathLike | None = None,
    rows: int = ROWS,
    max_seq_length: int = LENGTH,
    passes: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    client: Client | None = None,
    rules_dirs: Iterable[Path] = (),
    say: Callable[[str], None] = lambda text: None,
    progress: BytesProgress = no_progress,
) -> Tuned:
    """Tune the scales and norm gains of `quantized` against `original`, and write the result to `output`.

    calibration, rows, max_seq_length: text as for quantize; one row in eight is watched and not trained on. passes:
    times that each other row is seen; None: twice up to 48 rows, once above. memory: bytes that codes may take in
    memory; half of what is free by default, and read again from disk above it. client: loads the staged output.

    Raises PlanRefused, NotQuantizable, BadCheckpoint, MachineError; then there is no output.
    """
    started = time.perf_counter()
    device = device_of(device)
    source, teacher = (x if isinstance(x, Checkpoint) else Checkpoint.open(x) for x in (quantized, original))
    place = Path(os.path.abspath(output))
    rules = load_rules(dict.fromkeys(rules_dirs))
    before = require_tunable(source, teacher, place, rules, overwrite)
    tunable(source)
    config = teacher.value("config.json") or {}
    spec = build_spec(config, teacher.tensors)
    found, facts, notes = calibration_rows(
        teacher,
        calibration,
        rows=rows,
        length=max_seq_length,
        seed=seed,
        vocab=spec.vocab,
        max_positions=spec.max_positions,
    )
    with device_memory(device):
        outcome = tuned_values(source, teacher, found, passes=passes, seed=seed, memory=memory, device=device, say=say)
    done = Tuned(outcome, facts, notes=list(notes))
    if outcome.helped:
        done.output, done.report, more = _write(
            source,
            place,
            outcome,
            before,
            rules,
            overwrite=overwrite,
            client=client,
            progress=progress,
            started=started,
        )
        done.notes += more
    done.seconds = time.perf_counter() - started
    return done


def tuned_values(
    quantized: Checkpoint,
    original: Checkpoint,
    rows: list[list[int]],
    *,
    passes: int | None = None,
    seed: int = 0,
    memory: int | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    unseen: list[list[int]] | None = None,
    saved: Saved | None = None,
    through: int | None = None,
    a_step: int = LAYER_ROWS,
) -> Outcome:
    """Tune on rows of token ids. unseen: rows to watch; None: one in eight of `rows`. saved: where the state is kept.
    through: after each layer by itself, at most so many rows are trained on from end to end; None: all.
    a_step: rows of a layer's step.
    Raises NotQuantizable, BadCheckpoint, MachineError.
    """
    if memory is None:
        memory = (device_free(device) or free_memory()) // 2
    watch = list(range(len(rows), len(rows) + len(unseen))) if unseen else watched_of(len(rows))
    ids = [torch.tensor([row]) for row in [*rows, *(unseen or ())]]
    teacher = as_float(original)
    spec = build_spec(teacher.value("config.json") or {}, teacher.tensors)
    skeleton = Skeleton(teacher, spec, device)
    longest = max(row.shape[1] for row in ids)
    student = Student(quantized, ids, device, memory)
    begun = saved.take_up(torch.device(device)) if saved else None
    trained = [r for r in range(len(ids)) if r not in set(watch)]
    within = begun if begun and LAYERS in begun[1] else None
    if (begun and not within) or not trained:
        say(_("tune: the original on {rows} rows of {tokens} tokens at most", rows=len(ids), tokens=longest))
        wanted = last_states(skeleton, ids)
    else:
        say(_("tune: layer by layer on {rows} rows of {tokens} tokens at most", rows=len(ids), tokens=longest))
        options: dict[str, Any] = {"a_step": a_step, "seed": seed, "say": say, "saved": saved, "begun": within}
        wanted = settle(student, skeleton, ids, trained, watch, **options).wanted
    trainer = Trainer(
        student,
        Ends(student, skeleton, stride(spec)),
        wanted,
        passes=passes or (2 if len(rows) <= FEW_ROWS else 1),
        seed=seed,
        say=say,
        watch=watch,
        saved=saved,
        begun=None if within else begun,
        through=through,
    )
    best = trainer.train()
    seen = trainer.progress.watched
    end = min(kl for _step, kl in seen)
    values = {name: student.tunables[name].stored(change).cpu() for name, change in best.items() if change.any()}
    return Outcome(
        values,
        seen[0][1],
        end,
        len(trainer.watch),
        len(ids) - len(trainer.watch),
        seen[-1][0],
        sum(isinstance(student.tunables[name], Scales) for name in values),
        sum(isinstance(student.tunables[name], Gain) for name in values),
        trainer.progress,
    )


def _write(
    source: Checkpoint,
    place: Path,
    outcome: Outcome,
    before: Assessment,
    rules: list[Rule],
    *,
    overwrite: bool,
    client: Client | None,
    progress: BytesProgress,
    started: float,
) -> tuple[Path, Report, list[Message]]:
    """A copy of the source with the new values, judged and loaded before it appears: (output, report, notes)."""
    with tempfile.TemporaryDirectory(prefix="doctor-tune-") as folder:
        tensors = {n: v for n, v in outcome.values.items() if isinstance(v, torch.Tensor)}  # blocks: in a run alone
        save_file(tensors, Path(folder, "model.safetensors"))
        donor = Checkpoint.open(folder)
        with donate(_DONOR, donor):
            edits = [
                TakeTensor(name, _DONOR, tensor_digest(donor, donor.tensors[name])) for name in sorted(outcome.values)
            ]
            overlay = EditedCheckpoint(source, edits)
            recipe = alone(overlay)
            after = assess(overlay, recipe, rules, progress=lambda n: progress("scan", n))
            title = _(
                "{scales} scales' tensors and {gains} norms tuned, KL {start:.4f} to {end:.4f}",
                scales=outcome.scales,
                gains=outcome.gains,
                start=outcome.start,
                end=outcome.end,
            )
            step = Step(COMMAND, COMMAND, "unsafe", title, edits=list(edits))
            plan = Plan(source, overlay, recipe, before, after, Consent(), [step])
            plan.problems = [
                _("{code} would appear: {message}", code=f.code, message=f.message)
                for f in caused(before, after)
                if f.severity == "error"
            ]
            refuse(plan)
            done = apply_plan(
                plan,
                place,
                rules,
                overwrite=overwrite,
                progress=progress,
                load=client.prove if client else None,
            )
    report = report_of(done.assessment, recipe, "error", started)
    report.checkpoint = done.output.name
    report.summary["path"] = str(done.output)
    report.findings += done.loading
    return done.output, report, done.notes
