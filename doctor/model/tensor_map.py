"""Which tensor is which: names sorted into blocks, each matched with the template of its family.

A rule about missing, unexpected or misshapen tensors needs one answer to "what should stand here"; it is worked out
once. Templates come from the table of architectures, which also says what makes a decoder layer one of full attention,
linear attention, experts and so on. Layers are compared with layers of their own kinds, and only with those that hold
everything they hold.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import Unavailable, fact
from doctor.core.messages import _
from doctor.model.expressions import evaluate, keys_of
from doctor.model.linears import BUFFERS, NOT_TEXT, QUANTIZABLE
from doctor.model.spec import ModelSpec, build_spec
from doctor.model.templates import Template
from doctor.model.unpacked import UnpackedTensors

_ANY_NUMBER = re.compile(r"\.\d+\.")
_NUMBERED = re.compile(r"^(?P<stem>(?:.*?\.)?)(?P<block>\d+)\.(?P<tail>.+)$")


@dataclass(frozen=True)
class Misfit:
    """One axis that differs from config.json; axis None: another number of axes."""

    info: TensorInfo
    template: Template
    axis: int | None
    expression: str
    want: int
    have: int


@dataclass
class Placement:
    """Tensors by place. blocks: number -> tail of the name -> tensor; `stem` + number + "." + tail is the whole name.

    outside: the language model's tensors that stand in no block. foreign: vision towers and the like, not judged.
    words: weight of a packed linear -> the tensor that holds its codes.
    """

    spec: ModelSpec
    stem: str
    blocks: dict[int, dict[str, TensorInfo]] = field(default_factory=dict)
    outside: dict[str, TensorInfo] = field(default_factory=dict)
    foreign: dict[str, TensorInfo] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    _sizes: list | None = field(default=None, repr=False)
    _endings: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    _kinds: dict[int, tuple[bool | None, ...]] = field(default_factory=dict, repr=False)
    _templates: dict[str, list[Template]] = field(default_factory=dict, repr=False)  # tail of a name -> its templates
    _outer: dict[str, Template] = field(default_factory=dict, repr=False)  # name here -> template outside of blocks

    def name(self, block: int, tail: str) -> str:
        return f"{self.stem}{block}.{tail}"

    def stored(self, name: str) -> str:
        """What this checkpoint calls a weight, or would call it: of a packed linear, the tensor with its codes."""
        if self.words and not self._endings:
            self._endings = {_ANY_NUMBER.sub(".", n): (n, codes) for n, codes in self.words.items()}
        other, codes = self._endings.get(_ANY_NUMBER.sub(".", name), ("", ""))
        if not codes:
            return name
        fused = codes.startswith(other)
        return name + codes[len(other) :] if fused else name.removesuffix("weight") + codes.rpartition(".")[2]

    def label(self, info: TensorInfo) -> str:
        """How a message names a weight beside its shape: a packed linear has no tensor of that shape."""
        return info.name.removesuffix(".weight") if info.name in self.words else info.name

    @property
    def counted(self) -> list[int]:
        """Numbers of the blocks that config.json counts; extra blocks behind them (multi-token prediction) are left
        out.
        """
        limit = self.spec.n_layers
        return [b for b in sorted(self.blocks) if limit is None or b < limit]

    def template_of(self, name: str) -> Template | None:
        """The family's template for a tensor at its place; None where the table has none."""
        match = _NUMBERED.match(name) if name.startswith(self.stem) else None
        if not match or match["stem"] != self.stem:
            if not self._outer:
                for t in (t for t in self.spec.templates if "{i}" not in t.tensor):
                    self._outer.setdefault(self.outer_name(t), t)
            return self._outer.get(name)
        return self._inner(match["tail"], int(match["block"]))

    def _inner(self, tail: str, layer: int) -> Template | None:
        """The template of a tensor inside a decoder layer, by the part of its name after the layer's number.

        Where kinds of layers hold tensors of different sizes under one name, the one of the layer's own kind; without
        sizes where config.json does not say which kind that is.
        """
        if tail not in self._templates:
            inner = (t for t in self.spec.templates if "{i}" in t.tensor)
            self._templates[tail] = [t for t in inner if _tail_pattern(t.tensor).match(tail)]
        found = self._templates[tail]
        if len(found) < 2:
            return found[0] if found else None
        own = [t for t in found if self.spec.in_layer(t.layers, layer) is not False]
        return own[0] if len(own) == 1 else replace(found[0], shape=("unstated",) * len(found[0].shape))

    def outer_name(self, template: Template) -> str:
        """What this checkpoint calls a tensor of the family that stands in no block."""
        if template.tensor.startswith("lm_head") and self.spec.head_tensor:
            return self.spec.head_tensor
        family_root = _root(self.family_stem)
        if family_root and template.tensor.startswith(family_root):
            return _root(self.stem) + template.tensor[len(family_root) :]
        return template.tensor

    @property
    def family_stem(self) -> str:
        """What stands before a block's number in the family's own names: `model.layers.`."""
        return next((t.tensor.partition("{i}")[0] for t in self.spec.templates if "{i}" in t.tensor), "")

    def sizes(self) -> list[tuple[TensorInfo, Template, tuple[str, ...]]]:
        """(tensor, template, expressions) of every tensor with a template, biases of linears included. Worked out
        once.
        """
        if self._sizes is None:
            self._sizes = list(self._every_size())
        return self._sizes

    def _every_size(self) -> Iterator[tuple[TensorInfo, Template, tuple[str, ...]]]:
        yield from _sizes_of(self.outside, self.template_of)
        for layer, own in self.blocks.items():
            yield from _sizes_of(own, partial(self._inner, layer=layer))

    def misfits(self, lookup=None) -> list[Misfit]:
        """Axes whose length is not what config.json gives. Lengths that the table states as plain numbers are not
        judged.
        """
        lookup = lookup or self.spec.lookup
        wants: dict[str, int | None] = {}  # an expression stands for thousands of tensors
        found = []
        fits: set[tuple] = set()  # (expressions, shape): in a sound model a few hundred for all its tensors
        for info, template, expressions in self.sizes():
            if (expressions, info.shape) in fits:
                continue
            if len(info.shape) != len(expressions):
                found.append(Misfit(info, template, None, "", len(expressions), len(info.shape)))
                continue
            before = len(found)
            for axis, expression in enumerate(expressions):
                if expression not in wants:
                    wants[expression] = evaluate(expression, lookup) if keys_of(expression) else None
                want = wants[expression]
                if want is not None and want != info.shape[axis]:
                    found.append(Misfit(info, template, axis, expression, want, info.shape[axis]))
            if len(found) == before:
                fits.add((expressions, info.shape))
        return found

    def users(self, key: str) -> list[tuple[TensorInfo, int, str]]:
        """(tensor, axis, expression) of every axis whose length depends on this config key and on no other."""
        return [
            (info, axis, e)
            for info, _, expressions in self.sizes()
            if len(info.shape) == len(expressions)
            for axis, e in enumerate(expressions)
            if keys_of(e) == (key,)
        ]

    def missing(self) -> dict[str, str]:
        """Name of each absent tensor -> why it must be there."""
        found = self._missing_outside() | self._missing_in_all() | self._missing_by_kind() | self._missing_siblings()
        counted = self.counted
        kinds = [frozenset(self.blocks[b]) for b in counted]
        alike = [self._kinds_of(b) for b in counted]
        lacking_experts: dict[frozenset[str], list[str]] = {}  # layers that hold the same names are looked at once
        for block, own, kind_of in zip(counted, kinds, alike, strict=True):
            if own not in lacking_experts:
                lacking_experts[own] = self._missing_of_experts(own)
            found |= {self.name(block, tail): "other experts of its layer have it" for tail in lacking_experts[own]}
            fuller = [kind for kind, other in zip(kinds, alike, strict=True) if kind_of == other and own < kind]
            lacking = {t for t in frozenset().union(*fuller) - own if not BUFFERS.search(t)}
            if not self.spec.family and block == counted[0] and self._are_vectors(lacking):
                continue  # as in ModernBERT (a norm) and Zaya; where one is lost, the class says so (G321)
            if lacking and (self.spec.family or (len(counted) >= 4 and len(fuller) * 4 >= 3 * len(counted))):
                found |= {
                    self.name(block, t): f"{sum(t in k for k in kinds)} of {len(counted)} blocks have it"
                    for t in lacking
                }
        return found

    def _are_vectors(self, tails: set[str]) -> bool:
        """Whether tensors of these names have one axis at most."""
        return all(len(self.blocks[b][t].shape) < 2 for b in self.counted for t in tails & self.blocks[b].keys())

    def _kinds_of(self, layer: int) -> tuple[bool | None, ...]:
        """What config.json says about a decoder layer: for each kind that the table knows, whether it is one."""
        if layer not in self._kinds:
            names = dict.fromkeys(t.layers for t in self.spec.templates if t.layers)
            self._kinds[layer] = tuple(self.spec.in_layer(name, layer) for name in names)
        return self._kinds[layer]

    def _missing_by_kind(self) -> dict[str, str]:
        """Linears of the kind that config.json gives a layer, where it holds nothing unknown in their place."""
        own_kind = [t for t in self.spec.templates if t.layers and "{e}" not in t.tensor and t.role in QUANTIZABLE]
        found: dict[str, str] = {}
        for layer in self.counted if own_kind else ():
            own = self.blocks[layer]
            here = {t.tensor.partition("{i}.")[2]: t.layers for t in own_kind if self.spec.in_layer(t.layers, layer)}
            lacking = here.keys() - own.keys()
            if lacking and all(self._inner(tail, layer) for tail in own if tail.endswith(".weight")):
                found |= {
                    self.name(layer, tail): _(
                        "config.json makes layer {layer} one of {kind}", layer=layer, kind=here[tail]
                    )
                    for tail in lacking
                }
        return found

    def _missing_of_experts(self, tails: frozenset[str]) -> list[str]:
        """Linears that single experts of a decoder layer lack, of the names (tails) that the layer holds."""
        parts = [t.tensor.partition("{i}.")[2].partition("{e}") for t in self.spec.templates if "{e}" in t.tensor]
        lacking = []
        for stem in {part[0] for part in parts}:
            numbers: dict[str, set[str]] = {rest: set() for before, _mark, rest in parts if before == stem}
            for tail in tails:
                if tail.startswith(stem):
                    number, dot, rest = tail[len(stem) :].partition(".")
                    if dot + rest in numbers:
                        numbers[dot + rest].add(number)
            every = set().union(*numbers.values())
            every |= {str(n) for n in range(max((int(n) for n in every if n.isdecimal()), default=0))}
            lacking += [f"{stem}{n}{rest}" for rest, have in numbers.items() if have for n in sorted(every - have)]
        return lacking

    def _missing_siblings(self) -> dict[str, str]:
        """What a layer of a kind of its own lacks: linears of a module that has its others, norms that all other
        layers have.
        """
        inner = [t for t in self.spec.templates if "{i}" in t.tensor and "{e}" not in t.tensor]
        tails = {t.tensor.partition("{i}.")[2]: t for t in inner}
        found: dict[str, str] = {}
        for block in self.counted:
            own = self.blocks[block]
            for template in inner:
                tail = template.tensor.partition("{i}.")[2]
                module, here = _module(tail), self.spec.in_layer(template.layers, block)
                if tail in own or here is False:
                    continue
                if template.role in QUANTIZABLE:
                    beside = [t for t in own if _module(t) == module and t.endswith(".weight")] if module else []
                    known = all(t in tails for t in beside)
                    if known and any(tails[t].role in QUANTIZABLE for t in beside):
                        found[self.name(block, tail)] = _("{module} has its other linears", module=module[-1])
                elif here:
                    alike = [b for b in self.counted if b != block and self.spec.in_layer(template.layers, b)]
                    if alike and all(tail in self.blocks[b] for b in alike):
                        found[self.name(block, tail)] = _("every other layer of its kind has it")
                    elif not alike and template.layers and self._belongs(tail, own):
                        found[self.name(block, tail)] = _("{module} has its other tensors", module=module[-1])
        return found

    def _belongs(self, tail: str, own: dict[str, TensorInfo]) -> bool:
        """Whether the only layer of a kind, with the tensors `own`, must hold this one: its module is there, and no
        flag says that norms are off. Biases are not judged.
        """
        flags = self.spec.config.items()
        off = any("norm" in key and value is False for key, value in flags)
        judged = not tail.endswith("bias") or tail.endswith("dt_bias")
        module = _module(tail)[:1]
        return judged and not off and bool(module) and any(_module(t)[:1] == module for t in own)

    def _missing_outside(self) -> dict[str, str]:
        """Embedding, last norm and the like: what stands beside the blocks in every model of the family."""
        root = _root(self.family_stem)
        return {
            self.outer_name(t): _("every {family} model has it", family=self.spec.family)
            for t in self.spec.templates
            if "{i}" not in t.tensor and root and t.tensor.startswith(root) and self.outer_name(t) not in self.outside
        }

    def _missing_in_all(self) -> dict[str, str]:
        """Linears, experts, norms and routers that no block has, though the family has them in each, and nothing
        unknown stands in their place.
        """
        held = {tail for b in self.counted for tail in self.blocks[b]}
        inner = [t for t in self.spec.templates if "{i}" in t.tensor]
        if any(
            tail.endswith(".weight") and not any(_tail_pattern(t.tensor).match(tail) for t in inner) for tail in held
        ):
            return {}
        found: dict[str, str] = {}
        unbiased = any("bias" in key and value is False for key, value in self.spec.config.items())
        for template in inner:
            tail = template.tensor.partition("{i}.")[2]
            bias = tail.removesuffix(".weight") + ".bias"
            if (
                template.bias is True
                and not unbiased
                and tail.endswith(".weight")
                and tail in held
                and bias not in held
            ):
                found |= {
                    self.name(b, bias): _("no decoder layer has it") for b in self.counted if tail in self.blocks[b]
                }
            if template.every_layer and not any(_tail_pattern(template.tensor).match(t) for t in held):
                if "{e}" in tail:
                    found |= self._experts_without(tail)
                elif template.role in QUANTIZABLE or self._stands_in_every_block(template, held):
                    found |= {self.name(b, tail): _("no decoder layer has it") for b in self.counted}
        return found

    def _experts_without(self, tail: str) -> dict[str, str]:
        """A linear that no expert of any block has, in the blocks whose experts have their others."""
        module = re.compile("^" + re.escape(tail.partition("{e}")[0]) + r"(\d+)\.")
        found: dict[str, str] = {}
        for block in self.counted:
            experts = {int(match[1]) for match in map(module.match, self.blocks[block]) if match}
            found |= {self.name(block, tail.replace("{e}", str(e))): _("no expert has it") for e in sorted(experts)}
        return found

    def _stands_in_every_block(self, template: Template, held: set[str]) -> bool:
        """Whether a norm or router has no excuse to be absent from all blocks.

        A norm of the block itself: none where a flag sets attention and MLP side by side, because one norm then serves
        both. Inside a module: where the module has other tensors, and no flag about norms is off.
        """
        tail = template.tensor.partition("{i}.")[2]
        module, _, rest = tail.partition(".")
        if template.role in QUANTIZABLE or not tail.endswith(".weight"):
            return False
        flags = {key: value for key, value in self.spec.config.items() if isinstance(value, bool)}
        if "." not in rest:
            side_by_side = any(value and "parallel" in key for key, value in flags.items())
            return ("norm" in module or module.startswith("ln_")) and not side_by_side
        return any(t.startswith(module + ".") for t in held) and not any(
            "norm" in key and not value for key, value in flags.items()
        )


