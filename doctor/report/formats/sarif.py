"""SARIF 2.1.0, for code scanning.

A result must be anchored in text: a region of a binary file may not carry lines, and GitHub shows only the first
location and needs its lines. So a tensor is shown at its own line of the index, else at line 1 of config.json, and its
bytes stand in relatedLocations. Findings alike in many layers are one result with occurrenceCount: code scanning takes
25,000 results a run, which two bad tensors per layer of a large mixture of experts would fill.
"""

import json
import os
from typing import Any

from doctor.core.finding import Place
from doctor.lint.engine import Report, fold
from doctor.lint.rule import Rule, SetJson
from doctor.locale import rule_pages
from doctor.report import presentation, verdict
from doctor.report.presentation import Group
from doctor.report.text import one_line, relative, safe

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {"error": "error", "warning": "warning", "info": "note"}
INDEX = "model.safetensors.index.json"
_PRECISION = {"certain": "very-high", "likely": "high", "hint": "low"}
_RANK = {"certain": 99.0, "likely": 80.0, "hint": 40.0}


def render(reports: list[Report]) -> str:
    """One run per checkpoint."""
    document = {"$schema": SCHEMA, "version": "2.1.0", "runs": [_run(r) for r in reports]}
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


def _run(report: Report) -> dict:
    found = [g for root in presentation.groups(report) for g in (root, *root.effects)]
    found += [Group(first, every) for hidden in (report.suppressed, report.gone) for first, every in fold(hidden)]
    rules = [r.rule for r in report.runs]
    files = list(dict.fromkeys(f for g in found for f in (_text_file(g.first.where, report), g.first.where.file) if f))
    root = str(report.summary.get("path") or report.checkpoint).rstrip("/")
    return {
        "tool": {
            "driver": {
                "name": "doctor",
                "semanticVersion": report.version,
                "version": report.version,
                "rules": [_rule(r, any(g.code == r.code for g in found)) for r in rules],
            }
        },
        "originalUriBaseIds": {"MODELROOT": {"description": {"text": f"the checkpoint {safe(root)}"}}},
        "artifacts": [{"location": _location(f), "mimeType": _mime(f)} for f in files],
        "results": [_result(g, report, rules, files) for g in found],
        "invocations": [{"executionSuccessful": not report.crashed, "toolExecutionNotifications": _notes(report)}],
        "columnKind": "unicodeCodePoints",
        "properties": {"plan": verdict.plan_label(report), "ready": report.ok},
    }


def _rule(entry: Rule, with_page: bool) -> dict:
    data = {
        "id": entry.code,
        "name": "".join(p.capitalize() for p in entry.name.split("-")),
        "shortDescription": {"text": entry.title + "."},
        "defaultConfiguration": {"level": LEVELS[entry.severity]},
        "properties": {
            "tags": list(dict.fromkeys((entry.area.lower(), entry.certainty, entry.cost))),
            "precision": _PRECISION[entry.certainty],
            "problem.severity": {"info": "recommendation"}.get(entry.severity, entry.severity),
        },
    }
    if with_page and entry.sections:
        data["fullDescription"] = {"text": presentation.why(entry) or entry.title}
        data["help"] = {
            "text": one_line(entry.section("Do")) or entry.title,
            "markdown": rule_pages.markdown(entry),
        }
    return data


