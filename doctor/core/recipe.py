"""The recipe that findings are judged against and that the quantizer follows: method, bits, groups, where it will run.

A recipe moves one way: a retry may raise damping or fall to a simpler method, never back, so every retry loop ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.methods import BITS, METHODS, STATIC, Method
from doctor.core.named_schemes import NamedFields, named
from doctor.core.near import nearest
from doctor.core.tables import table
from doctor.core.widths import split_width, width_of, widths_from

GOALS = ("", "quantize", "serve", "none")  # what findings are judged for
RUNTIMES = ("vllm", "sglang", "exllamav2", "transformers", "llama.cpp")
DAMP, DAMP_MAX = 0.01, 0.4  # defaults: GPTQ's own share, and where few rows and retries end
# A Hessian of few calibration rows overfits them; more damping holds it back. The best share is in proportion to
# 1 / rows, whatever the width (bench/RESULTS.md, damping.py): 0.4 at 512 rows, as many experts get, 0.1 at 2,048, 0.05
# at 4,096, 0.01 from 20,000 on.
DAMP_ROWS = 200
ASKED = "asked for with keep"  # why a linear stays in 16 bits that recipe.keep names
_FALL = (*METHODS, "keep")


class Scheme(NamedTuple):
    """How the weights of one linear are stored, whatever the format.

    group_size: consecutive in_features that share a scale; -1 is the whole row. tile: (rows, columns) that share a
    scale where it is not one row's group; () where the scales' own shape says it. inputs: a scale of the linear's
    inputs is stored too. wide: percent of the columns that have the format's next width.
    """

    bits: int
    group_size: int = -1
    sym: bool = True
    tile: tuple[int, ...] = ()
    inputs: bool = False
    wide: int = 0


class OutputFormat(Protocol):
    """What a recipe asks the format that it names (doctor/formats)."""

    name: str
    label: str
    bits: tuple[int, ...]
    wide: tuple[int, ...]
    own_widths: bool
    groups: tuple[int, ...]
    methods: tuple[str, ...]
    activations: tuple[str, ...]
    kv_caches: tuple[str, ...]
    smooths: bool
    groups_of_modules: bool

    def zeros_are_free(self, bits: int) -> bool: ...

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str: ...


class OutputFormats(Mapping[str, OutputFormat]):
    """The formats that a recipe may name. doctor.formats puts them here; it is imported, by name, when one is first
    asked for, so that `doctor --help` does not wait for it."""

    def __init__(self) -> None:
        self._known: dict[str, OutputFormat] = {}

    def add(self, form: OutputFormat) -> None:
        self._known[form.name] = form

    def remove(self, name: str) -> None:
        self._known.pop(name, None)

    def _all(self) -> dict[str, OutputFormat]:
        import_module("doctor.formats")
        return self._known

    def __getitem__(self, name: str) -> OutputFormat:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


FORMATS = OutputFormats()


@dataclass(frozen=True)
class Recipe:
    """One way to quantize and serve. damp: the least share of mean diag(H) that is added. keep:
    patterns of linears left in 16 bits.

    group_size: consecutive in_features that share a scale; -1 is the whole row. tp: GPUs that split each linear at
    serving. act_order: columns in order of diag(H) with groups fixed beforehand (static groups), so that serving costs
    nothing. goal: "quantize" floats by this recipe, "serve" the files as they are, "none" for the files alone; "" is
    serve for what is quantized already, and quantize for the rest.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool | None = None  # None: asymmetric where zero points cost nothing (awq; gptq below 4 bits), else symmetric
    act_order: bool = True
    mse: bool = True
    damp: float = DAMP
    damp_max: float = DAMP_MAX
    format: str = ""  # "" takes the method's own: gptq for gptq and rtn, awq for awq
    tp: int = 1
    runtime: str = ""
    runtime_version: str = ""
    gpu: str = ""  # the graphics card that it will be served on, a name of rules/tables/gpus.toml
    keep: tuple[str, ...] = ()
    bits_for: tuple[str, ...] = ()  # PATTERN=BITS: linears of another width; the last that matches counts
    schemes_for: tuple[str, ...] = ()  # PATTERN=SCHEME: linears stored by another named scheme, likewise
    seed: int = 0
    goal: str = ""
    kv_cache: str = ""  # how engines store keys and values: fp8, fp8-head (scales of each head); "" is not said
    vision: bool = False  # whether the linears of a vision tower's layers are quantized too
    activations: str = ""  # how engines round each linear's inputs while serving; "" is the format's own way
    wide: int = 0  # percent of the columns that have the next width, as Scheme says

    def damp_for(self, rows: int) -> float:
        """The share that is added to a Hessian of so many calibration rows first: damp, more where rows are few; none
        where damp is 0.
        """
        return self.damp and max(self.damp, min(DAMP_ROWS / max(rows, 1), self.damp_max))

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _illegal(_("method {value!r}", value=self.method), _("one of {names}", names=", ".join(METHODS)))
        if self.sym is None:
            form = FORMATS.get(self.output_format)
            free = form is not None and form.zeros_are_free(self.bits)
            object.__setattr__(self, "sym", METHODS[self.method].sym and not free)
        if not (self.group_size == -1 or self.group_size > 0):
            raise _illegal(_("group size {value}", value=self.group_size), _("positive, or -1 for whole rows"))
        if not self.tp >= 1:
            raise _illegal(_("tensor parallel {value}", value=self.tp), _("1 or more"))
        if not 0 <= self.damp <= self.damp_max <= 1:
            what = _("damp {damp} to {most}", damp=self.damp, most=self.damp_max)
            raise _illegal(what, _("0 <= damp <= damp_max <= 1"))
        if self.format not in ("", *FORMATS):
            raise _illegal(_("format {value!r}", value=self.format), _("one of {names}", names=", ".join(FORMATS)))
        if self.goal not in GOALS:
            raise _illegal(_("goal {value!r}", value=self.goal), _("one of {names}", names=", ".join(GOALS[1:])))
        if self.runtime not in ("", *RUNTIMES):
            raise _illegal(
                _("runtime {value!r}", value=self.runtime),
                _("one of {names}", names=", ".join(RUNTIMES)),
                nearest(self.runtime, RUNTIMES),
            )
        if self.gpu and self.gpu not in table("gpus"):
            raise _illegal(
                _("gpu {value!r}", value=self.gpu),
                _("one of {names}", names=", ".join(table("gpus"))),
                nearest(self.gpu.lower(), table("gpus")),
            )
        self._require_widths()
        self._require_format()
        self._require_schemes()

    def _require_schemes(self) -> None:
        """DoctorError where a scheme of single linears is not known, or cannot stand in one file with the recipe's."""
        for text in self.schemes_for:
            pattern, _sign, name = text.rpartition("=")
            row = named(name)
            if not pattern or row is None:
                raise _illegal(_("scheme for {text!r}", text=text), _("PATTERN=SCHEME with a scheme that is known"))
            forms = [FORMATS[self.output_format], FORMATS[str(row.fields["format"])]]
            if not all(form.groups_of_modules for form in forms):
                raise _illegal(
                    _(
                        "scheme {name} for {pattern} in the {format} format",
                        name=name,
                        pattern=pattern,
                        format=forms[0].name,
                    ),
                    _("left out: compressed-tensors alone holds several schemes in one file, its own"),
                )
            if self.folds_scales:
                raise _illegal(
                    _("scheme {name} for {pattern} with {method}", name=name, pattern=pattern, method=self.method),
                    _("left out: factors are folded for all linears, so all are stored alike"),
                )
            replace(self, bits_for=(), schemes_for=(), **self._fields_of(row))

    def _fields_of(self, row: NamedFields) -> dict[str, Any]:
        """Fields of the recipe of linears that a named scheme stores, by this method where the scheme has it."""
        method = self.method if self.method in row.methods else row.methods[0]
        return {"activations": "", "sym": True, **row.usual, **row.fields, "method": method}

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What holds for most linears, and for those of each other scheme."""
        rows = [row for text in self.schemes_for if (row := named(text.rpartition("=")[2])) is not None]
        plain = replace(self, schemes_for=()) if rows else self
        return (plain, *(replace(plain, bits_for=(), **self._fields_of(row)) for row in rows))

    def _require_format(self) -> None:
        """DoctorError where the format has no such groups or activations, or is not for this method."""
        form = FORMATS[self.output_format]
        if form.groups and self.group_size not in form.groups:
            raise _illegal(
                _("group size {value} in the {format} format", value=self.group_size, format=form.name),
                _("one of {names}", names=", ".join(map(str, form.groups))),
            )
        if form.methods and self.method not in form.methods:
            raise _illegal(
                _("method {method} in the {format} format", method=self.method, format=form.name),
                _("one of {names}", names=", ".join(form.methods)),
            )
        if self.activations and self.activations not in form.activations:
            raise _illegal(
                _("activations {value!r} in the {format} format", value=self.activations, format=form.name),
                _("one of {names}", names=", ".join(form.activations))
                if form.activations
                else _("left out: its readers compute with 16-bit activations"),
            )
        if self.kv_cache and self.kv_cache not in form.kv_caches:
            raise _illegal(
                _("KV cache {value!r} in the {format} format", value=self.kv_cache, format=form.name),
                _("one of {names}", names=", ".join(form.kv_caches))
                if form.kv_caches
                else _("left out: compressed-tensors holds its scales"),
            )
        if form.groups and not self.sym:
            raise _illegal(_("an asymmetric grid in the {format} format", format=form.name), _("symmetric"))

    def _require_widths(self) -> None:
        """DoctorError where method or format have no such bits, or none of their own for single linears."""
        form, method = FORMATS[self.output_format], METHODS[self.method]
        if self.bits not in (*BITS, *form.bits):
            raise _illegal(_("bits {value}", value=self.bits), _("2, 3, 4 or 8"))
        for holder in (method, form):
            if holder.bits and self.bits not in holder.bits:
                raise _illegal(
                    _("{name} with {bits} bits", name=holder.name, bits=self.bits),
                    _(
                        "{widths}: the {label} format has no other width",
                        widths=_either(holder.bits),
                        label=holder.label,
                    ),
                )
            if self.bits_for and not holder.own_widths:
                raise _illegal(
                    _(
                        "bits for {patterns} with {method} in the {format} format",
                        patterns=", ".join(self.bits_for),
                        method=self.method,
                        format=self.output_format,
                    ),
                    _("left out: {label} has one width for all linears", label=holder.label),
                )
        legal = widths_from(form.bits, form.wide)
        if self.wide and self.width not in legal:
            raise _illegal(_("bits {value}", value=self.width), _either(legal))
        for text in self.bits_for:
            pattern, _sign, bits = text.rpartition("=")
            if not pattern or bits not in map(str, legal):
                raise _illegal(
                    _("bits for {text!r}", text=text), _("PATTERN=BITS with {widths} bits", widths=_either(legal))
                )

    @property
    def output_format(self) -> str:
        """The name of the format that is written."""
        return self.format or METHODS[self.method].format

    @property
    def scheme(self) -> Scheme:
        """How most linears are stored; `for_linear(name).scheme` is one linear's own."""
        return Scheme(self.bits, self.group_size, bool(self.sym), (), self.activations in STATIC, self.wide)

    @property
    def width(self) -> float:
        """bits, and wide as hundredths: 4.1 are 4 bits with a tenth of the columns in the next width."""
        return width_of(self.bits, self.wide)

    def of_width(self, width: float) -> Recipe:
        """This recipe with one width for all linears."""
        return replace(self, bits_for=(), **split_width(width))

    @property
    def calibrated(self) -> bool:
        """Whether calibration rows are run: for the codes, or for scales of activations or the cache alone."""
        return any(x.solver.calibrated or x.activations in STATIC or bool(x.kv_cache) for x in self.recipes)

    @property
    def folds_scales(self) -> bool:
        """Whether factors of input channels are folded into the modules before: AWQ's, or SmoothQuant's where
        activations are rounded to integers and calibration says how large they are.
        """
        smooths = FORMATS[self.output_format].smooths and self.solver.calibrated
        return self.solver.folds_scales or smooths

    @property
    def solver(self) -> Method:
        """What the method needs."""
        return METHODS[self.method]

    def for_linear(self, name: str) -> Recipe:
        """The recipe of this linear: of its own scheme or width where schemes_for or bits_for names it."""
        if not (self.bits_for or self.schemes_for):
            return self
        row = named(self.scheme_for(name))
        own = self._fields_of(row) if row is not None else split_width(float(_last(self.bits_for, name) or self.width))
        return replace(self, bits_for=(), schemes_for=(), **own)

    def scheme_for(self, name: str) -> str:
        """The named scheme that this linear alone has, "" where it has the common one."""
        return _last(self.schemes_for, name)

    @property
    def name(self) -> str:
        """The first word of the label: its format where one is named (a file in compressed-tensors does not say who
        rounded it), else the method.
        """
        return self.format or self.method

    def label(self) -> str:
        """`gptq 4-bit g128 tp8`: the recipe as people write it."""
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        return " ".join([self.name, f"{self.width}-bit", group, *([f"tp{self.tp}"] if self.tp > 1 else [])])

    def with_field(self, name: str, value: Any) -> Recipe:
        """This recipe with one field changed by a fix. Raises DoctorError on a step back (less damping, a finer
        method).
        """
        if name not in {f.name for f in fields(self)}:
            raise _illegal(_("recipe field {name!r}", name=name), _("a field of the recipe"))
        old = getattr(self, name)
        step = _("{name} from {old} to {new}", name=name, old=old, new=value)
        if name in ("damp", "damp_max") and not value >= old:
            raise _illegal(step, _("raised, never lowered"))
        if name == "method" and not _FALL.index(value) >= _FALL.index(old):
            raise _illegal(step, _("a simpler one"))
        return replace(self, **{name: value})


