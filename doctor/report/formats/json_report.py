"""The report as data: schema `doctor.report/1` (schema.json beside this file). Every other format can be made from it.

Texts are English. `messages` holds the template and values behind each text that is a message, so that a report can be
rendered in another language later; a report without it renders in English.

`from_dict(to_dict(r))` gives the same report again, but for rule functions, which are not data, and for what JSON
cannot hold: NaN and infinities become the strings "NaN", "Infinity", "-Infinity", since a document with bare NaN is not
JSON.
"""

import dataclasses
import json
import math
from typing import Any, get_args

from doctor.core.errors import DoctorError
from doctor.core.finding import Finding, Fix, Place
from doctor.core.messages import collected, restored
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.edits import kinds
from doctor.fixing.output_summary import quantization_summary
from doctor.lint.engine import Report, RuleRun
from doctor.lint.rule import Rule, write_page
from doctor.report.text import safe_json

SCHEMA = "doctor.report/1"
_EDITS = {c.__name__: c for c in get_args(kinds.Edit)}


def render(reports: list[Report]) -> str:
    """One document: the report, or an object with `reports` where several checkpoints were checked."""
    if len(reports) == 1:
        return dumps(to_dict(reports[0]))
    return dumps(
        {"schema": SCHEMA, "ok": all(r.ok and not r.crashed for r in reports), "reports": [to_dict(r) for r in reports]}
    )


def failure(error: Exception) -> str:
    """The document of a run that could not do its work."""
    message = getattr(error, "message", "") or str(error)
    return dumps(
        {
            "schema": SCHEMA,
            "ok": False,
            "version": __version__,
            "error": {"type": type(error).__name__, "message": message, "hint": getattr(error, "hint", "") or ""},
        }
    )


