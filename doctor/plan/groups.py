"""How the linears lie in groups: as the recipe plans it for floats, or as a quantized checkpoint already has it.

Geometry rules (G3xx) judge a Layout and need not ask which of the two it is. Where a checkpoint is quantized in
a way that has no groups of columns (FP8, bitsandbytes, EXL2), the layout is unavailable and says so.
"""

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import DoctorError
from doctor.core.facts import Unavailable, fact, provide
from doctor.core.recipe import BITS, METHODS, Recipe, is_kept
from doctor.core.tables import table
from doctor.edits.kinds import MISSING, Edit, Keep, PadTensor, SetJson
from doctor.formats.tensor_names import WORD_TAILS
from doctor.model.expressions import evaluate
from doctor.model.fused_experts import find_stacks
from doctor.model.spec import NOT_TEXT, ROLE_OF_TAIL, ROW_PARALLEL, ModelSpec, in_extra_layer

# Linears that a serving engine stores as one matrix, so that they must be quantized alike or not at all.
FUSED = (("q", "k", "v"), ("gate", "up"))

provide("words", "tensor", "values", "What the int32 words of a qzeros or g_idx tensor are (Words).")


@dataclass(frozen=True)
class Words:
    """Int32 words of a packed tensor. kinds: word (unsigned) -> count, None once more than 16 differ."""

    count: int
    smallest: int
    largest: int
    rising: bool  # no word is smaller than the one before it
    full_fields: int  # words in which some 4-bit field is 15
    kinds: dict[int, int] | None = None


@fact("checkpoint")
def packed_words(checkpoint, every_words):
    """tensor -> Words of every qzeros and g_idx tensor."""
    return every_words


class Widths:
    """Bits of the linears that have others than the rest, by name or by a pattern that a name must begin with."""

    def __init__(self):
        self._names: dict[str, int] = {}  # looked up: a mixture may name thousands of linears one by one
        self._patterns: list[tuple[re.Pattern, int]] = []

    def add(self, pattern: str, bits: int) -> None:
        """Raises re.error for a pattern that is none."""
        name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
        if pattern == f"^{re.escape(name)}$":
            self._names.setdefault(name, bits)
        else:
            self._patterns.append((re.compile(pattern), bits))

    def of(self, module: str, common: int) -> int:
        if module in self._names:
            return self._names[module]
        return next((bits for pattern, bits in self._patterns if pattern.match(module)), common)


def own_widths(raw: Mapping) -> Widths:
    """What a quantization block says of single linears' bits: GPTQ's "dynamic", AutoRound's "extra_config", the further
    groups of compressed-tensors.

    Raises Unavailable where they differ in more, or a pattern is none. Sources: ModelCloud/GPTQModel
    gptqmodel/quantization/config.py (dynamic_get); a file that AutoRound 0.16.1 wrote; vllm-project/compressed-tensors
    src/compressed_tensors/utils/match.py (names, and patterns after "re:").
    """
    found = Widths()
    own = [(key.removeprefix("+:"), value.get("bits")) for key, value in _own(raw, "dynamic")]
    own += [(f"^{re.escape(name)}$", value.get("bits")) for name, value in _own(raw, "extra_config")]
    for group in weight_groups(raw)[1:]:
        targets = group.get("targets")
        targets = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
        own += [
            (t.removeprefix("re:") if t.startswith("re:") else f"^{re.escape(t)}$", group["weights"].get("num_bits"))
            for t in targets
        ]
    for pattern, bits in own:
        if type(bits) is int and bits in BITS:
            try:
                found.add(pattern, bits)
            except re.error as error:
                raise Unavailable(
                    f"the quantization block names linears by {pattern!r}, which is no pattern: {error}"
                ) from None
    return found


def _own(raw: Mapping, key: str) -> list[tuple[str, Mapping]]:
    """(name or pattern, what is its own) of raw[key]. Raises Unavailable where that is more than a width; what stays in
    floats has none.
    """
    own = raw.get(key) or {}
    if not isinstance(own, Mapping) or any(
        not isinstance(value, Mapping)
        or (not _in_floats(value) and any(k != "bits" and v != raw.get(k, v) for k, v in value.items()))
        for name, value in own.items()
        if not name.startswith("-:")
    ):
        raise Unavailable(f"linears differ in more than their width ({key}): their shapes are not judged")
    return [(name, value) for name, value in own.items() if not name.startswith("-:")]


def _in_floats(own: Mapping) -> bool:
    bits = own.get("bits")
    return isinstance(bits, int) and bits >= 16


