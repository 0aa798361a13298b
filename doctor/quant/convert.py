"""`doctor convert` from end to end: plan, stage, read back, let the client load it, commit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.facts import COSTS
from doctor.core.messages import Message, _
from doctor.edits.gguf_floats import read_through
from doctor.fixing.apply import apply_plan
from doctor.fixing.assess import Assessment, Progress, assess, no_progress
from doctor.fixing.consent import Consent
from doctor.fixing.filesystem import Carry
from doctor.fixing.outputs import check_output
from doctor.fixing.plan import Plan, caused, refuse
from doctor.fixing.result import report_of
from doctor.fixing.staging import hold_output
from doctor.fixing.step import Step
from doctor.lint.engine import Report, load_rules
from doctor.lint.rule import Rule
from doctor.quant.client import Client
from doctor.quant.conversion import FLOATS, Conversion, plan_conversion
from doctor.quant.early import alone, judged_alone

COMMAND = "convert"
LABELS = ("O621", "O623", "O651", "O652")  # defects of quantization_config alone, which plain floats do not have


@dataclass
class Converted:
    """What was written. old_bytes, new_bytes: of all tensors, before and after. written: changed files; linked: the
    others. report: of the output, judged for its files alone.
    """

    output: Path
    receipt: Path
    conversion: Conversion
    report: Report
    old_bytes: int
    new_bytes: int
    written: int
    linked: int
    notes: list[Message] = field(default_factory=list)


def convert(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    target: str,
    *,
    client: Client | None = None,
    carry: Carry = Carry.AUTO,
    overwrite: bool = False,
    rules_dirs: Iterable[Path] = (),
    progress: Progress = no_progress,
) -> Converted:
    """Write a quantized checkpoint in the format `target` (conversion.targets()) to `output`, complete or not at all.

    Where both formats hold integers, codes, scales and zero points stay, and each linear is unpacked again and compared
    while it is written. client: builds the model's class for the list of what stays in 16 bits, and loads the staged
    files; what it does not load whole is refused unless the source does not load either. Raises PlanRefused,
    MachineError, BadCheckpoint; then there is no output.
    """
    started = time.perf_counter()
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    place = Path(os.path.abspath(output))
    check_output(source, place, overwrite)
    rules = load_rules(dict.fromkeys(rules_dirs))
    hint = _("Convert copies what is there: `doctor check` and `doctor fix` come first.")
    before = judged_alone(source, rules, hint, LABELS if target in FLOATS else ())
    conversion = plan_conversion(source, target, client.linears if client else None)
    plan = _plan(source, conversion, before, rules, progress)
    refuse(plan)
    with hold_output(place):
        done = apply_plan(
            plan,
            place,
            rules,
            carry=carry,
            overwrite=overwrite,
            stage=_stage(conversion),
            progress=progress,
            load=client.prove if client else None,
        )
    report = report_of(done.assessment, plan.recipe, "error", started)
    report.checkpoint = done.output.name
    report.summary["path"] = str(done.output)
    report.findings += done.loading
    return Converted(
        done.output,
        done.receipt,
        conversion,
        report,
        source.total_bytes,
        plan.overlay.total_bytes,
        len(plan.files_written),
        len(plan.files_linked),
        [*conversion.notes, *done.notes],
    )


def _stage(conversion: Conversion) -> str:
    """What is read back under the rules: codes that are the same were judged with the source, and are compared while
    they are written; floats are new values.
    """
    return "header" if conversion.exact else COSTS[-1]


def _plan(
    source: Checkpoint, conversion: Conversion, before: Assessment, rules: list[Rule], progress: Progress
) -> Plan:
    overlay = read_through(source, conversion.edits)
    recipe = alone(overlay)
    after = assess(overlay, recipe, rules, stage=_stage(conversion), progress=lambda n: progress("scan", n))
    title = _("{old} to {new}", old=conversion.old, new=conversion.new)
    step = Step(COMMAND, COMMAND, "safe" if conversion.exact else "unsafe", title, edits=list(conversion.edits))
    plan = Plan(source, overlay, recipe, before, after, Consent(), [step])
    plan.problems = [
        _("{code} would appear: {message}", code=f.code, message=f.message)
        for f in caused(plan.before, after)
        if f.severity == "error"
    ]
    return plan
