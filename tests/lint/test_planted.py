"""No defect is missed: every rule's example, planted in family after family, is found and named.

What was planted is not asked of the rule. It is read off the disk: the case is written beside the nearest healthy
checkpoint of the same family, and what differs between the two (a tensor, a JSON value, a file, a fact, a field of the
recipe) is what the finding must name.
"""

import json
import re
import struct
import sys
from dataclasses import fields, is_dataclass
from functools import cache

import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES
from doctor.lint.testing import (
    FAMILIES,
    GgufCase,
    NotHere,
    compared,
    measured,
    measured_by_its_own,
    rehearsed,
    tiny,
    tiny_gguf,
    tiny_gptq,
    use_family,
    with_capacity,
)

load_rules()
CODES = sorted(RULES)
# Where fewer than three of FAMILIES can hold an example: mixtures, stacked experts, Qwen's tokens, biases.
MORE = ("qwen3", "qwen3_moe", "olmoe", "granitemoe", "llama4_text", "gpt_oss")
AT_LEAST = 3
# A tiny mixture is narrower than the tiles of vLLM's kernel for experts, some runtimes read no stacks apart, vLLM and
# transformers misread some packed linears: all of it is true and said.
TRUE_HERE = {
    "qwen2_moe": {"G308", "G319"},
    "olmoe": {"G308", "G319"},
    "qwen3_moe": {"G308", "G319"},
    "granitemoe": {"G308", "G313"},
    "llama4_text": {"G308", "G313", "G319"},
    "gpt_oss": {"G313", "G319"},
}


def disk(folder):
    """(place -> content) of a checkpoint's files: ("tensor", name), ("key", file, pointer) and ("file", name)."""
    seen = {}
    for path in sorted(folder.iterdir()):
        raw = b"link" if path.is_symlink() else path.read_bytes() if path.is_file() else b"not a file"
        seen["file", path.name] = raw
        if path.suffix == ".safetensors":
            seen |= tensors(path, raw)
        elif path.suffix == ".json":
            seen |= keys(path.name, raw)
    return seen


def tensors(path, raw):
    try:
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        return {
            ("tensor", n, path.name): (
                e["dtype"],
                e["shape"],
                raw[8 + size + e["data_offsets"][0] : 8 + size + e["data_offsets"][1]],
            )
            for n, e in header.items()
            if n != "__metadata__"
        }
    except (struct.error, ValueError, AttributeError):
        return {}


def keys(file, raw):
    found = {}

    def walk(value, at):
        if isinstance(value, dict):
            found["key", file, at] = len(value)
            for key, inner in value.items():
                walk(inner, f"{at}/{key}")
        elif isinstance(value, list):
            found["key", file, at] = len(value)
            for number, inner in enumerate(value):
                walk(inner, f"{at}/{number}")
        else:
            found["key", file, at] = value

    try:
        walk(json.loads(raw), "")
    except ValueError:
        return {}
    return found


@cache
def healthy(family, shards, measurements):
    """Healthy cases of one family to compare with; `measurements`: the names of the facts beside them."""
    with use_family(family):
        if "comparison" in measurements:
            made = [compared()]
        elif measurements == {"given_machine"}:
            made = [with_capacity()]
        elif measurements == {"given_rehearsal"}:
            made = [rehearsed()]
        elif measurements == {"own_measure"}:
            made = [measured_by_its_own()]
        elif measurements - {"given_published"}:
            made = [measured()]
        else:
            made = [tiny(), tiny_gptq(), tiny_gptq(version="gptq_v2")]
    for case in made:
        case.shards = shards
    return made


def facts(case):
    return {
        ("fact", s.partition(":")[2], key): value for (s, n), v in case.facts.items() for key, value in leaves(n, v)
    }


def leaves(name, value):
    """(name, text) of each value that a rule can read of a fact: fields, also of what is in a field, and entries of a
    bare list.
    """
    if is_dataclass(value):
        for f in fields(value):
            inner = getattr(value, f.name)
            yield from (
                leaves(f"{name}.{f.name}", inner)
                if is_dataclass(inner) or isinstance(inner, tuple)
                else [(f"{name}.{f.name}", str(inner))]
            )
    elif isinstance(value, tuple):
        for i, entry in enumerate(value):
            yield from leaves(f"{name}[{i}]", entry)
    else:
        yield name, str(value)


def recipe(case):
    return {("recipe", f.name): getattr(case.recipe, f.name) for f in fields(Recipe)}


