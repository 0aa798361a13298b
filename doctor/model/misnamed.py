"""Tensors under other names than the family's: absent by name, and present under another spelling.

A converter that writes `mlp.experts.gate_proj.weight7` for `mlp.experts.7.gate_proj.weight` loses nothing: readers miss
one name and do not know the other. A pair is proven where both names have the same words, the same decoder layer and
the same other numbers in the same order, and the tensor has the shape that config.json gives the right name.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import fact
from doctor.formats.known import packed_tails
from doctor.model.expressions import evaluate
from doctor.model.linears import NOT_TEXT, QUANTIZABLE, in_extra_layer
from doctor.model.spec import ModelSpec
from doctor.model.templates import Template
from doctor.model.tensor_map import Placement

_PARTS = re.compile(r"[A-Za-z]+|\d+")
# Llama's and Mixtral's names of an MLP's linears, and the words that other families have for them.
_NUMBERED = re.compile(r"(?<![A-Za-z0-9])w([123])(?![A-Za-z0-9])")
_ROLES = {"1": "gate_proj", "2": "down_proj", "3": "up_proj"}
_MOST = 100_000  # layers, or experts of all layers; a config that states 2**39 must not fill memory
_AS_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_HEADS = frozenset({"lm_head.weight", "embed_out.weight", "output_layer.weight", "transformer.output_layer.weight"})


@dataclass(frozen=True)
class Misnamed:
    """Pairs of a name that is here and the family's name for the same tensor.

    spelled: proven by words, numbers and shapes. numbered: w1, w2, w3 for gate, down and up, where the shapes prove the
    down projection alone. shaped: paired by shape alone, in the same way in every decoder layer. absent: the family's
    linears that are not here under any of these names.
    """

    spelled: Mapping[str, str] = field(default_factory=dict)
    numbered: Mapping[str, str] = field(default_factory=dict)
    shaped: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, str]:
        return {**self.spelled, **self.numbered, **self.shaped}


def find_misnamed(spec: ModelSpec, tensors: Mapping[str, TensorInfo], place: Placement | None) -> Misnamed:
    """Tensors that are here under other names than the family's, and the family's linears that are not here at all."""
    placed = {info.name for info, _axis, _sizes in place.sizes()} if place is not None else set()
    unknown = [n for n in tensors if n not in placed]
    tails = packed_tails()
    if all(map(_aside, unknown)) or not spec.templates or any(n.endswith(tails) for n in tensors):
        return Misnamed()
    stem = place.stem if place is not None else next(_stems(spec), "")
    wanted = {n: t for n, t in _expected(spec, stem, place) if n not in tensors}
    linears = {n for n, t in wanted.items() if t.role in QUANTIZABLE}
    shapes = {_shape(spec, template) for template in wanted.values()}
    if not any(tensors[n].shape in shapes and not _aside(n) for n in unknown):  # no pair can be proven
        return Misnamed(absent=frozenset(linears))
    unknown = [n for n in unknown if not (_aside(n) or any(t.pattern.match(n) for t in spec.expert_templates))]
    container = re.compile(rf"(?<![A-Za-z0-9]){re.escape(stem.rstrip('.').rpartition('.')[2])}[^A-Za-z0-9]*(\d+)")
    own = _numbers_in_words(spec)
    spelled = _pairs(spec, tensors, unknown, wanted, lambda n: _key(n, container, own))
    rest = [n for n in unknown if n not in spelled]
    left = {n: t for n, t in wanted.items() if n not in spelled.values()}
    numbered = _pairs(spec, tensors, rest, left, lambda n: _key(_NUMBERED.sub(_role, n), container, own))
    numbered = numbered if _decisive(spec, left, numbered) else {}
    rest = [n for n in rest if n not in numbered]
    left = {n: t for n, t in left.items() if n not in numbered.values()}
    shaped = _by_shape(spec, tensors, rest, left, container)
    found = {**spelled, **numbered, **shaped}
    return Misnamed(spelled, numbered, shaped, frozenset(linears.difference(found.values())))


def _aside(name: str) -> bool:
    """Whether a tensor belongs to a part of the model that the family's table does not name."""
    return NOT_TEXT.search(name) is not None or in_extra_layer(name)


def _stems(spec: ModelSpec) -> Iterator[str]:
    return (t.tensor.partition("{i}")[0] for t in spec.templates if "{i}" in t.tensor)