def dumps(document: dict) -> str:
    return safe_json(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def plain(value: Any) -> Any:
    """Only what JSON has: dict, list, str, int, float, bool, None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def to_dict(report: Report) -> dict:
    """The report as plain data, by schema.json."""
    found = {f.code for f in (*report.findings, *report.suppressed, *report.gone)}
    return plain(
        {
            "schema": SCHEMA,
            "ok": report.ok and not report.crashed,
            "version": report.version,
            "checkpoint": report.checkpoint,
            "plan": report.recipe.label(),
            "recipe": report.recipe,
            "fail_on": report.fail_on,
            "summary": report.summary,
            "counts": {s: report.count(s) for s in ("error", "warning", "info")},
            "findings": [_finding(f) for f in report.findings],
            "suppressed": [_finding(f) for f in report.suppressed],
            "baseline": report.baseline,
            "gone": [_finding(f) for f in report.gone],
            "rules": [_run(r, r.rule.code in found) for r in report.runs],
            "skipped_tensors": report.skipped_tensors,
            "bytes_read": report.bytes_read,
            "seconds": round(report.seconds, 4),
            "linears": report.linears,
            "extra": report.extra,
            "messages": collected(report),
        }
    )


def english(page: dict) -> dict:
    """The English sections of a stored page; reports of older versions held the Chinese ones too."""
    return {name: text for name, text in page.items() if name.isascii()}


def _finding(item: Finding) -> dict:
    data = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    data["fix"] = (
        None
        if item.fix is None
        else {
            "title": item.fix.title,
            "safety": item.fix.safety,
            "by_name": item.fix.by_name,
            "needs": item.fix.needs,
            "edits": [_edit(e) for e in item.fix.edits],
        }
    )
    return data


def _edit(edit) -> dict:
    """Fields by name, with the edit's kind; a field that is MISSING ("the key is not there") is left out."""
    values = {f.name: getattr(edit, f.name) for f in dataclasses.fields(edit)}
    return {"edit": type(edit).__name__, **{k: v for k, v in values.items() if v is not kinds.MISSING}}


def _run(run: RuleRun, with_page: bool) -> dict:
    r = run.rule
    data = {
        "code": r.code,
        "name": r.name,
        "title": r.title,
        "severity": r.severity,
        "certainty": r.certainty,
        "scope": r.scope,
        "stage": r.cost,
        "needs": r.needs,
        "implied_by": r.implied_by,
        "module": r.module,
        "status": run.status,
        "judged": run.judged,
        "seconds": round(run.seconds, 6),
        "reasons": run.reasons,
        "crashed": run.crashed,
    }
    if with_page:
        data |= {"page": r.sections, "seen_as": [{"tool": s.tool, "text": s.text} for s in r.seen_as]}
    return data


def from_dict(document: dict) -> Report:
    """The report of a document by schema.json. Raises DoctorError for what is none."""
    if isinstance(document, dict) and isinstance(document.get("linears"), list) and "outcomes" in document:
        return _of_receipt(document)
    if isinstance(document, dict) and (
        str(document.get("schema", "")).startswith("doctor.receipt/") or "outcomes" in document
    ):
        raise DoctorError(
            "this is a receipt: it says how a directory was made, and holds no findings.",
            "`doctor check DIR -f html:report.html` reports on the directory, its receipt included.",
        )
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise DoctorError(
            f"not a report: the schema must be {SCHEMA!r}.",
            "Make one with `doctor check CHECKPOINT -f json:doctor.json`.",
        )
    if "error" in document:
        raise DoctorError(
            f"this report holds only an error: {document['error'].get('message', '')}", "Run the check again."
        )
    document = restored(document, document.get("messages"))
    try:
        recipe = _recipe(document["recipe"])
        return Report(
            checkpoint=document["checkpoint"],
            recipe=recipe,
            findings=[_read_finding(f) for f in document["findings"]],
            runs=[_read_run(r) for r in document["rules"]],
            summary=document["summary"],
            skipped_tensors=document["skipped_tensors"],
            bytes_read=document["bytes_read"],
            seconds=document["seconds"],
            fail_on=document["fail_on"],
            version=document["version"],
            linears=document["linears"],
            extra=document["extra"],
            suppressed=[_read_finding(f) for f in document["suppressed"]],
            baseline=document["baseline"],
            gone=[_read_finding(f) for f in document["gone"]],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(error) from None


def _of_receipt(document: dict) -> Report:
    """What the receipt of a quantization says: the recipe, the calibration and what became of each linear."""
    try:
        return Report(
            checkpoint=str(document.get("name", "")),
            recipe=_recipe(document["recipe"]),
            findings=[],
            runs=[],
            version=str(document["doctor"]),
            linears=[x for x in document["linears"] if isinstance(x["solve"], dict)],
            extra={"receipt": quantization_summary(document), "receipt_only": True},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(error) from None


def _recipe(data: dict) -> Recipe:
    return Recipe(**{**data, **{k: tuple(data.get(k, ())) for k in ("keep", "bits_for", "schemes_for")}})


def _damaged(error: Exception) -> DoctorError:
    return DoctorError(f"the report is damaged: {type(error).__name__}: {error}.", "Make it again with `doctor check`.")


def read(text: str) -> list[Report]:
    """Reports of a JSON text. Raises DoctorError."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DoctorError(
            f"not JSON: {error}.", "Make a report with `doctor check CHECKPOINT -f json:doctor.json`."
        ) from None
    if isinstance(document, dict) and document.get("schema") == SCHEMA and isinstance(document.get("reports"), list):
        return [from_dict(d) for d in document["reports"]]
    return [from_dict(document)]


def _read_finding(data: dict) -> Finding:
    where = data["where"]
    place = Place(**{**where, "index": _tuple(where["index"]), "frame": tuple((n, t) for n, t in where["frame"])})
    fix = data["fix"]
    if fix is not None:
        fix = Fix(
            fix["title"], tuple(_read_edit(e) for e in fix["edits"]), fix["safety"], fix["by_name"], tuple(fix["needs"])
        )
    return Finding(
        **{**data, "where": place, "fix": fix, "facts_table": tuple(tuple(row) for row in data["facts_table"])}
    )


def _tuple(value):
    return None if value is None else tuple(value)


def _read_edit(data: dict):
    kind = _EDITS[data["edit"]]
    tuples = {f.name for f in dataclasses.fields(kind) if str(f.type).startswith("tuple")}
    return kind(**{k: tuple(v) if k in tuples else v for k, v in data.items() if k != "edit"})


def _read_run(data: dict) -> RuleRun:
    doc = write_page(data["code"], data["name"], data["title"], english(data.get("page", {})))
    entry = Rule(
        data["code"],
        data["name"],
        data["title"],
        data["severity"],
        data["certainty"],
        data["scope"],
        data["stage"],
        tuple(data["needs"]),
        _no_check,
        doc,
        tuple(data["implied_by"]),
        data["module"],
    )
    return RuleRun(entry, data["judged"], data["seconds"], dict(data["reasons"]), data["crashed"])


def _no_check(*_):
    raise DoctorError("a rule read from a report cannot judge.", "Run `doctor check`.")
