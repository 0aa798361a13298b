"""The receipt, doctor.json: what was done to which file, and what was found before and after.

The same input gives the same text: no times, no paths, other checkpoints by name. No key of it is ever renamed, because
receipts of earlier runs are read too.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.finding import Finding
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.edits.donor import Donor
from doctor.edits.kinds import MISSING, AddLowRank, Edit, Rebase, TakeFile, TakeTensor
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.edit_set import in_phases
from doctor.fixing.filesystem import machine_errors, sha256
from doctor.fixing.proof import Proof
from doctor.fixing.step import Step

RECEIPT = "doctor.json"
SCHEMA = "doctor.receipt/1"


@dataclass(frozen=True)
class WrittenFile:
    """One file of the output. how: "written" (edited), "reflinked", "linked" or "copied" (content as in the source)."""

    name: str
    how: str
    size: int


def is_receipt(document: dict[str, Any] | None) -> bool:
    """Whether a doctor.json is a receipt that can be read here."""
    return document is not None and document.get("schema") == SCHEMA


def is_ours(document: dict[str, Any] | None) -> bool:
    """Whether a doctor.json is of a program of this name: of a fix, a conversion, or a run of the quantizer."""
    if document is None:
        return False
    quantized = {"doctor", "recipe", "outcomes"} <= document.keys()
    return quantized or str(document.get("schema", "")).startswith("doctor.receipt")


def build_receipt(
    source: Checkpoint,
    recipe: Recipe,
    steps: Iterable[Step],
    overlay: EditedCheckpoint,
    *,
    donor: Donor | None,
    digests: Mapping[str, tuple[str | None, str]],
    files: Iterable[WrittenFile],
    not_carried: Mapping[str, str],
    findings_before: Iterable[Finding],
    findings_after: Iterable[Finding],
    proofs: Iterable[Proof],
    kept: str | None,
) -> dict[str, Any]:
    """The receipt of a plan that was carried out.

    digests: changed file -> (sha256 before, None where there was no readable file; sha256 after). kept: name of the
    directory that keeps the old checkpoint of a fix in place.
    """
    names = {str(source.root): source.name, **({donor.root: donor.name} if donor is not None else {})}
    files = sorted(files, key=lambda f: f.name)
    receipt = {
        "schema": SCHEMA,
        "doctor": __version__,
        "source": source.name,
        "recipe": recipe.label(),
        "steps": [
            {
                "code": s.code,
                "name": s.name,
                "safety": s.safety,
                "title": s.title.replace(donor.text, donor.name) if donor is not None else s.title,
                "edits": [_edit_data(e, names) for e in in_phases(s.edits)],
            }
            for s in steps
        ],
        "written": [
            {"file": n, "bytes": overlay.entries[n].size, "sha256_before": old, "sha256_after": new}
            for n, (old, new) in sorted(digests.items())
        ],
        "unchanged": [{"file": f.name, "bytes": f.size, "how": f.how} for f in files if f.how != "written"],
        "not_carried": dict(sorted(not_carried.items())),
        "bytes_written": sum(f.size for f in files if f.how in ("written", "copied")),
        "findings_before": [_finding_data(f) for f in findings_before],
        "findings_after": [_finding_data(f) for f in findings_after],
        "proofs": [asdict(p) for p in proofs],
    }
    if donor is not None and any(isinstance(e, (TakeTensor, TakeFile, AddLowRank, Rebase)) for e in overlay.edits):
        receipt["base"] = _donor_data(overlay, donor)
    if kept is not None:
        receipt["kept"] = kept
    earlier = source.value(RECEIPT)
    if is_receipt(earlier) or (earlier is not None and "schema" not in earlier and is_ours(earlier)):
        receipt["previous"] = earlier
    return receipt


def changed_since(folder: Path, receipt: dict[str, Any], kept: Path) -> list[str]:
    """Files of a fixed checkpoint that differ from its receipt: other bytes, missing, added, or no regular file.

    kept: the checkpoint that it replaced. What was carried over unchanged is compared with that, since the receipt has
    no hash of it. Only regular files inside `folder` are read. Raises BadCheckpoint for a receipt that is
    none, MachineError.
    """
    written, unchanged = _entries(receipt, "written"), _entries(receipt, "unchanged")
    sizes = {name: entry["bytes"] for name, entry in {**unchanged, **written}.items()}
    found: dict[str, int | None] = {}
    with machine_errors(folder, _("Nothing was changed.")):
        for path in folder.rglob("*"):
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) and path != folder / RECEIPT:
                found[str(path.relative_to(folder))] = info.st_size if stat.S_ISREG(info.st_mode) else None
        wrong = [
            n
            for n in sorted({*sizes, *found})
            if (n in found and found[n] is None) or (sizes.get(n) != found.get(n) and (n in found or sizes[n]))
        ]
        for name in sorted(found.keys() - set(wrong)):
            if name in written:
                same = written[name]["sha256_after"] == sha256(folder / name)
            else:
                same = _same_bytes(kept / name, folder / name)
            wrong += [] if same else [name]
    return wrong


def _entries(receipt: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Name -> entry of one list of a receipt. A receipt is input: its names must stay inside. Raises BadCheckpoint."""
    found: dict[str, dict[str, Any]] = {}
    stated = receipt.get(key)
    for entry in stated if isinstance(stated, list) else [stated]:
        name = entry.get("file") if isinstance(entry, dict) else None
        if (
            not isinstance(entry, dict)
            or not isinstance(name, str)
            or os.path.isabs(name)
            or ".." in Path(name).parts
            or "\0" in name
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256_after", ""), str)
            or (key == "written" and "sha256_after" not in entry)
        ):
            raise BadCheckpoint(
                _("{file}: {key} is not what a fix writes: {entry}.", file=RECEIPT, key=key, entry=repr(entry)[:80]),
                _(
                    "Without its receipt a fix is not undone; the directory that ends in .before-fix holds what "
                    "was there."
                ),
            )
        found[name] = entry
    return found


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two regular files have the same bytes; one file under two names has."""
    try:
        infos = os.lstat(one), os.lstat(other)
        if not all(stat.S_ISREG(info.st_mode) for info in infos) or infos[0].st_size != infos[1].st_size:
            return False
        return os.path.samestat(*infos) or sha256(one) == sha256(other)
    except FileNotFoundError:
        return False


def _donor_data(overlay: EditedCheckpoint, donor: Donor) -> dict[str, Any]:
    """The donor's name, never a path, and the sha256 of each of its files that something was copied from."""
    edits = overlay.edits
    files = {e.file for e in edits if isinstance(e, TakeFile)}
    files |= {
        donor.checkpoint.tensors[e.tensor].shard for e in edits if isinstance(e, TakeTensor) and e.root == donor.root
    }
    if any(isinstance(e, Rebase) for e in edits):
        files |= {old for n in overlay.changed if (old := overlay.origin(n)) in donor.checkpoint.entries}
    return {"name": donor.name, "files": {n: donor.checkpoint.sha256(n) for n in sorted(files)}}


def _edit_data(edit: Edit, names: Mapping[str, str]) -> dict[str, Any]:
    """An edit as data; other checkpoints by their names, because a path means nothing on another machine."""
    values = {f.name: getattr(edit, f.name) for f in fields(edit)}
    if "root" in values:
        values["root"] = names.get(values["root"], values["root"])  # one that was donated is a name already
    return {"kind": type(edit).__name__, **{k: v for k, v in values.items() if v is not MISSING}}


def _finding_data(item: Finding) -> dict[str, str]:
    return {"code": item.code, "severity": item.severity, "where": item.target, "message": item.message}
