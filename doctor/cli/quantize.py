"""`doctor quantize`: check, calibrate, quantize, check again."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from doctor.checkpoint import hub_push
from doctor.cli import sweep
from doctor.cli.command import Command
from doctor.cli.options import (
    FORMATS,
    OTHER_GOALS,
    PATH,
    LaterChoice,
    checkpoint_argument,
    device_option,
    format_option,
    given,
    lang_option,
    memory_option,
    option,
    other_schemes,
    outputs_of,
    overrides,
    overwrite_option,
    patterns,
    plan_options,
    progress_option,
    size_in_bytes,
    unsafe_option,
    verbose_option,
    words,
)
from doctor.cli.output import Outputs, emit, exit_for, json_on_failure, notice, write
from doctor.cli.progress import run_lines
from doctor.cli.recipe import asked_recipe
from doctor.core.messages import _
from doctor.core.recipe import DAMP, DAMP_MAX
from doctor.core.recipe import FORMATS as OUTPUT_FORMATS
from doctor.locale import catalogue

if TYPE_CHECKING:
    from doctor.lint.engine import Report
    from doctor.quant.allocation.budget import Budget
    from doctor.report.screen import Steps

USUAL_ROWS = 4  # of the comparison at the end: enough for a spread, and few beside those that calibrate


@click.command(
    cls=Command,
    help=_(
        "Check, calibrate, quantize and check the result.\n\n"
        "`torchrun --nproc-per-node N -m doctor quantize …` shares the work among N processes."
    ),
)
@checkpoint_argument
@option("-o", "--output", type=PATH, required=True, metavar="DIR", help=_("Directory to write; must not exist."))
@plan_options
@option(
    "--act-order/--no-act-order",
    default=True,
    help=_("Columns in order of importance; groups stay as they are."),
)
@option("--mse/--no-mse", default=True, help=_("Search each group's scale for the least squared error."))
@option(
    "--format",
    type=LaterChoice(OUTPUT_FORMATS),
    metavar="NAME",
    default=None,
    help=_("File format: gptq, gptq_v2, awq, compressed-tensors …  [default: the method's own]"),
)
@option(
    "--damp",
    type=float,
    default=DAMP,
    help=_("Least share of the mean diagonal added to each Hessian; few rows get more, 0 adds none."),
)
@option("--damp-max", type=float, default=DAMP_MAX, help=_("Most that few rows or a retry raise it to."))
@option(
    "--calibration",
    metavar="FILE|ORG/NAME",
    default=None,
    show_default=False,
    help=_(
        "Text, JSONL, Parquet or a dataset on the Hub.  [default: Python's documentation and text the model writes; "
        "yours is better]"
    ),
)
@option("--rows", type=int, default=None, help=_("Calibration rows.  [default: 128]"))
@option("--max-seq-length", type=int, default=None, help=_("Tokens per row, at most.  [default: 512]"))
@option("--seed", type=int, default=0, help=_("Of everything that is drawn at random."))
@option(
    "--ignore",
    "ignore_linears",
    multiple=True,
    metavar="PATTERN",
    aliases=("--keep",),
    full_names=("--ignore-linears",),
    help=_("Linears left in 16 bits; repeatable."),
)
@option(
    "--override",
    multiple=True,
    metavar="PATTERN:KEY=VALUE",
    aliases=("--bits-for",),
    help=_(
        "Other bits or another scheme for some linears, as {bits} or {scheme}; repeatable. In the GPTQ format "
        "transformers does not read other bits.",
        bits="'{0,1}.*down_proj:bits=8'",
        scheme="'*self_attn*:scheme=FP8_DYNAMIC'",
    ),
)
@option(
    "--bpw",
    type=float,
    default=None,
    metavar="BITS",
    help=_(
        "Bits a weight on average, scales counted, as 4.25: each linear gets the bits that its effect on the output "
        "asks for. Writes compressed-tensors unless --format says otherwise."
    ),
)
@option("--size", default="", metavar="BYTES", help=_("The same by the bytes of all tensors, as 24GB."))
@option(
    "--schemes",
    default="",
    metavar="W4A16,W8A16",
    help=_("With --bpw or --size: the widths to choose from.  [default: all but 2 bits]"),
)
@option(
    "--measurement",
    type=PATH,
    default=None,
    metavar="FILE",
    help=_("With --bpw or --size: what each width does. Read where it exists, else written, for other budgets."),
)
@option(
    "--kv-cache",
    type=click.Choice(["fp8", "fp8-head"]),
    default=None,
    show_default=False,
    help=_("Measure the scales of an FP8 cache of keys and values, one a layer or one a head; compressed-tensors."),
)
@option(
    "--tune",
    metavar="auto|off|ROWS",
    default="auto",
    help=_(
        "Rows to tune scales and norms on after the last layer: layer by layer, then from end to end; auto: from end "
        "to end only as far as it all takes about as long as the layers."
    ),
)
@option("--vision", is_flag=True, help=_("Quantize the vision tower's layers too; calibrated by rows with images."))
@option("--fix", is_flag=True, help=_("Apply safe fixes first, without writing the fixed copy."))
@unsafe_option
@memory_option(_("Most memory to use, as 24GB.  [default: what is free]"))
@device_option
@option(
    "--plan",
    "plan_only",
    is_flag=True,
    help=_("Only print the memory, disk and time that it takes, from headers and two seconds of measuring."),
)
@option(
    "--preflight",
    is_flag=True,
    help=_("Quantize the first and last decoder layer only, write nothing: would it fail, how long would it take?"),
)
@option("--recipes", type=PATH, default=None, metavar="FILE", help=sweep.HELP)
@option(
    "--verify",
    "verify_rows",
    type=int,
    default=None,
    metavar="ROWS",
    help=_(
        "Compare the output with its original on so many rows that did not calibrate it; 0 does not.  [default: 4, and "
        "none where no model is run]"
    ),
)
@option(
    "--push",
    default="",
    metavar="ORG/NAME",
    help=_("Then upload the output to this repository of the Hub, private where it is new."),
)
@option(
    "--imatrix",
    type=PATH,
    default=None,
    metavar="FILE",
    help=_("Importance of columns for llama-quantize, as GGUF; only for its formats."),
)
@option("--resume", is_flag=True, help=_("Go on where an interrupted run stopped."))
@option(
    "--retry-failed",
    is_flag=True,
    help=_(
        "With --resume, of a finished DIR: solve again only the linears that fell back, with the rows and damping "
        "given now."
    ),
)
@overwrite_option
@format_option(FORMATS, "--report")
@verbose_option
@lang_option
@progress_option
def command(
    path: str,
    output: Path,
    format: str | None,
    ignore_linears: tuple[str, ...],
    override: tuple[str, ...],
    calibration: str | None,
    rows: int | None,
    max_seq_length: int | None,
    unsafe_fixes: str,
    memory: str,
    device: str,
    plan_only: bool,
    preflight: bool,
    recipes: Path | None,
    imatrix: Path | None,
    bpw: float | None,
    size: str,
    schemes: str,
    measurement: Path | None,
    kv_cache: str | None,
    tune: str,
    verify_rows: int | None,
    push: str,
    formats: tuple[str, ...],
    fix: bool,
    resume: bool,
    retry_failed: bool,
    overwrite: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """flags: those of the recipe, and fields of the recipe under their own names."""
    from doctor import api

    outputs = outputs_of(formats)
    with json_on_failure(outputs):
        if flags["method"] in OTHER_GOALS:
            raise click.UsageError(
                _("--for {goal} quantizes nothing: doctor check judges the files.", goal=flags["method"])
            )
        if retry_failed and not resume:
            raise click.UsageError(_("--retry-failed goes with --resume."))
        budget = _budget(bpw, size, schemes, measurement)
        if (budget is not None or kv_cache) and not flags["scheme"]:
            format = format or "compressed-tensors"  # whose mixtures transformers and vLLM read, and which holds scales
        recipe = asked_recipe(
            flags,
            format=format or "",
            keep=patterns(ignore_linears),
            bits_for=overrides(override),
            schemes_for=other_schemes(override),
            kv_cache=kv_cache or "",
            **{name: flags[name] for name in ("act_order", "mse", "damp", "damp_max", "seed", "vision")},
        )
        run = given(rows=rows, max_seq_length=max_seq_length, memory=size_in_bytes(memory), calibration=calibration)
        if verify_rows is not None and verify_rows < 0:
            raise click.BadParameter(_("{rows} must be 0 or more.", rows=verify_rows), param_hint="'--verify'")
        compared = (USUAL_ROWS if recipe.calibrated else 0) if verify_rows is None else verify_rows
        if push:
            hub_push.require_pushable(push)
        if plan_only:
            planned = {**run, **given(budget=budget), "device": device, "tune": _rows_to_tune(tune)}
            planned |= {"compare_rows": compared, "fixed": fix or bool(unsafe_fixes)}
            _print_forecast(api.plan_quantize(path, output, recipe, **planned), outputs)
        if recipes is not None:
            if not preflight:
                raise click.UsageError(_("--recipes goes with --preflight: one run quantizes by one recipe."))
            options = {**run, "fix": fix, "unsafe_fixes": words([unsafe_fixes]), "device": device}
            sweep.try_recipes(path, output, recipes, recipe, formats, **options)
        with run_lines(notice) as line:
            result = api.quantize(
                path,
                output,
                recipe,
                fix=fix,
                unsafe_fixes=words([unsafe_fixes]),
                resume=resume,
                overwrite=overwrite,
                progress=line,
                tune=_rows_to_tune(tune),
                device=device,
                compare_rows=compared,
                **run,
                **given(
                    preflight=preflight or None,
                    retry_failed=retry_failed or None,
                    imatrix=imatrix,
                    budget=budget,
                ),
            )
        if int(os.environ.get("RANK", "0")):  # under torchrun, rank 0 speaks for all
            exit_for([result.report])
        then = _next(path, result.output, result.report) if result.output and result.report.ok else ()
        emit([result.report], outputs, verbose, then=then)
    if result.forecast is not None:
        _print_forecast(result.forecast, [], result.report)
    notice(_("Wrote {file}", file=output) if result.output else _("Nothing was written."))
    if push and result.output and result.report.ok:
        notice(_("Uploaded to {url}", url=hub_push.push(result.output, push)))
    elif push:
        notice(_("Not uploaded: {name}", name=push))
    exit_for([result.report])


def _budget(bpw: float | None, size: str, schemes: str, measurement: Path | None) -> "Budget | None":
    """What the flags say of a budget, None where they say nothing. Raises UsageError for what does not go together."""
    if bpw is None and not size:
        if schemes or measurement:
            raise click.UsageError(_("--schemes and --measurement: need --bpw or --size."))
        return None
    if bpw is not None and size:
        raise click.UsageError(_("--bpw and --size: one of the two."))
    if bpw is not None and not 0 < bpw <= 16:
        raise click.UsageError(_("--bpw {bits:g}: must be above 0 and at most 16.", bits=bpw))
    from doctor.formats.schemes import integer_bits
    from doctor.quant.allocation.budget import Budget

    return Budget(bpw, size_in_bytes(size, "--size"), tuple(map(integer_bits, words([schemes]))), measurement)


def _next(original: str, output: Path, report: "Report") -> "Steps":
    from doctor.report import after

    files = sorted(file.name for file in output.glob("*.gguf"))
    shown = Path(os.path.relpath(output)) if output.is_relative_to(Path.cwd()) else output
    kind = str(report.summary.get("kind", "decoder"))
    return after.commands(original, shown, report.recipe, files[0] if files else "", kind)


def _print_forecast(forecast: Any, outputs: Outputs = (), report: "Report | None" = None) -> NoReturn:
    """Print it, or write it as JSON where -f json asks for that, and exit: 1 where the run would fail."""
    from doctor.report.formats.json_report import dumps
    from doctor.report.screen import console, show_labelled

    for file in [file for name, file in outputs if name == "json"]:
        write(dumps({"schema": "doctor.plan/1", **forecast.as_dict()}) + "\n", file)
    if ("json", "") not in outputs:
        show_labelled(map(catalogue.translated, forecast.lines()), console(sys.stdout))
    sys.exit(1 if forecast.problems or (report is not None and not report.ok) else 0)


def _rows_to_tune(text: str) -> str | int:
    """auto, off, or a number of rows. Raises click.UsageError."""
    if text in ("auto", "off"):
        return text
    if not text.isdecimal() or int(text) < 2:
        raise click.UsageError(_("--tune {rows}: must be auto, off or a number of rows from 2 on.", rows=text))
    return int(text)