def _expected(spec: ModelSpec, stem: str, place: Placement | None) -> Iterator[tuple[str, Template]]:
    """(name, template) of every tensor that config.json gives this model."""
    layers, experts = spec.n_layers or 0, spec.lookup("num_experts")
    if not isinstance(experts, int) or layers > _MOST or layers * experts > _MOST:
        layers, experts = min(layers, _MOST), 0
    for template in spec.templates:
        if "{i}" not in template.tensor:
            name = place.outer_name(template) if place is not None else template.tensor
            if not (spec.tied and name in _HEADS):
                yield name, template
            continue
        tail = template.tensor.partition("{i}.")[2]
        for layer in range(layers):
            if spec.in_layer(template.layers, layer) is not True:
                continue
            if "{e}" not in tail:
                yield f"{stem}{layer}.{tail}", template
            else:
                for e in range(experts):
                    yield f"{stem}{layer}.{tail.replace('{e}', str(e))}", template


def _numbers_in_words(spec: ModelSpec) -> re.Pattern[str]:
    """The family's words that hold a number which counts nothing: `w1`, `fc2`, `ln_1`, `dense_4h_to_h`."""
    pieces = {p for t in spec.templates for p in t.tensor.split(".") if re.search(r"\d", p)}
    choice = "|".join(map(re.escape, sorted(pieces, key=len, reverse=True))) or "(?!)"
    return re.compile(rf"(?<![A-Za-z0-9])(?:{choice})(?![A-Za-z0-9])")


def _key(name: str, container: re.Pattern[str], words_with_numbers: re.Pattern[str]) -> tuple[object, ...]:
    """What two spellings of one name have in common: the layer, the words in any order, the other numbers in order."""
    match = container.search(name)
    layer = match[1] if match else ""
    rest = name[: match.start(1)] + name[match.end(1) :] if match else name
    rest = words_with_numbers.sub(lambda found: found[0].translate(_AS_LETTERS), rest)
    parts = _PARTS.findall(rest)
    words = sorted(p for p in parts if not p.isdigit())
    return layer, tuple(words), tuple(p for p in parts if p.isdigit())


def _role(match: re.Match[str]) -> str:
    return _ROLES[match[1]]


def _pairs(
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    unknown: Iterable[str],
    wanted: Mapping[str, Template],
    key: Callable[[str], tuple[object, ...]],
) -> dict[str, str]:
    """Names with one key and the right shape, where no other name has this key."""
    ours: dict[tuple[object, ...], list[str]] = defaultdict(list)
    theirs: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in unknown:
        ours[key(name)].append(name)
    for name in wanted:
        theirs[key(name)].append(name)
    return {
        names[0]: theirs[k][0]
        for k, names in ours.items()
        if len(names) == 1 == len(theirs[k]) and tensors[names[0]].shape == _shape(spec, wanted[theirs[k][0]])
    }


def _shape(spec: ModelSpec, template: Template) -> tuple[int | None, ...]:
    return tuple(evaluate(size, spec.lookup) for size in template.shape)


def _decisive(spec: ModelSpec, wanted: Mapping[str, Template], found: Mapping[str, str]) -> bool:
    """Whether shapes tell the down projection from the other two, so that w2 is proven to be it."""
    shapes: dict[str | None, set[tuple[int | None, ...]]] = defaultdict(set)
    for name in found.values():
        shapes[wanted[name].role].add(_shape(spec, wanted[name]))
    return not shapes["down"] & (shapes["gate"] | shapes["up"])


def _by_shape(
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    unknown: Iterable[str],
    wanted: Mapping[str, Template],
    container: re.Pattern[str],
) -> dict[str, str]:
    """Pairs by shape alone: each decoder layer has as many unknown tensors as it lacks, all of different shapes."""
    ours: dict[str, dict[tuple[int | None, ...], list[str]]] = defaultdict(dict)
    theirs: dict[str, dict[tuple[int | None, ...], list[str]]] = defaultdict(dict)
    for name in unknown:
        match = container.search(name)
        if match:
            ours[match[1]].setdefault(tensors[name].shape, []).append(name)
    for name, template in wanted.items():
        match = container.search(name)
        if match:
            theirs[match[1]].setdefault(_shape(spec, template), []).append(name)
    found, tails = {}, set()
    for layer in theirs.keys() | ours.keys():
        if ours[layer].keys() != theirs[layer].keys():
            return {}
        for shape, names in ours[layer].items():
            if len(names) != 1 or len(theirs[layer][shape]) != 1:
                return {}
            found[names[0]] = theirs[layer][shape][0]
            tails.add((container.sub("", names[0]), container.sub("", found[names[0]])))
    return found if len(tails) == len({a for a, _b in tails}) == len({b for _a, b in tails}) else {}


@fact("checkpoint", cost="header")
def misnamed(checkpoint, spec, tensors, placement=None) -> Misnamed:
    """Tensors that are here under other names than the family's (misnamed.Misnamed)."""
    return find_misnamed(spec, tensors, placement)