def _result(group: Group, report: Report, rules: list[Rule], files: list[str]) -> dict:
    first = group.first
    text_file = _text_file(first.where, report)
    line, column, length = (
        (first.where.line, first.where.column, first.where.length) if text_file == first.where.file else (None,) * 3
    )
    line, column, length = line or 1, column or 1, length or 1
    physical = {
        "artifactLocation": _artifact(text_file, files),
        "region": {"startLine": line, "startColumn": column, "endLine": line, "endColumn": column + length},
    }
    location: dict = {"physicalLocation": physical}
    if first.where.tensor:
        location["logicalLocations"] = [{"fullyQualifiedName": group.names, "kind": "tensor"}]
    message = (
        group.message if group.folds_into_message else f"{group.message} (and {len(group.all) - 1} more: {group.names})"
    )
    fixes = " ".join(
        f"{label}: {text}."
        for label, text in presentation.fixes(group, presentation.page_rule(report, first.code), report)
    )
    result: dict[str, Any] = {
        "ruleId": first.code,
        "level": LEVELS[first.severity],
        "kind": "fail",
        "occurrenceCount": len(group.all),
        "rank": _RANK[first.certainty],
        "message": {"text": f"{message}. {fixes}".strip()},
        "locations": [location],
        "partialFingerprints": {"doctorFinding/v1": presentation.fingerprint(first)},
        "properties": {"certainty": first.certainty, "evidence": _evidence(first.evidence)},
    }
    codes = [r.code for r in rules]
    if first.suppression:
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": safe(first.suppression["reason"])}
        ]
    if first.baseline_state:
        result["baselineState"] = first.baseline_state
    if first.code in codes:
        result["ruleIndex"] = codes.index(first.code)
    if first.where.tensor and first.where.file and first.where.file != text_file:
        result["relatedLocations"] = [_bytes(first.where, files)]
    edits = _fixes(first, files)
    if edits:
        result["fixes"] = edits
    return result


def _text_file(where: Place, report: Report) -> str:
    """The file whose text stands for this place."""
    if where.file and not where.file.endswith(".safetensors"):
        return where.file
    return INDEX if report.summary.get("shards", 0) > 1 else "config.json"


def _bytes(where: Place, files: list[str]) -> dict:
    """The tensor's element in its shard: a binary region, which has no lines."""
    place: dict = {"artifactLocation": _artifact(where.file, files)}
    if where.byte is not None:
        place["region"] = {"byteOffset": where.byte}
    index = "" if where.index is None else "[" + ", ".join(map(str, where.index)) + "]"
    return {"id": 1, "message": {"text": safe(f"{where.tensor}{index}")}, "physicalLocation": place}


def _artifact(file: str, files: list[str]) -> dict:
    return {**_location(file), "index": files.index(file)}


def _location(file: str) -> dict:
    """A file of the checkpoint, from its root; a configuration file from the working directory."""
    return {"uri": _uri(relative(file))} if os.path.isabs(file) else {"uri": _uri(file), "uriBaseId": "MODELROOT"}


def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.encode("utf-8", "backslashreplace"))


def _mime(file: str) -> str:
    return "application/json" if file.endswith(".json") else "application/octet-stream"


def _evidence(evidence: dict) -> dict:
    from doctor.report.formats.json_report import plain

    return plain(evidence)


def _fixes(finding, files: list[str]) -> list[dict]:
    """Fixes that change one JSON value; tensor edits would have to carry their bytes, so they are only described."""
    fix, where = finding.fix, finding.where
    if fix is None or len(fix.edits) != 1 or not isinstance(fix.edits[0], SetJson):
        return []
    edit = fix.edits[0]
    if edit.file != where.file or edit.pointer != where.pointer or not where.length or where.line is None:
        return []
    region = {
        "startLine": where.line,
        "startColumn": where.column,
        "endLine": where.line,
        "endColumn": where.column + where.length,
    }
    change = {
        "artifactLocation": _artifact(edit.file, files),
        "replacements": [{"deletedRegion": region, "insertedContent": {"text": json.dumps(edit.value)}}],
    }
    return [{"description": {"text": safe(fix.title)}, "artifactChanges": [change]}]


def _notes(report: Report) -> list[dict]:
    notes = [
        {"level": "note", "message": {"text": f"{code} {name} was skipped: {reason}"}, "associatedRule": {"id": code}}
        for code, name, reason in verdict.skip_reasons(report)
    ]
    return notes + [
        {
            "level": "error",
            "message": {"text": safe(f"{r.rule.code} crashed: {r.crashed}")},
            "associatedRule": {"id": r.rule.code},
        }
        for r in report.crashed
    ]
