"""Where an output may be written, and where a checkpoint may be fixed in place."""

import os
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.core.messages import Message, _, plural
from doctor.fixing.in_place import kept_name
from doctor.fixing.receipt import RECEIPT


def check_output(source: Checkpoint, output: Path, overwrite: bool) -> None:
    """Raises PlanRefused where writing `output` could destroy something."""
    root, real = os.path.realpath(source.root / (source.only or "")), os.path.realpath(output)
    if real == root or real.startswith(root + os.sep) or root.startswith(real + os.sep):
        raise PlanRefused(
            _("{path}: is inside the source, or contains it; the source is never written to.", path=output),
            _("Choose another output."),
        )
    if not os.path.lexists(output):
        _require_writable(output)
        return
    if os.path.islink(output) or not os.path.isdir(output):
        raise PlanRefused(_("{path}: exists and is not a directory.", path=output), _("Choose another output."))
    present = os.listdir(output)
    if present and not overwrite:
        raise PlanRefused(
            _("{path}: exists and holds {files}; an output must be new or empty.", path=output, files=_files(present)),
            _("Choose another output, or give --overwrite."),
        )
    if present and not any(n in ("config.json", RECEIPT) or n.endswith(".safetensors") for n in present):
        raise PlanRefused(
            _(
                "{path}: holds {files}, none of a checkpoint; --overwrite replaces checkpoints only.",
                path=output,
                files=_files(present),
            ),
            _("Choose another output."),
        )


def _require_writable(output: Path) -> None:
    """Raises PlanRefused where nothing can be made in the nearest directory above that exists."""
    place = next(p for p in Path(os.path.abspath(output)).parents if os.path.lexists(p))
    if not place.is_dir():
        raise PlanRefused(
            _("{path}: {place} is not a directory.", path=output, place=place), _("Choose another output.")
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise PlanRefused(
            _("{path}: nothing may be written in {place}.", path=output, place=place),
            _("Choose another output, or change its permissions."),
        )


def _files(names: list[str]) -> Message:
    return plural("{n:,} file", "{n:,} files", len(names))


def check_in_place(source: Checkpoint, path: Path) -> None:
    """Raises PlanRefused where a checkpoint cannot exchange names with its fixed copy."""
    if source.only or os.path.realpath(source.root) != str(path):
        raise PlanRefused(
            _("{path}: is not a plain directory; only a plain directory is fixed in place.", path=source.root),
            _("Write a copy with -o."),
        )
    if any(entry.target for entry in source.entries.values()) or path.parent.name == "snapshots":
        raise PlanRefused(
            _("{path}: its files are links, as in a Hub cache, which other programs rely on.", path=path),
            _("Write a copy with -o."),
        )
    kept = kept_name(path)
    if os.path.lexists(kept):
        raise PlanRefused(
            _("{path}: holds what an earlier fix in place replaced.", path=kept),
            _("`doctor undo {path}` puts it back; delete it if it is not needed.", path=path),
        )