def _last(named: tuple[str, ...], name: str) -> str:
    """The value of the last PATTERN=VALUE that matches, "" where none does."""
    pairs = (text.rpartition("=") for text in reversed(named))
    return next((value for pattern, _sign, value in pairs if matches(pattern, name)), "")


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern, {a,b} being one of a and b, is this name or a part of it."""
    choice = re.search(r"\{([^{}]*)\}", pattern)
    if choice:
        before, after = pattern[: choice.start()], pattern[choice.end() :]
        return any(matches(before + word + after, name) for word in choice[1].split(","))
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*{pattern}*")


def is_kept(recipe: Recipe, name: str) -> bool:
    """Whether recipe.keep leaves this linear in 16 bits: a shell pattern, or a part of its name."""
    return any(matches(pattern, name) for pattern in recipe.keep)


def unfit(recipe: Recipe, in_features: int, out_features: int) -> str:
    """Why a linear of this size cannot be packed as the recipe says, "" where it can."""
    return FORMATS[recipe.output_format].unfit(recipe.scheme, in_features, out_features)


def _illegal(what: str, must: str, hint: str = "") -> DoctorError:
    return DoctorError(_("recipe: {what}; must be {must}.", what=what, must=must), hint)


def _either(numbers: tuple[float, ...]) -> str:
    """2, 3, 4 or 8"""
    *first, last = map(str, numbers)
    return _("{first} or {last}", first=", ".join(first), last=last) if first else last


def parse_runtime(text: str) -> tuple[str, str]:
    """`vllm==0.6.0` -> ("vllm", "0.6.0"); without a version, or with "latest", the newest known one is meant.

    Raises DoctorError for a version that begins with no number.
    """
    name, _sign, version = (part.strip() for part in text.partition("=="))
    if version.lower() == "latest":
        version = ""
    if version and not re.match(r"v?\d", version):
        raise _illegal(
            _("version {version!r} of {runtime}", version=version, runtime=name),
            _("a number such as 0.9.1, or latest"),
        )
    return name.lower(), version
