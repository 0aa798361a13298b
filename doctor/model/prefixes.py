"""Prefixes of tensor names: what stands before the decoder layers here, and what the class in config.json takes.

The table of a family has the names of its class, `model.layers.0.…`. A checkpoint saved from the inner model lacks
`model.`; one taken out of a multimodal model or saved from a wrapper has a prefix too many. Both are one cause, and
renaming cures both: no value changes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from doctor.core.tables import family, table
from doctor.model.linears import NOT_TEXT, in_extra_layer
from doctor.model.spec import ModelSpec

# Wrappers of training and adapters around a whole model. Some names that carry one beside others that do not are still
# wrong; any other second prefix is taken for a second model (a draft model, a tower) and not judged.
_WRAPPERS = ("base_model.model.", "model.language_model.", "language_model.", "module.", "_orig_mod.")
# Classes over the same inner model as the family's own: its names, and a head of another kind.
_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_OWN_HEAD = re.compile(r"(ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True)
class WrongPrefix:
    """Tensor names whose prefix the class in config.json does not take, and the names that it takes."""

    have: str  # before the container of the decoder layers: "" or "language_model.model."
    want: str  # of the family's class: "model."
    names: Mapping[str, str]  # each such name -> the right one
    towerless: bool = False  # the class is a multimodal one, and only the text's tensors are here
    added: bool = False  # transformers adds the prefix of an inner model by itself

    @property
    def missing(self) -> bool:
        """Whether the names lack the prefix, and have no other in its place."""
        return self.have == ""

    @property
    def extra(self) -> str:
        """What the names have too much, "" where they have another prefix instead."""
        if self.have.endswith(self.want) and self.have != self.want:
            return self.have.removesuffix(self.want)
        return self.have.removeprefix(self.want) if self.have.startswith(self.want) else ""


def wrong_prefix(spec: ModelSpec, tensors: Iterable[str], config: Mapping[str, Any]) -> WrongPrefix | None:
    """The prefix that is wrong for the class in config.json; None where all are right, or where nobody can tell:
    custom code, a family or a multimodal class that no table knows.
    """
    tensors = list(tensors)
    inner = [t.tensor for t in spec.templates if "{i}" in t.tensor]
    root, container = _split(inner[0].partition("{i}")[0]) if inner else ("model.", "layers.")
    taken = _taken(spec, config, root)
    if not taken:
        return _wrapped(tensors)
    want = taken[0]
    if all(name.startswith(want + container) for name in tensors if container in name):
        return None
    layers = _layers(tensors, container, {t.partition("{i}.")[2].partition(".")[0] for t in inner})
    right = set().union(*(layers[have] for have in layers if have in taken))
    wrong = [have for have in layers if have not in taken and (not right or have.startswith(_WRAPPERS))]
    # Beside layers under right names, those that fill their gaps are the model's own; others may be a second model's.
    wrong = wrong or [
        h for h in layers if h not in taken and not layers[h] & right and max(layers[h]) < (spec.n_layers or 0)
    ]
    if not wrong:
        return None
    have = max(wrong, key=lambda prefix: len(layers[prefix]))
    outer = [t.tensor for t in spec.templates if "{i}" not in t.tensor] or list(_OUTER)
    names = _renamed(outer, tensors, have, want, root, container)
    return WrongPrefix(have, want, names, _towerless(spec, tensors), spec.text_key is None) if names else None


def _layers(tensors: Iterable[str], container: str, modules: set[str]) -> dict[str, set[int]]:
    """Prefix -> numbers of the decoder layers under it, if most of its names are the family's. modules: the family's
    names of what is in a layer; any if empty.
    """
    pattern = re.compile(rf"^(?P<have>(?:\w+\.)*?){re.escape(container)}(?P<i>\d+)\.(?P<module>\w+)")
    found: dict[str, set[int]] = {}
    known: dict[str, int] = {}  # prefix -> how many of its names are the family's, less how many are not
    for name in tensors:
        match = pattern.match(name)
        if match and not NOT_TEXT.search(name) and not in_extra_layer(name):
            have = match["have"]
            found.setdefault(have, set()).add(int(match["i"]))
            known[have] = known.get(have, 0) + (1 if not modules or match["module"] in modules else -1)
    return {have: numbers for have, numbers in found.items() if known[have] > 0}


def _wrapped(tensors: list[str]) -> WrongPrefix | None:
    """The prefix of an adapter's wrapper around a whole model, which no class takes, whatever its family."""
    junk = _WRAPPERS[0]
    if not tensors or not all(name.startswith(junk) for name in tensors):
        return None
    return WrongPrefix(junk, "", {name: name.removeprefix(junk) for name in tensors})


def _taken(spec: ModelSpec, config: Mapping[str, Any], root: str) -> tuple[str, ...]:
    """Prefixes that the class in config.json takes, the one that it saves first; () for a class that is not judged."""
    own = family(spec.family).get("architecture", "")
    if config.get("auto_map"):
        return ()
    if spec.text_key:
        return tuple(table("readers")["wrappers"].get(spec.architecture, ()))
    if not own:
        return ()
    also = table("readers")["prefixes"].get(spec.family, [])
    if spec.architecture == own:
        return (root, *also)
    bare = _OWN_HEAD.sub("", own)  # a classifier is a pooling model, of which vLLM takes bare names too
    return (root, *also, "") if spec.architecture in [bare + head for head in _HEADS] else ()


def _towerless(spec: ModelSpec, tensors: Iterable[str]) -> bool:
    """Whether the class is a multimodal one, and no tensor is of its other parts."""
    return spec.text_key is not None and not any(NOT_TEXT.search(name) for name in tensors)


def _split(before: str) -> tuple[str, str]:
    """`model.layers.` -> `model.`, `layers.`."""
    head, dot, last = before.rstrip(".").rpartition(".")
    return head + dot, last + "."


def _renamed(
    outer: Iterable[str], tensors: Iterable[str], have: str, want: str, root: str, container: str
) -> dict[str, str]:
    """Each name with the wrong prefix -> the right one. A name that is right as it stands is left alone, as are names
    of which nobody knows where they belong.
    """
    outer = {n for t in outer for n in (t, t.removesuffix(".weight") + ".bias")}
    inside = {t.removeprefix(root) for t in outer if t.startswith(root)}
    heads = {t for t in outer if not t.startswith(root)}
    right = heads | {want + t for t in inside}
    junk = have.removesuffix(want) if have.endswith(want) else ""
    found = {}
    for name in tensors:
        rest = name.removeprefix(have)
        if name.startswith(have + container):
            found[name] = want + rest
        elif name in right:
            continue
        elif (head := next((h for h in heads if name in (junk + h, have + h)), None)) is not None:
            found[name] = head
        elif name.startswith(have) and rest in inside:
            found[name] = want + rest
        elif junk not in ("", want) and name.startswith(junk):
            found[name] = name[len(junk) :]
    return {old: new for old, new in found.items() if old != new}
