"""Tables and series behind the pictures of a report: recipes by GPU count, weights by layer, shapes, tokens, files.

They are made from the same store and rules as the findings, and only when a format that draws them was asked for.
Everything here is plain data, because it travels in the report's JSON.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import numpy as np

from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.core.errors import DoctorError
from doctor.core.facts import COSTS, closure
from doctor.core.finding import Finding, Fix
from doctor.core.host import describe
from doctor.core.methods import METHODS
from doctor.core.recipe import FORMATS, Recipe
from doctor.core.store import Store, Variant
from doctor.edits.kinds import RECIPE_EDITS, PadTensor
from doctor.fixing.output_summary import files, receipt_summary
from doctor.lint.engine import judge
from doctor.lint.rule import ROW_PARALLEL, Rule
from doctor.plan.groups import LAYOUT
from doctor.scan.header import RECIPE, SPEC, TOKENIZER
from doctor.scan.value_facts import STATS

TPS = (1, 2, 4, 8)
GROUPS = (128, 64, 32, -1)
_ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
_TOKENS = ("bos", "eos", "pad", "unk")
# Values of one tensor, and of all: enough for a picture, and a second of reading at most (128 MB of a large model).
SAMPLE, SAMPLES = 1 << 16, 1 << 26
_FAR = 60  # exponents beyond are counted at the ends: bfloat16 has them to 127, weights never
MOST_STEPS = 100
_SAFETIES = ("safe", "padding", "unsafe", "manual")


def pictures(checkpoint: Checkpoint, store: Store, rules: Iterable[Rule], findings: Iterable[Finding]) -> dict:
    """name -> plain data, for Report.extra. A picture whose facts this run does not have is left out."""
    recipe, rules, findings = store.get(RECIPE), list(rules), list(findings)
    made = {
        "files": files(checkpoint),
        "machine": describe(),
        "exponents": exponents(checkpoint, store),
        "receipt": receipt_summary(checkpoint),
    }
    if store.has(SPEC):
        spec = store.get(SPEC)
        made["tokens"] = tokens(checkpoint, spec, store)
        if spec.linears:
            made |= {
                "geometry": geometry(spec, recipe),
                "heat": heat(spec, store),
                "matrix": matrix(store, rules, findings),
            }
    return {k: v for k, v in made.items() if v}


# recipes by GPU count


def matrix(store: Store, rules: Iterable[Rule], findings: Iterable[Finding]) -> list[dict]:
    """Rows {plan, step, cells: [{tp, ready, codes}]}: which errors stand in the way as it is, after safe fixes, after
    padding.

    Rules that look at headers and at the recipe are asked again under each recipe; what the others found holds for each
    one. Methods that meet the same errors share their rows; a step that changes nothing has none. [] where nothing can
    be planned.
    """
    if not store.has(LAYOUT):
        return []
    recipe, layout = store.get(RECIPE), store.get(LAYOUT)
    asked = [r for r in rules if COSTS.index(r.cost) <= COSTS.index("header") and "recipe" in closure(r.facts)]
    own = {r.code for r in asked}
    always = _worst(f for f in findings if f.severity == "error" and f.code not in own and not f.consequence_of)
    made: dict[tuple, list] = {}  # (group size, steps) -> plans
    for plan in [recipe] if layout.quantized else _plans(recipe):
        steps = _steps([(p.tp, {**always, **_worst(_errors(store, asked, p))}) for p in _shared(plan, recipe.tp)])
        made.setdefault((plan.group_size, json.dumps(steps)), []).append(plan)
    rows = []
    for (_, steps), plans in made.items():
        label = plans[0].label().replace(plans[0].name, "/".join(p.name for p in plans), 1)
        if layout.quantized:
            label = f"as stored: {layout.format} {layout.bits}-bit " + (
                "per-channel" if layout.group_size == -1 else f"g{layout.group_size}"
            )
        rows += [{"plan": label, **step} for step in json.loads(steps)]
    return rows


def _plans(recipe: Recipe) -> list[Recipe]:
    """The recipe asked for and its neighbours: other group sizes that its format has, and the other methods that have
    its width, in their own formats.
    """
    methods = [
        m.name
        for m in sorted(METHODS.values(), key=lambda m: m.name != recipe.method)
        if m.name == recipe.method or (m.calibrated and recipe.bits in (m.bits or FORMATS[m.format].bits))
    ]
    found = []
    for g in dict.fromkeys((recipe.group_size, *GROUPS)):
        for m in methods:
            form, activations = (recipe.format, recipe.activations) if m == recipe.method else ("", "")
            with suppress(DoctorError):  # a group size that the format does not have
                found.append(replace(recipe, method=m, group_size=g, tp=1, format=form, activations=activations))
    return found


def _shared(plan: Recipe, asked: int) -> list[Recipe]:
    """The recipe on one GPU and on more, the number that was asked for among them."""
    return [replace(plan, tp=tp) for tp in sorted({*TPS, asked})]


def _errors(store: Store, rules: list[Rule], plan: Recipe) -> list[Finding]:
    return [f for f in judge(Variant(store, RECIPE, plan), rules)[0] if f.severity == "error" and not f.consequence_of]


def _steps(blocked: list[tuple[int, dict[str, str]]]) -> list[dict]:
    """Rows of one recipe from (tp, code -> safety of its fix)."""
    rows: list[dict] = []
    for step, fixed in (
        ("as it is", ()),
        ("after safe fixes", ("safe",)),
        ("after padding", ("safe", "padding")),
        ("after unsafe fixes", ("safe", "padding", "unsafe")),
    ):
        cells = [
            {"tp": tp, "codes": sorted(c for c, safety in codes.items() if safety not in fixed)}
            for tp, codes in blocked
        ]
        cells = [{**c, "ready": not c["codes"]} for c in cells]
        if not rows or cells != rows[-1]["cells"]:
            rows.append({"step": step, "cells": cells})
    return rows


def _worst(findings: Iterable[Finding]) -> dict[str, str]:
    """code -> the least safe of its fixes: safe, padding, unsafe, manual."""
    found: dict[str, str] = {}
    for item in findings:
        found[item.code] = max(found.get(item.code, "safe"), _safety(item.fix), key=_SAFETIES.index)
    return found


def _safety(fix: Fix | None) -> str:
    """A fix that invents content, or that changes the recipe instead of the files, counts as manual here."""
    if fix is None or fix.by_name or not fix.edits or any(isinstance(e, RECIPE_EDITS) for e in fix.edits):
        return "manual"
    if fix.safety == "unsafe" and any(isinstance(e, PadTensor) for e in fix.edits):
        return "padding"
    return fix.safety


# weights, shapes, tokens, files


def heat(spec, store: Store) -> dict:
    """{blocks, roles: [{role, absmax: [per layer], nonfinite: [per layer], zero: [share per block]}]}; {} where nothing
    was read.
    """
    blocks = 1 + max((x.block for x in spec.linears if x.block is not None), default=-1)
    rows: dict[str, dict] = {}
    for linear in spec.linears:
        subject = f"tensor:{linear.tensor}"
        if linear.block is None or not store.has(STATS, subject):
            continue
        stats = store.get(STATS, subject)
        row = rows.setdefault(
            linear.role,
            {"role": linear.role, "absmax": [None] * blocks, "nonfinite": [0] * blocks, "zero": [None] * blocks},
        )
        row["absmax"][linear.block] = max(row["absmax"][linear.block] or 0.0, float(stats.absmax))
        row["nonfinite"][linear.block] += stats.n_nan + stats.n_inf
        row["zero"][linear.block] = max(row["zero"][linear.block] or 0.0, stats.n_zero / max(stats.numel, 1))
    if not rows:
        return {}
    order = sorted(rows, key=lambda r: (_ROLES.index(r) if r in _ROLES else len(_ROLES), r))
    return {"blocks": blocks, "roles": [rows[r] for r in order]}


def exponents(checkpoint: Checkpoint, store: Store) -> dict:
    """{low, counts, zeros, nonfinite, sampled}: how many of the sampled weights lie in [2^e, 2^(e+1)), from e = low
    upward.

    Up to SAMPLE values from the middle of each tensor of 16 or 32 bits, SAMPLES in all; {} where no weights were read.
    """
    names = [
        n
        for n, t in checkpoint.tensors.items()
        if t.dtype.name in ("F16", "BF16", "F32") and t.numel and store.has(STATS, f"tensor:{n}")
    ]
    counts = np.zeros(2 * _FAR + 1, np.int64)
    zeros = nonfinite = sampled = 0
    for name in names:
        values = _middle(checkpoint, checkpoint.tensors[name], max(min(SAMPLE, SAMPLES // len(names)), 1))
        finite = values[np.isfinite(values)]
        own = np.abs(finite[finite != 0])
        counts += np.bincount(np.clip(np.frexp(own)[1] - 1 + _FAR, 0, 2 * _FAR), minlength=2 * _FAR + 1)
        zeros, nonfinite, sampled = (
            zeros + finite.size - own.size,
            nonfinite + values.size - finite.size,
            sampled + values.size,
        )
    there = np.flatnonzero(counts)
    if not there.size:
        return {}
    return {
        "low": int(there[0]) - _FAR,
        "counts": counts[there[0] : there[-1] + 1].tolist(),
        "zeros": zeros,
        "nonfinite": nonfinite,
        "sampled": sampled,
    }


def _middle(checkpoint: Checkpoint, info, most: int) -> np.ndarray:
    """f32 values from the middle of a tensor, at most this many."""
    size = info.nbytes // info.numel
    count = min(info.numel, most)
    raw = bytearray(count * size)
    with checkpoint.open_file(info.shard) as file:
        file.read_into(info.begin + (info.numel - count) // 2 * size, memoryview(raw))
    return from_codes(np.frombuffer(raw, CODE_NUMPY[info.dtype.name]), info.dtype.name)


def geometry(spec, recipe: Recipe) -> list[dict]:
    """Every distinct linear shape: how many, groups in a row, and the GPU counts that cut it into whole groups, heads
    and columns.
    """
    shares = sorted({1, 2, 4, 8, 16, recipe.tp})
    kinds: dict[tuple, list] = {}
    for linear in spec.linears:
        kinds.setdefault((linear.role, linear.in_features, linear.out_features), []).append(linear)
    rows = []
    for (role, k, n), members in kinds.items():
        group = k if recipe.group_size == -1 else recipe.group_size
        cut = [
            tp for tp in shares if (k % (group * tp) == 0 if role in ROW_PARALLEL else k % group == 0 and n % tp == 0)
        ]
        if (
            recipe.group_size == -1 and role in ROW_PARALLEL
        ):  # one scale for the whole row: every GPU holds a copy of it
            cut = [tp for tp in shares if k % tp == 0]
        cut = [tp for tp in cut if tp == 1 or _shares_heads(role, spec, tp)]
        rows.append(
            {
                "role": role,
                "in_features": k,
                "out_features": n,
                "count": len(members),
                "groups": k / group,
                "tp": cut,
                "shares": shares,
            }
        )
    return rows


def _shares_heads(role: str, spec, tp: int) -> bool:
    """Whether GPUs get whole heads of an attention's linear; key heads may be copied where there are fewer of them than
    GPUs.
    """
    if role in ("q", "qkv", "o") and spec.n_heads and spec.n_heads % tp:
        return False
    fewer = spec.n_kv_heads and spec.n_kv_heads % tp and tp % spec.n_kv_heads
    return not (role in ("k", "v", "qkv") and fewer)


def tokens(checkpoint: Checkpoint, spec, store: Store) -> list[dict]:
    """Rows {token, says: {file: text}}: what each file says about BOS, EOS, PAD and UNK."""
    tokenizer = store.get(TOKENIZER) if store.has(TOKENIZER) else None
    named = checkpoint.value("tokenizer_config.json") or {}
    rows = []
    for token in _TOKENS:
        says = {}
        for file, document in (
            ("config.json", spec.config),
            ("generation_config.json", checkpoint.value("generation_config.json")),
        ):
            if document is not None and f"{token}_token_id" in document:
                says[file] = _ids(document[f"{token}_token_id"], tokenizer)
        text = named.get(f"{token}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str):
            found = tokenizer.ids.get(text) if tokenizer else None
            says["tokenizer_config.json"] = text
            if tokenizer is not None:
                says["tokenizer.json"] = f"{text} = {found}" if found is not None else f"no token {text}"
        if says:
            rows.append({"token": token, "says": says})
    return rows


def _ids(value: object, tokenizer) -> str:
    """`2`, `[1, 2]` or `null`, each with the token that has the id."""
    if isinstance(value, list):
        return "[" + ", ".join(_ids(v, tokenizer) for v in value) + "]"
    if not isinstance(value, int) or isinstance(value, bool):
        return "null" if value is None else str(value)
    name = tokenizer.token(value) if tokenizer else None
    return f"{name} = {value}" if name is not None else str(value)