def weight_groups(raw: Mapping) -> list[dict]:
    """Groups of compressed-tensors that say something of weights, the one for all Linear first."""
    groups = raw.get("config_groups")
    found = [
        g
        for g in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(g, dict) and isinstance(g.get("weights"), dict)
    ]
    return sorted(found, key=lambda g: g.get("targets") != ["Linear"])


@dataclass(frozen=True)
class Quantization:
    """A quantization_config in one spelling. method: gptq, awq, compressed-tensors; it stands at `pointer` of `file`.

    bits is the common width; `bits_of` a linear's own.
    """

    method: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    version: str  # gptq or gptq_v2; gemm, gemv …; pack-quantized …
    raw: dict
    file: str
    pointer: str
    widths: Widths = field(default_factory=Widths)

    def bits_of(self, module: str) -> int:
        return self.widths.of(module, self.bits)

    @property
    def autoround(self) -> bool:
        """Whether it is a block of AutoRound's, which has keys of its own."""
        return self.raw.get("quant_method") in AUTOROUND


class GroupedLinear(NamedTuple):
    """One linear that is, or will be, stored in groups of group_size in_features (-1: whole rows)."""

    name: str
    role: str
    block: int | None
    expert: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """The grouped linears and what they share. `quantized` is true where the files hold them already."""

    quantized: bool
    format: str  # gptq, gptq_v2, awq, compressed-tensors
    bits: int  # of most linears, where single ones have widths of their own
    group_size: int
    sym: bool
    act_order: bool  # groups scattered over columns (g_idx), not merely another order of work
    linears: tuple[GroupedLinear, ...]
    missed: tuple[str, ...] = ()  # linears left in floats though others are grouped


@fact("checkpoint")
def quantization_block(checkpoint):
    """(raw quantization_config, file, JSON pointer), or None where the checkpoint names no quantization."""
    return quantization_of(checkpoint)


def quantization_of(checkpoint: Checkpoint) -> tuple[dict, str, str] | None:
    """The raw quantization block and where it stands."""
    config = checkpoint.value("config.json") or {}
    if isinstance(config.get("quantization_config"), dict):
        return config["quantization_config"], "config.json", "/quantization_config"
    for name, block in config.items():
        if isinstance(block, dict) and isinstance(block.get("quantization_config"), dict):
            return block["quantization_config"], "config.json", f"/{name}/quantization_config"
    for file in ("quantize_config.json", "quant_config.json"):
        value = checkpoint.value(file)
        if isinstance(value, dict):
            return value, file, ""
    return None


@fact("checkpoint", stage="header")
def quantization(checkpoint, quantization_block):
    """What the files say about their own quantization (Quantization)."""
    if quantization_block is None:
        raise Unavailable("the checkpoint is not quantized")
    raw, file, pointer = quantization_block
    return read_quantization(raw, file, pointer)


# packing_format of AutoRound's own blocks -> the form that it packs in. Source: intel/auto-round
# auto_round/inference/backend.py (GPTQ_FORMAT stores zero points minus one, GPTQ_FORMAT_NO_ZP as they are), 0.16.1.
_AUTOROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
}
AUTOROUND = ("auto-round", "intel/auto-round")


def plain_block(raw: Mapping) -> Mapping:
    """An AutoRound block in the words of the form that it packs in, where that is known; any other block as it is."""
    form = (
        _AUTOROUND.get(str(raw.get("packing_format")))
        if raw.get("quant_method") in AUTOROUND and raw.get("data_type", "int") == "int"
        else None
    )
    if form is None:
        return raw
    shared = {"data_type": "int", **{k: raw[k] for k in ("bits", "group_size", "sym", "extra_config") if k in raw}}
    if form == "awq":
        return {**shared, "quant_method": "awq", "zero_point": not raw.get("sym", True), "version": "gemm"}
    return {**shared, "quant_method": "gptq", "desc_act": False, "checkpoint_format": form}


def read_quantization(raw: Mapping, file: str, pointer: str) -> Quantization:
    """One spelling for GPTQ, AWQ, compressed-tensors and AutoRound blocks. Raises Unavailable for other methods."""
    stated, raw = raw, plain_block(raw)
    widths = own_widths(raw)
    return replace(_read_plain(raw, file, pointer), raw=dict(stated), widths=widths)