def _sizes_of(
    tensors: Mapping[str, TensorInfo], template_of: Callable[[str], Template | None]
) -> Iterator[tuple[TensorInfo, Template, tuple[str, ...]]]:
    """Placement.sizes() of tensors by the names that `template_of` takes."""
    for name, info in tensors.items():
        template = template_of(name)
        if template is not None:
            yield info, template, template.shape
        elif name.endswith(".bias"):
            template = template_of(name.removesuffix(".bias") + ".weight")
            if template is not None and len(template.shape) == 2 and template.role in QUANTIZABLE:
                yield info, template, (template.shape[1 if template.transposed else 0],)


def _root(stem: str) -> str:
    """`model.layers.` -> `model.`; `h.` -> ``."""
    return stem.rstrip(".").rpartition(".")[0] + "." if "." in stem.rstrip(".") else ""


def _module(tail: str) -> list[str]:
    """The module a tensor of a layer is in: `self_attn` of `self_attn.q_proj.weight` and of `self_attn.sinks`."""
    parts = tail.split(".")
    return parts[: -2 if parts[-1] in ("weight", "bias") else -1]


@cache
def _tail_pattern(template: str) -> re.Pattern:
    tail = template.partition("{i}.")[2]
    return re.compile("^" + re.escape(tail).replace(r"\{e\}", r"\d+") + "$")