def planted(case, family, folder):
    """What differs between the case on disk and the healthy checkpoint it is nearest to."""
    have = disk(folder / "bad") | facts(case) | recipe(case)
    nearest = None
    with use_family(family):
        gguf = [tiny_gguf()] if isinstance(case, GgufCase) else []
    for number, other in enumerate(gguf or healthy(family, case.shards, frozenset(n for _, n in case.facts))):
        base = disk(other.write(folder / f"good{number}")) | facts(other) | recipe(other)
        differ = {k: have.get(k) for k in have.keys() | base.keys() if have.get(k) != base.get(k)}
        if nearest is None or len(differ) < len(nearest):
            nearest = differ
    return nearest


def named(finding, differ, entry):
    """Whether the finding says what was planted: the tensor, else the JSON key, else the file, else the value of the
    fact or field.
    """
    place = finding.where
    said = " ".join([place.tensor or "", finding.message, json.dumps(finding.evidence, default=str)])
    parts = {k[1] for k in differ if k[0] in ("tensor", "fact") and k[1]}
    written = {k[1:]: v for k, v in differ.items() if k[0] == "key"}
    files = {k[1] for k in differ if k[0] == "file"}
    if any(_mentions(said, name) for name in parts):
        return True
    if any(place.file == file and place.pointer is not None and _within(at, place.pointer) for file, at in written):
        return True
    if any(
        _mentions(finding.message, at.rsplit("/", 1)[-1] or "/") or (isinstance(v, str) and v in finding.message)
        for (_, at), v in written.items()
    ):
        return True
    gone = {
        k[1]
        for k, v in differ.items()
        if k[0] == "file" and (v is None or (k[1].endswith(".json") and not keys(k[1], v)))
    }
    if place.file in gone or any(f in finding.message for f in gone):
        return True
    if entry.area == "Files" or not (parts or written):
        values = {str(v) for k, v in differ.items() if k[0] in ("fact", "recipe")}
        # A plan at odds with a sound checkpoint is said of the size or the tensor that it does not fit.
        return (
            place.file in files
            or (not files and (place.pointer or place.tensor) is not None)
            or any(v.replace(",", "").rstrip(".") in said.replace(",", "") for v in values if v.strip("."))
        )
    return False


def _mentions(text, name):
    """Whether the text has the name of the tensor, or of the linear that it is a part of."""
    linear = re.sub(r"\.(weight|bias|qweight|qzeros|scales|g_idx)$", "", name)
    return (
        re.search(rf"(?<![\w.]){re.escape(linear)}(?:\.(?:weight|bias|qweight|qzeros|scales|g_idx))?(?!\.?\w)", text)
        is not None
    )


def _within(planted, pointed):
    return planted == pointed or planted.startswith(pointed.rstrip("/") + "/") or pointed.startswith(planted + "/")


def plant(code, family, folder):
    """(what was planted, findings) of a rule's example in a family. Raises NotHere where it cannot exist there."""
    with use_family(family):
        case, _ = sys.modules[RULES[code].module].bad()
    assert case.family == family, f"{code}'s example ignores the family in use"
    report = check(case.write(folder / "bad"), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()])
    assert not report.crashed, [r.crashed for r in report.crashed]
    return planted(case, family, folder), report.findings


@pytest.mark.parametrize("code", CODES)
def test_a_planted_defect_is_found_and_named_in_family_after_family(code, tmp_path, proof):
    tried, elsewhere = 0, {}
    for family in (*FAMILIES, *MORE):
        if tried >= AT_LEAST and family in MORE:
            break
        try:
            differ, findings = plant(code, family, tmp_path / family)
        except NotHere as reason:
            elsewhere[family] = str(reason)
            continue
        tried += 1
        proof.planted(code, family)
        own = [f for f in findings if f.code == code]
        assert own, f"{family}: not found among {[(f.code, f.message) for f in findings]}"
        assert any(named(f, differ, RULES[code]) for f in own), (
            f"{family}: {own[0].message!r} at {own[0].target} names none of {sorted(differ)[:8]}"
        )
        proof.found(code, family)
        alarms = [
            f"{f.code} {f.message}"
            for f in findings
            if f.code != code and not f.consequence_of and f.code not in TRUE_HERE.get(family, ())
        ]
        proof.alarms(alarms)
        assert not alarms, f"{family}: {alarms}"
    assert tried >= AT_LEAST, f"{code} was planted in {tried} families only; elsewhere: {elsewhere}"


def test_the_oracle_refuses_a_finding_that_names_another_place(tmp_path):
    """Without this, an oracle that takes everything would prove nothing."""
    from dataclasses import replace

    differ, findings = plant("W201", "llama", tmp_path)
    assert named(findings[0], differ, RULES["W201"])
    for wrong in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight_2"):
        moved = replace(findings[0], message="1 NaN", where=replace(findings[0].where, tensor=wrong), evidence={})
        assert not named(moved, differ, RULES["W201"])
