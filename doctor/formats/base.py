"""What a weight format is to the rest of the program: one class, one file, and all others ask its object.

A format says which tensors stand for a linear, how codes become their words and back, what quantization_config says
and how one is read, what fits and how many bytes it takes. check, fix, quantize, verify, the memory forecast and the
rules name no format; they hold one of these objects. A new format is one file of this package, named in __init__ and
held by registry.py.

Where arrays come in, a format serves NumPy and torch by the same text (arrays.py). `n` is out_features, `k`
in_features; a weight is [n, k].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array
from doctor.formats.bits import repeated_word
from doctor.formats.exclusions import Exclusion
from doctor.formats.grid import Grid, GridKind
from doctor.formats.input_rounding import InputsOf
from doctor.formats.refusals import Refused
from doctor.formats.wanted import Sizes, Wanted
from doctor.formats.widths import Widths

BLOCK = 32  # doctor writes whole blocks of 32 codes: they fill whole words at every width
Parts = Mapping[str, Array]  # the last part of a tensor's name -> its values; 8-bit floats in NumPy as float32
Shapes = Mapping[str, tuple[int, ...]]
Texts = Mapping[str, bytes]  # name of a small tensor -> its bytes


class Part(NamedTuple):
    """One tensor of a packed linear: the last part of its name, its element type and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8