def _read_plain(raw: Mapping, file: str, pointer: str) -> Quantization:
    method = str(
        raw.get("quant_method") or ("awq" if "zero_point" in raw else "gptq" if "desc_act" in raw else "unknown")
    )
    if method in ("gptq", "gptq_marlin", "auto_gptq"):
        version = str(raw.get("checkpoint_format") or raw.get("format") or "gptq")
        _require_known("checkpoint_format", version, ("gptq", "gptq_v2"))
        return Quantization(
            "gptq",
            _whole(raw, "bits"),
            _whole(raw, "group_size"),
            bool(raw.get("sym", True)),
            bool(raw.get("desc_act", False)),
            version,
            dict(raw),
            file,
            pointer,
        )
    if method == "awq":
        _require_known("version", str(raw.get("version") or raw.get("format") or "gemm").lower(), ("gemm", "gemv"))
        return Quantization(
            "awq",
            _whole(raw, "bits", "w_bit"),
            _whole(raw, "group_size", "q_group_size"),
            not raw.get("zero_point", True),
            False,
            str(raw.get("version") or raw.get("format") or "gemm").lower(),
            dict(raw),
            file,
            pointer,
        )
    if method == "compressed-tensors":
        schemes = [group["weights"] for group in weight_groups(raw)]
        weights = schemes[0] if schemes else None
        if any(
            scheme.get(key) != weights.get(key)
            for scheme in schemes
            for key in ("group_size", "strategy", "symmetric", "actorder")
        ):
            raise Unavailable("linears differ in more than their width (config_groups): their shapes are not judged")
        if weights and raw.get("format") == "pack-quantized" and weights.get("strategy") in ("group", "channel"):
            group = _whole(weights, "group_size") if weights["strategy"] == "group" else -1
            return Quantization(
                method,
                _whole(weights, "num_bits"),
                group,
                bool(weights.get("symmetric", True)),
                weights.get("actorder") in ("group", True),
                "pack-quantized",
                dict(raw),
                file,
                pointer,
            )
    raise Unavailable(f"quantization by {method} has no packed groups of columns")


STATED = frozenset({"method", "bits", "group_size", "sym"})  # what a quantized checkpoint states of its own plan


