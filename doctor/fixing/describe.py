"""What each step of a plan changes, for people: diffs of JSON and text, tensors, notes."""

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.core.messages import _, plural
from doctor.edits.kinds import DropTensor, Edit, GrowRows, PadTensor, Rebase, RenameFile, TakeFile, TensorEdit
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.edit_set import compose
from doctor.fixing.step import Step
from doctor.lint.rule import ranges

MOST_DIFF_LINES = 40
DIFF_WIDTH = 160


def describe_steps(source: Checkpoint, steps: Sequence[Step]) -> None:
    """Number the steps and fill in what each changes, in the order in which they are carried out.

    A step that waits is described as if it came next; those after it do not see its changes.
    """
    before = EditedCheckpoint(source)
    edits: list[Edit] = []
    files: dict[str, int] = {}
    for number, step in enumerate(steps, 1):
        step.number = number
        try:
            after = EditedCheckpoint(source, compose((step.code, e) for e in [*edits, *step.edits]))
        except PlanRefused:
            continue  # a waiting step whose edits do not fit: its reason says so
        _describe(step, before, after)
        for name in step.diffs:
            step.after = step.after or files.get(name)
            files.setdefault(name, number)
        if not step.waits:
            before, edits = after, [*edits, *step.edits]


def _describe(step: Step, before: EditedCheckpoint, after: EditedCheckpoint) -> None:
    for name in sorted(after.json):
        old, new = before.json.get(name), after.json[name]
        if old is None or old.raw != new.raw:
            if any(isinstance(e, Rebase) or (isinstance(e, TakeFile) and e.file == name) for e in step.edits):
                continue  # another checkpoint's files, not changed ones
            step.diffs[name] = diff_lines(b"" if old is None else old.raw, new.raw)
    for name in sorted(after.texts):
        old_text, new_text = before.read_file(name), after.texts[name]
        if old_text != new_text:
            step.diffs[name] = diff_lines(old_text, new_text)
    step.notes += [
        _(
            "{file}: {size:,} bytes, sha256 {sha256}",
            file=e.file,
            size=after.entries[after.new_name(e.file)].size,
            sha256=e.sha256,
        )
        for e in step.edits
        if isinstance(e, TakeFile) and after.new_name(e.file) in after.entries
    ]
    step.notes += [f"{e.file} → {e.to}" for e in step.edits if isinstance(e, RenameFile)]
    _describe_tensors(step, before, after)


def _describe_tensors(step: Step, before: EditedCheckpoint, after: EditedCheckpoint) -> None:
    changes: dict[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None], list[str]] = {}
    copies = Counter(e.shard for e in step.edits if isinstance(e, DropTensor) and e.shard)
    step.notes += [
        plural("{file}: {n:,} copy dropped", "{file}: {n:,} copies dropped", n, file=file)
        for file, n in sorted(copies.items())
    ]
    changed = {
        e.tensor for e in step.edits if isinstance(e, TensorEdit) and not (isinstance(e, DropTensor) and e.shard)
    }
    for name in sorted(changed):
        old, new = before.tensors.get(name), after.tensors.get(name)
        if old is not None or new is not None:
            kinds = dict.fromkeys(t.dtype.name for t in (old, new) if t is not None)
            change = (" → ".join(kinds), old.shape if old else None, new.shape if new else None)
            changes.setdefault(change, []).append(name)
    for (dtype, old_shape, new_shape), names in changes.items():
        step.tensors += [(folded, dtype, old_shape, new_shape) for folded in fold_names(names)]
    step.tensors.sort(key=lambda t: t[0])
    pads = {
        (before.tensors[e.tensor].shape[e.axis], e.size, e.spread)
        for e in step.edits
        if isinstance(e, PadTensor) and e.tensor in before.tensors
    }
    for old_size, size, spread in sorted(pads):
        where = _("spread evenly, so no group of neighbours is all zero") if spread else _("at the end of each part")
        step.notes.append(
            _(
                "{added:,} zero channels, {old:,} → {new:,}, {where}",
                added=size - old_size,
                old=old_size,
                new=size,
                where=where,
            )
        )
    grown = {
        (before.tensors[e.tensor].shape[0], e.size)
        for e in step.edits
        if isinstance(e, GrowRows) and e.tensor in before.tensors
    }
    step.notes += [
        _("{added:,} rows more, {old:,} → {new:,}, each the mean of the others", added=size - rows, old=rows, new=size)
        for rows, size in sorted(grown)
    ]


def diff_lines(old: bytes | str, new: bytes | str, most: int = MOST_DIFF_LINES) -> list[str]:
    """A diff without context, as `@@ -5,1 +5,1 @@` and `-`/`+` lines; long lines and long diffs are cut, and say so."""
    a, b = _text(old).splitlines(), _text(new).splitlines()
    head = 0
    while head < min(len(a), len(b)) and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < min(len(a), len(b)) - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    a, b = a[head : len(a) - tail], b[head : len(b) - tail]
    # Only what differs is compared: a tokenizer.json has hundreds of thousands of lines.
    codes: Iterable[tuple[str, int, int, int, int]] = (
        difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        if max(len(a), len(b)) <= 2000
        else [("replace", 0, len(a), 0, len(b))]
    )
    lines: list[str] = []
    for tag, a0, a1, b0, b1 in codes:
        if tag == "equal":
            continue
        lines.append(f"@@ -{head + a0 + 1},{a1 - a0} +{head + b0 + 1},{b1 - b0} @@")
        lines += ["-" + _clipped(line, b[b0:b1][i : i + 1]) for i, line in enumerate(a[a0:a1])]
        lines += ["+" + _clipped(line, a[a0:a1][i : i + 1]) for i, line in enumerate(b[b0:b1])]
    if len(lines) > most:
        lines = [*lines[: most - 1], _("and {n:,} more lines", n=len(lines) - most + 1)]
    return lines


def _text(raw: bytes | str) -> str:
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw


def _clipped(line: str, other: list[str], width: int = DIFF_WIDTH) -> str:
    """A long line, cut to where it first differs from its counterpart."""
    if len(line) <= width:
        return line
    first = next((i for i, (x, y) in enumerate(zip(line, other[0], strict=False)) if x != y), 0) if other else 0
    begin = max(min(first - width // 4, len(line) - width), 0)
    return ("…" if begin else "") + line[begin : begin + width] + ("…" if begin + width < len(line) else "")


def fold_names(names: Iterable[str]) -> list[str]:
    """Tensor names that differ in numbers alone, in as few lines as say exactly the same.

    For example layers.{0-1}.mlp.experts.{0-3}.up_proj.weight.
    """
    number = re.compile(r"(?<=\.)\d+(?=\.|$)")
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(number.sub("\0", name), []).append(tuple(map(int, number.findall(name))))
    lines = []
    for pattern, found in groups.items():
        columns = [sorted(set(c)) for c in zip(*found, strict=True)]
        whole = set(itertools.product(*columns)) == set(found)
        rows = [columns] if whole else [[[i] for i in row] for row in sorted(set(found))]
        for row in rows:
            parts = pattern.split("\0")
            lines.append(parts[0] + "".join(ranges(n) + text for n, text in zip(row, parts[1:], strict=True)))
    return sorted(lines)
