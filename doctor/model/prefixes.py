"""Prefixes of tensor names: what stands before the decoder layers here, and what the class in config.json takes.

The table of a family has the names of its class, `model.layers.0.…`. A checkpoint saved from the inner model lacks
`model.`; one taken out of a multimodal model or saved from a wrapper has a prefix too many. Both are one cause, and
renaming cures both: no value changes.
"""

import re
from collections import Counter
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
_OWN_HEAD = re.compile(r"(ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True)
class WrongPrefix:
    """Tensor names whose prefix the class in config.json does not take, and the names that it takes."""

    have: str  # before the container of the decoder layers: "" or "language_model.model."
    want: str  # of the family's class: "model."
    names: Mapping[str, str]  # each such name -> the right one
    towerless: bool = False  # the class is a multimodal one, and only the text's tensors are here

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
    custom code, a multimodal class that no table knows, a family without a table.
    """
    inner = [t.tensor for t in spec.templates if "{i}" in t.tensor]
    root, container = _split(inner[0].partition("{i}")[0]) if inner else ("", "")
    taken = _taken(spec, config, root) if inner else ()
    if not taken:
        return None
    want, tensors = taken[0], list(tensors)
    if all(name.startswith(want + container) for name in tensors if container in name):
        return None
    modules = {t.partition("{i}.")[2].partition(".")[0] for t in inner}
    pattern = re.compile(rf"^(?P<have>(?:\w+\.)*?){re.escape(container)}\d+\.(?P<module>\w+)")
    found: Counter[str] = Counter()
    for name in tensors:
        match = pattern.match(name)
        if match and match["module"] in modules and not NOT_TEXT.search(name) and not in_extra_layer(name):
            found[match["have"]] += 1
    wrong = [have for have in found if have not in taken]
    if found.keys() & set(taken):
        wrong = [have for have in wrong if have.startswith(_WRAPPERS)]
    if not wrong:
        return None
    have = max(wrong, key=lambda prefix: found[prefix])
    outer = [t.tensor for t in spec.templates if "{i}" not in t.tensor]
    names = _renamed(outer, tensors, have, want, root, container)
    return WrongPrefix(have, want, names, _towerless(spec, tensors)) if names else None


def _taken(spec: ModelSpec, config: Mapping[str, Any], root: str) -> tuple[str, ...]:
    """Prefixes that the class in config.json takes, the one that it saves first; () for a class that is not judged."""
    own = family(spec.family).get("architecture", "")
    if not own or config.get("auto_map"):
        return ()
    if spec.text_key:
        return tuple(table("readers")["wrappers"].get(spec.architecture, ()))
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
        elif junk and name.startswith(junk):
            found[name] = name[len(junk) :]
    return {old: new for old, new in found.items() if old != new}
