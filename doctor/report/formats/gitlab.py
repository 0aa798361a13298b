"""GitLab code quality: a JSON list of findings with stable fingerprints."""

import hashlib
import json

from doctor.lint.engine import Report
from doctor.report import presentation
from doctor.report.text import safe

_SEVERITY = {"error": "major", "warning": "minor", "info": "info"}


def render(reports: list[Report]) -> str:
    """All reports as one list; [] when there is nothing."""
    rows = []
    for report in reports:
        root = str(report.summary.get("path") or "").rstrip("/")
        for top in presentation.groups(report):
            for group in (top, *top.effects):
                file, line, _ = presentation.anchor(group.first)
                more = "" if group.folds_into_message else f" (and {len(group.all) - 1} more: {group.names})"
                rows.append(
                    {
                        "description": group.message + more,
                        "check_name": f"{group.code} {group.first.name}",
                        "fingerprint": hashlib.sha256(
                            f"{root}:{presentation.fingerprint(group.first)}".encode("utf-8", "backslashreplace")
                        ).hexdigest()[:40],
                        "severity": _SEVERITY[group.first.severity],
                        "location": {
                            "path": safe(presentation.path_of(report, file)),
                            "lines": {"begin": line},
                        },
                    }
                )
    return json.dumps(rows, indent=1, ensure_ascii=True) + "\n"
