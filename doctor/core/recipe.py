"""The plan that findings are judged against and that the quantizer follows: method, bits, groups, where it will run.

A recipe moves one way: a retry may raise damping or fall to a simpler method, never back, so every retry loop ends.
"""

import re
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from doctor.core.errors import DoctorError

METHODS = ("gptq", "awq", "rtn")
FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
RUNTIMES = ("vllm", "sglang", "exllamav2", "transformers", "llama.cpp")
BITS = (2, 3, 4, 8)
DAMP, DAMP_MAX = 0.01, 0.1  # defaults: GPTQ's own share, and where a retry ends
ASKED = "asked for with keep"  # why a linear stays in 16 bits that recipe.keep names
_FALL = ("gptq", "awq", "rtn", "keep")


@dataclass(frozen=True)
class Recipe:
    """One way to quantize and serve. `damp` is a share of mean diag(H); `keep` are patterns of linears left in 16 bits.

    group_size: consecutive in_features that share a scale; -1 is the whole row. tp: GPUs that split each linear at
    serving. act_order: columns in order of diag(H) with groups fixed beforehand (static groups), so that serving costs
    nothing.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool | None = None  # None takes the method's own: asymmetric for awq, whose kernels expect zero points
    act_order: bool = True
    mse: bool = True
    damp: float = DAMP
    damp_max: float = DAMP_MAX
    format: str = ""  # "" takes the method's own: gptq for gptq and rtn, awq for awq
    tp: int = 1
    runtime: str = ""
    runtime_version: str = ""
    keep: tuple[str, ...] = ()
    bits_for: tuple[str, ...] = ()  # PATTERN=BITS: linears of another width; the last that matches counts
    seed: int = 0

    def __post_init__(self):
        _require(self.method in METHODS, f"method {self.method!r}", f"one of {', '.join(METHODS)}")
        if self.sym is None:
            object.__setattr__(self, "sym", self.method != "awq")
        _require(self.bits in BITS, f"bits {self.bits}", "2, 3, 4 or 8")
        _require(
            self.group_size == -1 or self.group_size > 0,
            f"group size {self.group_size}",
            "positive, or -1 for whole rows",
        )
        _require(self.tp >= 1, f"tensor parallel {self.tp}", "1 or more")
        _require(
            0 <= self.damp <= self.damp_max <= 1, f"damp {self.damp} to {self.damp_max}", "0 <= damp <= damp_max <= 1"
        )
        _require(self.format in ("", *FORMATS), f"format {self.format!r}", f"one of {', '.join(FORMATS)}")
        _require(self.runtime in ("", *RUNTIMES), f"runtime {self.runtime!r}", f"one of {', '.join(RUNTIMES)}")
        _require(
            "awq" not in (self.method, self.format) or self.bits == 4,
            f"awq with {self.bits} bits",
            "4: the AWQ format has no other width",
        )
        for text in self.bits_for:
            pattern, _, bits = text.rpartition("=")
            _require(
                bool(pattern) and bits in map(str, BITS), f"bits for {text!r}", "PATTERN=BITS with 2, 3, 4 or 8 bits"
            )
        one_width = self.bits_for and (self.method == "awq" or self.output_format == "awq")
        _require(
            not one_width,
            f"bits for {', '.join(self.bits_for)} with {self.method} in the {self.output_format} format",
            "gptq or rtn in a GPTQ or compressed-tensors format: AWQ has one width for all linears",
        )

    @property
    def output_format(self) -> str:
        return self.format or ("awq" if self.method == "awq" else "gptq")

    def for_linear(self, name: str) -> "Recipe":
        """The recipe of this linear: of its own width where bits_for names it."""
        bits = next(
            (int(b) for p, _, b in (x.rpartition("=") for x in reversed(self.bits_for)) if matches(p, name)), self.bits
        )
        return self if not self.bits_for else replace(self, bits=bits, bits_for=())

    @property
    def name(self) -> str:
        """The first word of the plan: its format where one is named (a file in compressed-tensors does not say who
        rounded it), else the method.
        """
        return self.format or self.method

    def label(self) -> str:
        """`gptq 4-bit g128 tp8`: the plan as people write it."""
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        return " ".join([self.name, f"{self.bits}-bit", group, *([f"tp{self.tp}"] if self.tp > 1 else [])])

    def with_field(self, name: str, value: object) -> "Recipe":
        """This recipe with one field changed by a fix. Raises DoctorError on a step back (less damping, a finer
        method).
        """
        _require(name in {f.name for f in fields(self)}, f"recipe field {name!r}", "a field of the recipe")
        old = getattr(self, name)
        if name in ("damp", "damp_max"):
            _require(value >= old, f"{name} from {old} to {value}", "raised, never lowered")
        if name == "method":
            _require(_FALL.index(value) >= _FALL.index(old), f"method from {old} to {value}", "a simpler one")
        return replace(self, **{name: value})


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
    width = in_features if recipe.group_size == -1 else recipe.group_size
    if in_features % width:
        return f"in_features {in_features} is not a multiple of group_size {width}"
    if in_features % 32 or out_features % 32:
        return f"[{out_features}, {in_features}]: packing needs multiples of 32"
    return ""


def _require(holds: bool, what: str, must: str) -> None:
    if not holds:
        raise DoctorError(f"recipe: {what}; must be {must}.")


def parse_runtime(text: str) -> tuple[str, str]:
    """`vllm==0.6.0` -> ("vllm", "0.6.0"); without a version the newest known one is meant."""
    name, _, version = text.partition("==")
    return name.strip().lower(), version.strip()