@fact("checkpoint", cost="header")
def placement(checkpoint, spec, unpacked_tensors: UnpackedTensors) -> Placement:
    """Tensors sorted into blocks and matched with the family's templates (placement.Placement). A packed linear is
    judged as the linear that it stands for.
    """
    tensors, words = unpacked_tensors
    if words:
        spec = build_spec(checkpoint.value("config.json") or {}, tensors)
    stems: dict[str, int] = {}
    for linear in spec.linears:
        match = _NUMBERED.match(linear.tensor)
        if match and linear.block is not None:
            stems[match["stem"]] = stems.get(match["stem"], 0) + 1
    if not stems and (not spec.templates or any(map(_NUMBERED.match, tensors))):
        raise Unavailable(_("no tensor name has the number of a decoder layer with linears"))
    found = Placement(spec, max(stems, key=lambda stem: stems[stem], default=""), words=words)
    if not stems:  # a family that is known, and not one of its blocks: its names are what must stand here
        found.stem = found.family_stem
    for name, info in tensors.items():
        match = _NUMBERED.match(name)
        if match and match["stem"] == found.stem:
            found.blocks.setdefault(int(match["block"]), {})[match["tail"]] = info
        elif NOT_TEXT.search(name):
            found.foreign[name] = info
        else:
            found.outside[name] = info
    return found
