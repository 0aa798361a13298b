"""How much a KV cache takes, layer by layer, from config.json alone.

A layer with full attention keeps keys and values of every token; one with a sliding window those of the last tokens;
latent attention (MLA) one compressed vector a token for all heads; linear attention, state-space and convolution layers
a state of constant size; layers that reuse another's cache nothing. Which layer is which is read as transformers reads
it where it knows the model_type, since half of the families state it only in their class's defaults; else from the keys
that are written.

bytes per token = Σ over layers of (key values × key bits + value values × value bits) / 8, bits with their scales.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.model.spec import ModelSpec

KIB, GIB = 1 << 10, 1 << 30
SCALE_BITS = 0.5  # one float16 scale for 32 values
MOST_LAYERS = 10_000  # the deepest models have some 130; more is a slip of the keyboard, and would be listed one by one
_WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding", "local", "sliding"}
_STATE = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "linear"}
_BOTH = {"hybrid", "hybrid_sliding"}
_NOTHING = {"dummy", "moe", "mlp"}
_INDEXED = "indexed_attention"  # full attention beside one more key a token, by which a few tokens are chosen
_FULL = {"full_attention", "attention", "full", "global", "hybrid", _INDEXED}
_ASK_CHECK = "Run `doctor check`: rules C14x say which key is missing."


@dataclass(frozen=True)
class Scheme:
    """Bits per cached key and value, scales included, and what engines call it; "" where an engine has no such
    cache.
    """

    name: str
    key_bits: float
    value_bits: float
    exllama: str = ""
    vllm: str = ""
    llama_cpp: str = ""


# llama.cpp counts a float16 scale for 32 values into its types' names: q8_0 is 8.5 bits, q4_0 4.5 (ggml-org/llama.cpp
# ggml-quants).
SCHEMES = (
    Scheme("FP16", 16, 16, "FP16", "auto", "f16"),
    Scheme("FP8", 8, 8, "FP8", "fp8_e5m2, fp8_e4m3"),
    Scheme("Q8", 8.5, 8.5, "Q8", "", "K q8_0, V q8_0"),
    Scheme("Q6", 8.5, 4.5, "Q6", "", "K q8_0, V q4_0"),
    Scheme("Q4", 4.5, 4.5, "Q4", "", "K q4_0, V q4_0"),
)
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def custom(key_bits: int, value_bits: int) -> Scheme:
    """A scheme with widths chosen apart, as ExLlamaV3 takes them. Raises DoctorError for widths that no engine has."""
    for side, bits in (("--k-bits", key_bits), ("--v-bits", value_bits)):
        if bits not in WIDTHS:
            raise DoctorError(f"{side} {bits}: must be 2 to 8, or 16.")
    stored = [b + SCALE_BITS if b < 16 else 16 for b in (key_bits, value_bits)]
    exllama = "" if 16 in (key_bits, value_bits) else f"-cq {key_bits},{value_bits} (V3)"
    return Scheme(f"K{key_bits} V{value_bits}", *stored, exllama)


@dataclass(frozen=True)
class Layer:
    """What one layer keeps. keys, values: numbers a token adds; window: tokens kept, None for all; state_bytes:
    whatever the length.
    """

    block: int
    kind: str  # full, sliding, latent, state, hybrid, none
    keys: int = 0
    values: int = 0
    window: int | None = None
    state_bytes: int = 0

    def bytes_per_token(self, scheme: Scheme) -> float:
        return (self.keys * scheme.key_bits + self.values * scheme.value_bits) / 8

    def tokens_kept(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


KEEPS = {
    "full": "{n} full: {keys} + {values} numbers a token",
    "latent": "{n} latent: {keys} numbers a token for all heads",
    "sliding": "{n} sliding: {keys} + {values} numbers a token, of the last {window} tokens",
    "hybrid": "{n} hybrid: {keys} + {values} numbers a token and a state of {state} KiB",
    "state": "{n} state: a state of {state} KiB at any length",
    "none": "{n} none: nothing of its own",
}


@dataclass(frozen=True)
class Layout:
    """The layers of a model, and what a reader should know about how they were found."""

    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    expanded: tuple[Layer, ...] = ()  # of latent attention: what an engine keeps that stores full heads instead

    def bytes_per_token(self, scheme: Scheme, position: int = 0) -> float:
        """Bytes that one more token of a sequence takes after `position` tokens."""
        return sum(x.bytes_per_token(scheme) for x in self.layers if x.window is None or x.window > position)

    def total_bytes(self, scheme: Scheme, context: int, batch: int = 1) -> float:
        """Bytes of `batch` sequences of `context` tokens."""
        return batch * sum(x.state_bytes + x.bytes_per_token(scheme) * x.tokens_kept(context) for x in self.layers)

    def largest_context(self, scheme: Scheme, room: float, batch: int = 1) -> int | None:
        """Most tokens per sequence whose cache fits `room` bytes; 0 where none does, None where length costs nothing
        more.
        """
        widest = max((x.window for x in self.layers if x.window is not None), default=0)
        growth = self.bytes_per_token(scheme, widest) * batch
        left = room - self.total_bytes(scheme, widest, batch)
        if left >= 0:
            return widest + int(left // growth) if growth else None
        low, high = 0, widest
        while low < high:  # the size grows with the length, so the last length that fits is found by halves
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total_bytes(scheme, middle, batch) <= room else (low, middle - 1)
        return low

    @property
    def windows(self) -> list[int]:
        return sorted({x.window for x in self.layers if x.window is not None})

    def describe(self) -> list[str]:
        """One line per kind of layer: how many, and what each keeps."""
        return [words.format(**values) for words, values in self.kinds()]

    def kinds(self) -> list[tuple[str, dict]]:
        """The same as (words, values), for renderings in another language."""
        counts = Counter((x.kind, x.keys, x.values, x.window, x.state_bytes) for x in self.layers)
        return [
            (
                KEEPS[kind],
                {"n": n, "keys": keys, "values": values, "window": f"{window or 0:,}", "state": f"{state / KIB:,.0f}"},
            )
            for (kind, keys, values, window, state), n in counts.items()
        ]


def read_layout(spec: ModelSpec) -> Layout:
    """Layout of a model from its config. Raises BadCheckpoint where the config does not give the sizes."""
    reader = _Reader(spec)
    types = reader.layer_types()
    layers = [reader.layer(i, kind) for i, kind in enumerate(types)]
    expanded = ()
    if reader.latent:
        expanded = tuple(reader.full_heads(x) if x.kind == "latent" else x for x in layers)
        reader.notes.append(
            "latent attention: engines that do not absorb its matrices keep full heads instead; figures for both"
        )
    return Layout(tuple(layers), tuple(dict.fromkeys(reader.notes)), expanded)


class _Reader:
    def __init__(self, spec: ModelSpec):
        self.spec, self.config = spec, spec.config
        self.notes: list[str] = []
        self.reference = self._library()
        self.count = self._of_class("num_hidden_layers") or spec.n_layers
        if not self.count:
            raise BadCheckpoint("config.json: the number of layers is not stated.", _ASK_CHECK)
        if not (isinstance(self.count, int) and 0 < self.count <= MOST_LAYERS):
            raise BadCheckpoint(
                f"config.json: {self.count!r} layers; must be a whole number from 1 to {MOST_LAYERS:,}.", _ASK_CHECK
            )
        self.latent = self._size("kv_lora_rank") is not None and self._size("qk_rope_head_dim") is not None
        self.heads, self.dim = self._kv_heads(), spec.head_dim or self._size("head_dim")

    def _library(self):
        """transformers' config object of this model, which fills in the class's defaults; None where it knows no such
        model_type.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if self.spec.model_type not in CONFIG_MAPPING:
            return None
        stated = {k: v for k, v in self.config.items() if k not in ("auto_map", "quantization_config")}
        try:
            return CONFIG_MAPPING[self.spec.model_type].from_dict(stated)
        except Exception as error:  # its validators raise whatever they like; the written keys are still there
            self.notes.append(
                f"transformers cannot read this config ({type(error).__name__}): layers are read from its keys alone"
            )
            return None

    def _size(self, *names: str) -> int | None:
        for source in (self.config.get, self._of_class):
            for name in names:
                value = source(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def _of_class(self, name: str) -> object:
        """A value of transformers' config; None where it has none, or where it would be another for each layer."""
        try:
            return getattr(self.reference, name, None)
        except (
            RuntimeError,
            ValueError,
        ):  # ambiguous over the layers, or worked out from keys that contradict each other
            return None

    def _kv_heads(self) -> int | None:
        nested = self.config.get("attn_config")
        if isinstance(nested, dict) and isinstance(nested.get("kv_n_heads"), int):
            return nested["kv_n_heads"]
        if self.config.get("multi_query") and not self.config.get("new_decoder_architecture"):
            return 1
        if self.config.get("multi_query_attention") is False:
            return self.spec.n_heads
        return self.spec.n_kv_heads or self.spec.n_heads

    def layer_types(self) -> list[str]:
        stated = self.config.get("layer_types")
        types = (
            list(stated) if isinstance(stated, list) and len(stated) == self.count else self._of_class("layer_types")
        )
        if types is None:
            types = [self._one_kind()] * self.count
        sharing = self._of_class("kv_sharing_modes") or [None] * self.count
        return ["dummy" if mode == "reuse" else kind for kind, mode in zip(types, sharing, strict=False)]

    def _one_kind(self) -> str:
        if self.config.get("use_sliding_window") is False:
            return "full_attention"
        if self._size("sliding_window"):
            return "sliding_attention"
        return "chunked_attention" if self._size("attention_chunk_size") else "full_attention"

    def layer(self, i: int, kind: str) -> Layer:
        if kind in _NOTHING:
            return Layer(i, "none")
        if kind in _STATE:
            return Layer(i, "state", state_bytes=self.state_bytes())
        if kind not in _FULL | _WINDOWED:
            self.notes.append(
                f"layer type {kind!r} is not known here: counted as full attention, which is the most it can be"
            )
        state = self.state_bytes() if kind in _BOTH else 0
        chooser = self._size("index_head_dim") or 0 if kind == _INDEXED else 0
        if self.latent:
            return Layer(
                i, "latent", self._size("kv_lora_rank") + self._size("qk_rope_head_dim") + chooser, state_bytes=state
            )
        if not (self.heads and self.dim):
            raise BadCheckpoint(
                "config.json: the size of a key is not stated (num_attention_heads, head_dim or hidden_size).",
                _ASK_CHECK,
            )
        heads, dim = self._heads_of(i)
        value_dim = self._size("v_head_dim") if "v_head_dim" in self.config else dim
        window = (
            (self._size("sliding_window") if kind != "chunked_attention" else self._size("attention_chunk_size"))
            if kind in _WINDOWED
            else None
        )
        shape = "hybrid" if state else "sliding" if window else "full"
        return Layer(i, shape, heads * dim + chooser, heads * value_dim, window, state)

    def _heads_of(self, i: int) -> tuple[int, int]:
        """(key/value heads, head_dim) of layer i: some families give their full-attention layers other sizes."""
        try:
            own = self.reference.per_layer_config[i]
        except (AttributeError, IndexError, TypeError, KeyError):
            return self.heads, self.dim
        found = []
        for name, common in (("num_key_value_heads", self.heads), ("head_dim", self.dim)):
            value = getattr(own, name, None)
            found.append(value if isinstance(value, int) and value > 0 and value != self._of_class(name) else common)
        return found[0], found[1]

    def full_heads(self, layer: Layer) -> Layer:
        """A latent layer as engines keep it that multiply the latent out: keys and values of every head."""
        heads = self._size("num_attention_heads")
        keys = (self._size("qk_nope_head_dim") or 0) + self._size("qk_rope_head_dim")
        return Layer(
            layer.block, "full", heads * keys, heads * (self._size("v_head_dim") or keys), state_bytes=layer.state_bytes
        )

    def state_bytes(self) -> int:
        """Bytes of one sequence's state: recurrences in float32, inputs of a convolution (its kernel less one) in 16
        bits.
        """
        size = self._size
        hidden = size("hidden_size") or 0
        kernel = (
            size(
                "linear_conv_kernel_dim",
                "mamba_d_conv",
                "conv_kernel",
                "conv_L_cache",
                "conv1d_width",
                "short_conv_kernel_size",
            )
            or 1
        )
        if size("linear_num_value_heads", "linear_num_heads"):  # gated delta net
            heads, key_heads = (
                size("linear_num_value_heads", "linear_num_heads"),
                size("linear_num_key_heads", "linear_num_heads"),
            )
            key, value = (
                size("linear_key_head_dim", "linear_head_dim"),
                size("linear_value_head_dim", "linear_head_dim"),
            )
            return 4 * heads * key * value + 2 * (2 * key_heads * key + heads * value) * (kernel - 1)
        state = size("mamba_d_state", "ssm_state_size", "state_size")
        if state:
            heads = size("mamba_n_heads", "mamba_num_heads", "n_mamba_heads") or (
                size("num_heads") if self.spec.model_type == "mamba2" else None
            )
            inner = size("mamba_d_ssm", "mamba_intermediate_size") or (
                heads * size("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
                if heads
                else (size("mamba_expand") or 0) * hidden or size("intermediate_size") or 2 * hidden
            )
            shared = 2 * (size("mamba_n_groups", "mamba_ngroups", "n_groups") or 1) * state if heads else 0
            return 4 * inner * state + 2 * (inner + shared) * (kernel - 1)
        if size("lru_width"):
            return 4 * size("lru_width") + 2 * size("lru_width") * (kernel - 1)
        if size("conv_L_cache"):
            return 2 * hidden * (kernel - 1)
        if hasattr(self.reference, "linear_attn_alpha_factor") and self.dim:  # lightning attention: one matrix a head
            return 4 * self.spec.n_heads * self.dim**2
        self.notes.append(
            "the constant state of its linear-attention layers is not known for this family, and not counted"
        )
        return 0


def with_custom(key_bits: int | None, value_bits: int | None) -> Iterable[Scheme]:
    """The usual schemes, and one more where a width was asked for; a width not given is 16."""
    yield from SCHEMES
    if key_bits is not None or value_bits is not None:
        yield custom(key_bits or 16, value_bits or 16)