def stored_recipe(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """This recipe with the method, bits, groups and symmetry that the checkpoint states for itself; as it is where it
    states none.
    """
    block = quantization_of(checkpoint)
    if block is None:
        return recipe
    raw, *place = block
    # What single linears have of their own (dynamic, further groups) does not change what holds for the rest.
    common = {k: v for k, v in raw.items() if k not in ("dynamic", "extra_config")}
    if weight_groups(raw):
        common["config_groups"] = {"common": weight_groups(raw)[0]}
    try:
        stored = read_quantization(common, *place)
        form = stored.version if stored.method == "gptq" else stored.method
        method = stored.method if stored.method in METHODS else "gptq"
        return replace(
            recipe, method=method, bits=stored.bits, group_size=stored.group_size, sym=stored.sym, format=form
        )
    except (Unavailable, DoctorError):  # what is wrong with the block is for rules to say
        return recipe


def _require_known(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise Unavailable(f"{key} {value!r}: its packing is not judged here, only {' and '.join(known)}")


def _whole(raw: Mapping, *names: str) -> int:
    for name in names:
        value = raw.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1):
            return value
    raise Unavailable(f"the quantization block has no usable {names[0]}")


@fact("checkpoint", stage="header")
def layout(checkpoint, recipe, spec, tensors):
    """The linears in groups, planned or stored (Layout)."""
    block = quantization_of(checkpoint)
    packed = [info for name, info in tensors.items() if name.endswith(WORD_TAILS)]
    if block is None and not packed:
        return planned_layout(recipe, spec, tensors)
    if block is None:
        raise Unavailable("the tensors are packed but no file says how")
    return stored_layout(read_quantization(*block), packed, spec, tensors)


def planned_layout(recipe: Recipe, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> Layout:
    """Layout that the recipe gives to float linears. Raises Unavailable where the weights are not plain floats."""
    floats = [x for x in spec.linears if tensors[x.tensor].dtype.name in ("BF16", "F16", "F32", "F64")]
    if not floats:
        raise Unavailable(
            "no linear is known by its name" if not spec.linears else "no linear holds 16- or 32-bit floats"
        )
    kept = tuple(x.name for x in floats if is_kept(recipe, x.name)) if recipe.keep else ()
    out = set(kept)
    apart = [
        x
        for found in find_stacks(spec, tensors, recipe)
        if not found.why
        for x in found.linears
        if not is_kept(recipe, x.name)
    ]
    linears = tuple(
        GroupedLinear(x.name, x.role, x.block, x.expert, x.in_features, x.out_features)
        for x in (*floats, *apart)
        if x.name not in out
    )
    return Layout(False, recipe.output_format, recipe.bits, recipe.group_size, recipe.sym, False, linears, kept)


def stored_layout(
    quant: Quantization, packed: list[TensorInfo], spec: ModelSpec, tensors: Mapping[str, TensorInfo]
) -> Layout:
    """Layout that packed tensors have, their sizes read from their shapes."""
    linears = []
    for info in packed:
        name, _, tail = info.name.rpartition(".")
        if len(info.shape) != 2 or NOT_TEXT.search(name):
            continue
        size = packed_size(quant, name, tail, info.shape)
        role, block, expert = role_of(name, spec)
        linears.append(GroupedLinear(name, role, block, expert, *size))
    have = {x.name for x in linears}
    missed = tuple(x.name for x in spec.linears if x.name not in have)
    act_order = quant.desc_act and quant.group_size != -1
    form = quant.version if quant.method == "gptq" else quant.method
    return Layout(True, form, quant.bits, quant.group_size, quant.sym, act_order, tuple(linears), missed)


def symmetric_word(bits: int, version: str) -> int:
    """The word of zero points that a symmetric GPTQ file holds everywhere, for widths that divide 32."""
    stored = 2 ** (bits - 1) - (version == "gptq")
    return sum(stored << shift for shift in range(0, 32, bits))


def packed_size(quant: Quantization, module: str, tail: str, shape: tuple[int, int]) -> tuple[int, int]:
    """(in_features, out_features) of a module's packed matrix, from the words it has."""
    (first, second), bits = shape, quant.bits_of(module)
    if tail == "weight_packed":
        return second * 32 // bits, first
    if quant.method == "awq":
        return (first, second * 32 // bits) if quant.version == "gemm" else (second * 32 // bits, first)
    return first * 32 // bits, second


def role_of(name: str, spec: ModelSpec) -> tuple[str, int | None, int | None]:
    """(role, block, expert) of a module by the family's table, or by its last word."""
    for template in (*spec.templates, *spec.expert_templates):
        match = template.pattern.match(f"{name}.weight")
        if match and template.role:
            parts = match.groupdict()
            block, expert = (int(parts[k]) if parts.get(k) else None for k in ("i", "e"))
            return template.role, None if in_extra_layer(name) else block, expert
    numbers = [] if in_extra_layer(name) else [int(p) for p in name.split(".") if p.isdigit()]
    return ROLE_OF_TAIL.get(name.rsplit(".", 1)[-1], "other"), numbers[0] if numbers else None, None


def axis_expression(spec: ModelSpec, name: str, axis: int) -> str | None:
    """The family table's expression for a linear's size along an axis (0 out_features, 1 in_features)."""
    for template in (*spec.templates, *spec.expert_templates):
        if template.pattern.match(f"{name}.weight") and len(template.shape) == 2:
            return template.shape[1 - axis if template.transposed else axis]
    return None


def size_key(spec: ModelSpec, name: str, axis: int) -> str | None:
    """The config key that sets a linear's size along an axis: the only one, or the MLP's width; None where unclear."""
    expression = axis_expression(spec, name, axis)
    if expression is None:
        return spec.key_for("intermediate_size") if axis == 1 and role_of(name, spec)[0] == "down" else None
    keys = _words(expression)
    widths = [key for key in keys if "intermediate" in key or "ffn" in key or "inner" in key]
    found = widths if len(widths) == 1 else keys
    return spec.key_for(found[0]) if len(found) == 1 else None


def resized(spec: ModelSpec, expression: str, key: str, value: int) -> int | None:
    """What a size expression gives when config[key] is `value`."""
    return evaluate(expression, lambda word: value if spec.key_for(word) == key else spec.lookup(word))


# Only an MLP's inner width can grow by zeros: every norm divides by hidden_size, and heads carry a position code.
_PADDABLE = frozenset({"gate", "up", "gate_up", "down"})


def pad_edits(spec: ModelSpec, tensors: Mapping[str, TensorInfo], key: str, value: int) -> tuple[PadTensor, ...]:
    """Zero-padding of every tensor whose shape follows config[key], to `value`; empty where it is not known to be
    exact.

    Gate and up get zero rows, down zero columns at the same places, so the new hidden units put out 0 and the sum is
    unchanged in exact arithmetic. A fused gate_up is padded in each half alike.
    """
    edits = []
    for name, info in tensors.items():
        weight = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        template = next((t for t in spec.templates if t.pattern.match(weight)), None)
        if template is None:
            continue
        expressions = template.shape
        if weight != name:
            expressions = expressions[1:] if template.transposed else expressions[:1]
        for axis, expression in enumerate(expressions[: len(info.shape)]):
            new = resized(spec, expression, key, value)
            if key not in map(spec.key_for, _words(expression)) or new == info.shape[axis]:
                continue
            if template.role not in _PADDABLE or len(template.shape) != 2 or new is None or new < info.shape[axis]:
                return ()
            edits.append(PadTensor(name, axis, new, blocks=2 if template.role == "gate_up" else 1))
    return tuple(edits)


WIDTH_STEP = 8  # widths are sought in steps of 8: packing needs more, so no legal width is passed over


def grown(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    key: str,
    suits: Callable[[int], bool],
    period: int,
) -> tuple[str, tuple[Edit, ...]] | None:
    """(title, edits) that zero-pad all that follows config[key] to the least width that `suits`, None where no exact
    padding is known.

    period: whether a size suits depends on its remainder by this alone, so that the search ends. Sizes may be a
    fraction of the key's value, as Qwen 1 states twice its width; that makes the period as many times longer, four at
    most.
    """
    old = spec.lookup(key)
    if not old:
        return None
    first = fits(old, WIDTH_STEP)
    new = next((v for v in range(first, first + 4 * math.lcm(period, WIDTH_STEP), WIDTH_STEP) if suits(v)), None)
    edits = pad_edits(spec, tensors, key, new) if new else ()
    if not edits:
        return None
    block = checkpoint.value("config.json")
    block = block[spec.text_key] if spec.text_key else block
    config = SetJson("config.json", spec.at(key), new, expect=block.get(key, MISSING))
    title = f"zero-pad the MLP: {key} {old} -> {new} (+{new / old - 1:.1%} of its weights, same outputs in exact arithmetic)"
    return title, (*edits, config)


def together(linears: Iterable, names: Iterable[str]) -> list[str]:
    """These linears and those that an engine stores with one of them as one matrix, in order: they are quantized alike
    or not at all.
    """
    wanted = set(names)
    sets: dict[tuple, list[str]] = {}
    for x in linears:
        for fused in (f for f in FUSED if x.role in f):
            sets.setdefault((x.name.rpartition(".")[0], fused), []).append(x.name)
    for members in sets.values():
        if wanted & set(members):
            wanted |= set(members)
    return sorted(wanted)


def keep_edits(linears: Iterable, names: Iterable[str]) -> tuple[Keep, ...]:
    """Edits that leave these linears, and what is fused with them, in 16 bits: by the last part of their names where it
    means no others.
    """
    linears = list(linears)
    wanted = set(together(linears, names))
    tails: dict[str, set[str]] = {}
    for x in linears:
        tails.setdefault(x.name.rpartition(".")[2], set()).add(x.name)
    patterns = [
        [f"*.{tail}"] if all_of <= wanted and len(all_of) > 1 else sorted(all_of & wanted)
        for tail, all_of in tails.items()
    ]
    return tuple(Keep(pattern) for found in patterns for pattern in found)


def reads(entries: Iterable[Mapping], form: str, bits: int, group_size: int, sym: bool) -> list[Mapping]:
    """Those rows of the table of kernels that read this format, width, group size and symmetry."""
    return [
        e
        for e in entries
        if form in e["formats"]
        and bits in e["bits"]
        and sym in e["sym"][form]
        and (not e["groups"] or group_size in e["groups"])
    ]


def nearest_plan(
    recipe: Recipe, layout: Layout, n_kv_heads: int | None, dtype: str = ""
) -> tuple[str, dict[str, object]] | None:
    """(in words, {recipe field: value}) of the smallest change after which the runtime has a kernel, None where no two
    fields help.

    dtype: one that the kernel must compute in. The order is by what it costs: symmetry, groups, the form of the file,
    then bits.
    """
    shapes = {(k, n) for _, k, n, _ in on_one_gpu(layout, recipe.tp, n_kv_heads)}
    fitting = lambda e: any(all(k % i == 0 and n % o == 0 for k, n in shapes) for i, o in e["tiles"])  # noqa: E731
    entries = [e for e in runtime_entries(recipe) if (not dtype or dtype in e["dtypes"]) and fitting(e)]
    widths = {x.in_features for x in layout.linears}
    groups = [g for g in (128, 64, 32, -1) if g == -1 or not any(w % g for w in widths)]
    forms = [f for f in ("gptq", "gptq_v2", "compressed-tensors") if recipe.method != "awq"] + ["awq"] * (
        recipe.bits == 4
    )
    single = (
        [("quantize symmetrically" if sym else "quantize asymmetrically", {"sym": sym}) for sym in (True, False)]
        + [(f"quantize in groups of {g}" if g > 0 else "quantize whole rows", {"group_size": g}) for g in groups]
        + [(f"write {form}", {"format": form}) for form in forms]
        + [(f"quantize to {bits} bits", {"bits": bits}) for bits in (4, 8) if recipe.method != "awq"]
    )
    pairs = [
        (f"{a} and {b.removeprefix('quantize ')}", x | y)
        for a, x in single
        for b, y in single
        if x.keys().isdisjoint(y)
    ]
    for words, values in [*single, *sorted(pairs, key=lambda p: "bits" in p[1])]:
        other = replace(recipe, **values)
        if other != recipe and reads(entries, other.output_format, other.bits, other.group_size, other.sym):
            return words, values
    return None


@cache
def _words(expression: str) -> list[str]:
    return sorted({node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)})


def fits(size: int, unit: int) -> int:
    """The next multiple of `unit` at or above `size`."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Kernel:
    """One kernel of a runtime that reads this layout. tiles: legal (in_features, out_features) multiples on one GPU."""

    name: str
    tiles: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]

    def takes(self, in_features: int, out_features: int) -> bool:
        return any(in_features % i == 0 and out_features % o == 0 for i, o in self.tiles)


@fact("checkpoint", stage="header")
def kernels(checkpoint, layout, recipe):
    """Kernels of recipe.runtime that read this format, width and group size, in the order they are tried."""
    return tuple(
        Kernel(e["name"], tuple(map(tuple, e["tiles"])), tuple(e["dtypes"]))
        for e in reads(runtime_entries(recipe), layout.format, layout.bits, layout.group_size, layout.sym)
    )


def runtime_entries(recipe: Recipe) -> list[dict]:
    """Rows of the table `kernels` for the recipe's runtime and version. Raises Unavailable where there are none."""
    if not recipe.runtime:
        raise Unavailable("no runtime was named: --runtime asks for one")
    entries = table("kernels").get(recipe.runtime)
    if not entries:
        raise Unavailable(f"no table of {recipe.runtime}'s kernels for grouped weights")
    return [e for e in entries if in_force(e, recipe.runtime_version)]


def in_force(entry: Mapping, version: str) -> bool:
    """Whether a table row holds for a version; without a version, for the newest."""
    if not version:
        return "until" not in entry
    asked = _release(version)
    return _release(entry.get("since", "0")) <= asked and ("until" not in entry or asked < _release(entry["until"]))


def version_before(version: str, other: str) -> bool:
    """Whether a release came before another; what follows its first three numbers is not compared."""
    return _release(version) < _release(other)


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def on_one_gpu(layout: Layout, tp: int, n_kv_heads: int | None) -> list[tuple[str, int, int, GroupedLinear]]:
    """(roles, in_features, out_features, one linear of them) of every matrix on one GPU.

    Fused sets count as one matrix; experts are left out, because kernels of their own run them. Key and value heads
    are repeated where there are fewer of them than GPUs. Sizes that do not divide are left out: heads and groups have
    their own rules.
    """
    sets: dict[tuple, list[GroupedLinear]] = {}
    for linear in layout.linears:
        if linear.expert is not None:
            continue
        fused = next((group for group in FUSED if linear.role in group), (linear.role,))
        parent = linear.name.rpartition(".")[0] if len(fused) > 1 else linear.name
        sets.setdefault((parent, fused), []).append(linear)
    found = []
    for members in sets.values():
        row = members[0].role in ROW_PARALLEL
        width, height = members[0].in_features, 0
        for linear in members:
            copies = min(tp, n_kv_heads) if linear.role in ("k", "v") and n_kv_heads else tp
            share, rest = divmod(linear.out_features, 1 if row else copies)
            height += share if not rest else 0
        if width % (tp if row else 1) == 0 and height:
            roles = sorted(
                (m.role for m in members),
                key=lambda role: sum(FUSED, ()).index(role) if role in sum(FUSED, ()) else 0,
            )
            found.append(("+".join(roles), width // (tp if row else 1), height, members[0]))
    return found