class Format:
    """A way to store quantized linears. Subclasses say what differs; `registry.register` makes one known."""

    name: str  # what recipes, the tables of kernels and messages call it
    label: str  # as people write it
    quant_methods: tuple[str, ...] = ()  # spellings of quantization_config's quant_method
    container = "safetensors"
    in_blocks = False  # whether a linear is rows of llama.cpp's blocks, in one file with everything else
    mixtures: Mapping[int, str] = {}  # bits -> what readers call a file of them, for formats of the GGUF container
    config_files: tuple[str, ...] = ()  # further files that hold a copy of quantization_config
    agreed: tuple[str, ...] = ()  # keys that every copy of quantization_config must state alike

    # Tensors of a linear, by the last part of their names. `words` holds the codes; "" where there is no such tensor.
    words = ""
    scales = ""
    zeros = ""
    index = ""  # the group of each column
    part_names: tuple[str, ...] = ()  # all of them, optional ones too
    needed: tuple[str, ...] = ()  # beside the words, what no reader can do without
    beside: tuple[str, ...] = ()  # what stands beside a weight under its own name, and goes with its packing
    sampled: tuple[str, ...] = ()  # int32 parts whose values `check` looks at
    verbatim: tuple[str, ...] = ()  # small parts whose bytes `check` keeps

    # What a recipe may ask for.
    writes = True  # False: such files are read, not made
    bits: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()  # percent of a linear's columns that may have the next width
    groups: tuple[int, ...] = ()  # legal group sizes, the usual one first; () for any
    methods: tuple[str, ...] = ()  # that can choose its codes; () for any
    activations: tuple[str, ...] = ()  # how its readers may round a linear's inputs
    kv_caches: tuple[str, ...] = ()  # key and value caches whose scales it holds
    rows_apart = False  # whether each row's words and scales are made from that row, or its tile, alone
    smooths = False  # whether its readers round activations to integers: then SmoothQuant helps
    own_widths = True  # whether single linears may have other bits than the rest
    widths_key = ""  # where their bits stand, if under a key that only some readers know
    padded = (1, 1)  # stored out_features and in_features are rounded up to multiples of these
    unit = (1, 1)  # in_features and out_features must be multiples of these for the format's own sake
    joint: tuple[str, ...] = ("bits", "group_size", "sym")  # what linears that an engine fuses must share
    zero_offset = 0  # what is taken from a zero point before it is stored
    twin = ""  # the format that differs in nothing but zero_offset
    client = "transformers"  # who is asked to load an output; "" where no client of a processor reads the format
    whole_names: tuple[str, ...] = ()  # runtimes that take an entry of the exclude list for a name in full
    packs_heads: tuple[str, ...] = ()  # runtimes whose reader of this format packs a head that no entry excludes
    at_load = False  # quantization_config asks a loader to quantize plain weights
    plain_backend = ""  # gptqmodel's backend in plain torch: its fast ones are compiled for minutes on first use
    libraries: tuple[str, ...] = ()  # beside torch, that transformers loads it with
    stores_zeros = False  # zero points lie in every file and every kernel reads them, so an asymmetric grid is free
    signed_below = 0  # symmetric grids of fewer bits have scales of both signs: readers multiply by them as they are
    affine = False  # codes() gives integer codes and their grid, which another such format may hold unchanged
    groups_of_modules = False  # quantization_config describes weights and activations group by group (config_groups)
    separates_gate_and_up = False  # readers want interleaved gate_up experts as two linears, gate first

    @property
    def scale_names(self) -> tuple[str, ...]:
        """Parts that may hold the scales."""
        return (self.scales,) if self.scales else ()

    # sizes

    def grid(self, scheme: Scheme) -> GridKind:
        """The values that a weight may take, and what a scale is stored in."""
        return GridKind(scheme.bits, scheme.group_size, scheme.sym, signed=self.signs(scheme))

    def zeros_are_free(self, bits: int) -> bool:
        """Whether an asymmetric grid of so many bits takes no more room, and no slower kernel where it is served."""
        return self.stores_zeros

    def signs(self, scheme: Scheme) -> bool:
        """Whether a group may have a negative scale: where it gains, and where readers were seen to take it."""
        return self.signed_below > scheme.bits and scheme.sym

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        """Why a linear of this size cannot be packed so, "" where it can."""
        width = in_features if scheme.group_size == -1 else scheme.group_size
        if in_features % width:
            return _("in_features {size} is not a multiple of group_size {group}", size=in_features, group=width)
        if in_features % BLOCK or out_features % BLOCK:
            return _(
                "[{rows}, {columns}]: packing needs multiples of {unit}",
                rows=out_features,
                columns=in_features,
                unit=BLOCK,
            )
        return ""

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        """The tensors that pack() makes of a linear of this size."""
        raise NotImplementedError

    def bytes(self, in_features: int, out_features: int, scheme: Scheme) -> int:
        """Bytes of those tensors."""
        return sum(part.nbytes for part in self.parts(in_features, out_features, scheme))

    def size(self, words: tuple[int, ...], bits: int, version: str = "") -> tuple[int, int]:
        """(in_features, out_features) of a linear, from the shape of its words."""
        raise NotImplementedError

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, ...]:
        """[n, k] of a stored linear. load(part) gives a part's values, where shapes do not say it."""
        width, height = self.size(shapes[self.words], bits)
        return height, width

    def inputs_of(self, raw: Mapping[str, Any]) -> InputsOf | None:
        """How its readers round inputs of linears while they serve; None where they do not, or it is not known."""
        return None

    def scale_shape(self, in_features: int, out_features: int, group: int) -> tuple[int, int]:
        """The shape of the scales of a linear in groups of `group` columns."""
        return -(-in_features // group), out_features

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        """How a narrow weight under its own name is stored, for formats that keep scales beside it; None where it is
        none of theirs. raw: the quantization_config, where there is one.
        """
        return None

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, ...] | None:
        """[n, k] of such a weight; None where it is not known. texts: the bytes of `verbatim` parts, by name."""
        return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else None

    def incomplete(
        self,
        info: TensorInfo,
        tensors: Mapping[str, TensorInfo],
        shape_of: Callable[[str], tuple[int, ...] | None],
    ) -> tuple[list[str], list[tuple[str, list[int], list[int]]]]:
        """(parts that such a weight needs and has not, (part, its shape, the shape that the codes ask for) of others).
        shape_of: a linear's [n, k] by config.json, None where it does not say.
        """
        return [], []

    def weight_name(self, codes: str) -> str:
        """The weight that a tensor of codes beside its scales stands for: its own name in most formats."""
        return codes

    def part_of(self, weight: str, part: str) -> str:
        """The name of a part of a weight."""
        return f"{weight.removesuffix('.weight')}.{part}"

    def bias(self, values: Array) -> Array:
        """The bias of a packed linear as readers take it; values [n] as stored."""
        return values

    # codes and words

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        """Tensors by the last part of their names, of codes u8[n, k]. Raises NotQuantizable for what cannot be
        stored.
        """
        raise NotImplementedError

    def codes(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> tuple[Array, Grid, Array]:
        """(codes u8[n, k], grid, g_idx i32[k]) of a linear, or of those rows of it, where the format is `affine`."""
        raise NotImplementedError

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        """W f32[n, k] that an engine computes with, or those rows of it. Raises BadCheckpoint where parts do not fit.

        shape: [n, k], for formats whose parts do not say it.
        """
        raise NotImplementedError

    def input_parts(self, recipe: Recipe, absmax: float) -> dict[str, Array]:
        """Torch tensors of the scales of a linear's inputs, whose largest |x| is absmax; {} where none is measured."""
        return {}

    def zero_word(self, bits: int) -> int | None:
        """The unsigned word of zero points that a symmetric file holds everywhere; None where there is no such word."""
        return None

    def middle_word(self, bits: int) -> int | None:
        """The unsigned word of codes that a symmetric grid gives the weight 0; None where codes cross words."""
        return repeated_word(2 ** (bits - 1), bits) if 32 % bits == 0 else None

    def code_word(self, zeros: int, bits: int) -> int | None:
        """The unsigned word of codes whose weights are 0 under this word of zero points; None where it has other
        fields than codes have.
        """
        fields = {(zeros >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)}
        zero = fields.pop() + self.zero_offset
        return repeated_word(zero, bits) if not fields and 32 % bits == 0 and zero < 1 << bits else None

    # quantization_config

    def packs(self, raw: Mapping[str, Any]) -> bool:
        """Whether a quantization_config of this format says that the files hold packed weights."""
        return not self.at_load

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """quantization_config for what a recipe made. kept: linears inside decoder layers that stay in 16 bits. widths:
        bits of the linears that have others than recipe.bits.
        """
        raise NotImplementedError

    def naming_packed(self, stated: dict[str, Any], packed: Iterable[str], plain: Iterable[str]) -> dict[str, Any]:
        """The same quantization_config, which also names the packed linears where a reader of the format asks for
        them. plain: linears in 16 bits, under every name that a client has for them.
        """
        return stated

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is this format's to read."""
        return raw.get("quant_method") in self.quant_methods

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        """What a quantization_config says. own: with the widths of single linears; else what holds for the rest.

        Raises Unavailable where it does not say what is needed, or weights do not lie in groups of columns.
        """
        method = str(raw.get("quant_method", "unknown"))
        raise Unavailable(_("quantization by {method} has no packed groups of columns", method=method))

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """What a quantization_config leaves in floats, entry by entry, as this format's readers match names."""
        return []

    plain_key = ""  # the list from which readers that know no other tell packed linears from plain ones

    def listed_as_plain(self, raw: Mapping[str, Any], module: str) -> bool:
        """Whether that list tells a module in 16 bits from packed ones."""
        return True

    def with_plain(self, raw: Mapping[str, Any], packed: Iterable[str], plain: Iterable[str]) -> Any:
        """That list for these packed and plain linears."""
        return raw.get(self.plain_key)

    def headers_tell(self, raw: Mapping[str, Any]) -> bool:
        """Whether vLLM tells them apart by the headers of the files."""
        return True

    def targets(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """What a quantization_config names as quantized, or of other bits than the rest, entry by entry."""
        return []

    def excluded(self, raw: Mapping[str, Any]) -> Callable[[str], bool]:
        """Whether a quantization_config leaves a module, by its name, in floats."""
        entries = self.exclusions(raw)
        return lambda module: any(entry.matches(module) for entry in entries)

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """Whether readers that go by quantization_config alone expect a module's weight in codes; None where they go by
        what the files hold.
        """
        return None

    def stored_bits(self, raw: Mapping[str, Any]) -> int | None:
        """Bits of the weights under their own names that a quantization_config of this format promises; None where it
        does not say.
        """
        return None

    def stated_name(self, raw: Mapping[str, Any]) -> str:
        """What a quantization_config calls itself."""
        return str(raw.get("quant_method", self.label))

    def needed_beside(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """Parts beside a weight under its own name that no reader can do without."""
        return ()

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        """The parts that readers of a quantization_config make room for in a linear, by its name and its sizes, None
        where config.json does not say them; [] where that is not known.
        """
        return lambda module, sizes: []

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        """Values of a quantization_config at which a reader stops before it looks at any tensor."""
        return ()

    def names_of_kept(self, module: str) -> list[str]:
        """Under which names engines look for a module of experts that stays in 16 bits."""
        return [module]

    def version_key(self, raw: Mapping[str, Any]) -> str:
        """The key of a quantization_config that tells this format from its twin."""
        return ""

    def restated(self, raw: Mapping[str, Any], form: Format) -> dict[str, Any]:
        """A quantization_config of this reader that names the twin `form` instead."""
        return {**raw, self.version_key(raw): self.spelled(form)}

    def spelled(self, form: Format) -> str:
        """What stands under version_key for a format."""
        return form.name

    head_key = ""  # the key that must be true where the output head is packed
    order_key = ""  # the key that says whether groups are scattered over columns

    def shown(self, shapes: Mapping[str, Shapes], words: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """quantization_config as tensors show it, by module; None where they leave anything open.

        words: part -> statistics of its int32 values (doctor.scan.packed_words), where they were read.
        """
        return None


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its own quantization, in one spelling. It stands at `pointer` of `file`.

    format: how the tensors lie. reader: whose block it is, which differs where a program has keys of its own. scheme
    holds for most linears; `bits_of` gives a linear's own bits. desc_act: groups are scattered over columns.
    """

    format: Format
    reader: Format
    scheme: Scheme
    desc_act: bool
    version: str  # gptq or gptq_v2; gemm, gemv …; pack-quantized …
    raw: dict[str, Any]
    file: str
    pointer: str
    widths: Widths = field(default_factory=Widths)
    readable: bool = True  # whether unpack() reads this version
    also_needed: tuple[str, ...] = ()  # parts that this block makes necessary, beside those of the format

    @property
    def bits(self) -> int:
        return self.scheme.bits

    @property
    def group_size(self) -> int:
        return self.scheme.group_size

    @property
    def sym(self) -> bool:
        return self.scheme.sym

    def bits_of(self, module: str) -> int:
        """Bits of a linear."""
        return self.widths.of(module, self.bits)

    def scheme_of(self, module: str) -> Scheme:
        """How a linear is stored."""
        return self.scheme._replace(bits=self.bits_of(module))

    @property
    def needed(self) -> tuple[str, ...]:
        """The parts beside the words that a linear cannot be read without."""
        ordered = (self.format.index,) if self.desc_act and self.format.order_key else ()
        return (*self.format.needed, *self.also_needed, *ordered)
