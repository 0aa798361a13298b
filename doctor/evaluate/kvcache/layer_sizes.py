"""What each layer keeps in the KV cache, from config.json alone.

A layer with full attention keeps keys and values of every token; one with a sliding window those of the last tokens;
latent attention (MLA) one compressed vector a token for all heads; linear attention, state-space and convolution layers
a state of constant size; layers that reuse another's cache nothing. Which layer is which is read from the keys that are
written where those suffice (rules/tables/cache_keys.toml); of the other families transformers' class is asked, since
half of them state it only in their class's defaults.
"""

from typing import Any

from doctor.checkpoint.special_numbers import with_numbers
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.messages import _
from doctor.core.tables import table
from doctor.evaluate.kvcache.layout import CacheLayout, Layer
from doctor.model.spec import ModelSpec

MOST_LAYERS = 10_000  # the deepest models have some 130; more is a slip of the keyboard, and would be listed one by one
_WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding", "local", "sliding"}
_STATE = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "linear"}
_BOTH = {"hybrid", "hybrid_sliding"}
_NOTHING = {"dummy", "moe", "mlp"}
_INDEXED = "indexed_attention"  # full attention beside one more key a token, by which a few tokens are chosen
_FULL = {"full_attention", "attention", "full", "global", "hybrid", _INDEXED}
_ASK_CHECK = _("Run `doctor check`: rules C14x say which key is missing.")


def read_cache_layout(spec: ModelSpec) -> CacheLayout:
    """The cache of a model, from its config. Raises BadCheckpoint where the config does not give the sizes, PlanRefused
    for an encoder and a decoder.
    """
    if spec.config.get("is_encoder_decoder") is True:  # each layer also keeps keys of what the encoder gave
        raise PlanRefused(
            _("config.json: is_encoder_decoder is true: the cache of an encoder's outputs is not counted here."),
            _("advise and kvcache are of decoder language models; `doctor check --scheme FP8_DYNAMIC` judges it."),
        )
    reader = _Reader(spec)
    types = reader.layer_types()
    layers = [reader.layer(i, kind) for i, kind in enumerate(types)]
    expanded: tuple[Layer, ...] = ()
    if reader.latent:
        expanded = tuple(reader.full_heads(x) if x.kind == "latent" else x for x in layers)
        reader.notes.append(
            _("latent attention: engines that do not absorb its matrices keep full heads instead; figures for both")
        )
    return CacheLayout(tuple(layers), tuple(dict.fromkeys(reader.notes)), expanded)


def read_by_keys(spec: ModelSpec) -> bool:
    """Whether the keys of this config.json say of every layer what transformers' class would say."""
    known, config = table("cache_keys"), spec.config
    if spec.model_type in known["typed"]:
        kinds = config.get("layer_types")
        windowed = isinstance(kinds, list) and any(kind in _WINDOWED for kind in kinds)
        whole = isinstance(kinds, list) and len(kinds) == spec.n_layers
        return whole and (not windowed or "sliding_window" in config)
    needed = known["stated"].get(spec.model_type)
    return spec.model_type in known["alone"] if needed is None else all(key in config for key in needed)


class _Reader:
    def __init__(self, spec: ModelSpec):
        self.spec, self.config = spec, spec.config
        self.notes: list[str] = []
        self.reference = self._library()
        count = self._of_class("num_hidden_layers") or spec.n_layers or self.config.get("num_hidden_layers")
        if not count:
            raise BadCheckpoint(_("config.json: the number of layers is not stated."), _ASK_CHECK)
        if not (isinstance(count, int) and 0 < count <= MOST_LAYERS):
            raise BadCheckpoint(
                _(
                    "config.json: {count} layers; must be a whole number from 1 to {most:,}.",
                    count=repr(count),
                    most=MOST_LAYERS,
                ),
                _ASK_CHECK,
            )
        self.count = count
        self.latent = self._size("kv_lora_rank") is not None and self._size("qk_rope_head_dim") is not None
        self.heads, self.dim = self._kv_heads(), spec.head_dim or self._size("head_dim")

    def _library(self) -> Any:
        """transformers' config object of this model, which fills in the class's defaults; None where it knows no such
        model_type, is not there, or is not needed.
        """
        if read_by_keys(self.spec):
            return None
        try:
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        except ModuleNotFoundError:
            self.notes.append(
                _(
                    "transformers is not installed, and {model} has defaults in its class: layers are read from "
                    "config.json's keys alone",
                    model=self.spec.model_type or "?",
                )
            )
            return None

        if self.spec.model_type not in CONFIG_MAPPING:
            return None
        stated = {k: v for k, v in self.config.items() if k not in ("auto_map", "quantization_config")}
        try:
            return CONFIG_MAPPING[self.spec.model_type].from_dict(with_numbers(stated))
        except Exception as error:  # its validators raise whatever they like; the written keys are still there
            self.notes.append(
                _(
                    "transformers cannot read this config ({error}): layers are read from its keys alone",
                    error=type(error).__name__,
                )
            )
            return None

    def _size(self, *names: str) -> int | None:
        for source in (self.config.get, self._of_class):
            for name in names:
                value = source(name)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def _stated(self, *names: str) -> int:
        """_size of what must be there. Raises BadCheckpoint where it is not."""
        value = self._size(*names)
        if value is None:
            raise BadCheckpoint(
                _("config.json: {key} is not stated; the cache's size needs it.", key=names[0]), _ASK_CHECK
            )
        return value

    def _of_class(self, name: str) -> Any:
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
                _(
                    "layer type {kind} is not known here: counted as full attention, which is the most it can be",
                    kind=repr(kind),
                )
            )
        state = self.state_bytes() if kind in _BOTH else 0
        chooser = self._size("index_head_dim") or 0 if kind == _INDEXED else 0
        if self.latent:
            return Layer(
                i,
                "latent",
                self._stated("kv_lora_rank") + self._stated("qk_rope_head_dim") + chooser,
                state_bytes=state,
            )
        if not (self.heads and self.dim):
            raise BadCheckpoint(
                _("config.json: the size of a key is not stated (num_attention_heads, head_dim or hidden_size)."),
                _ASK_CHECK,
            )
        heads, dim = self._heads_of(i, self.heads, self.dim)
        value_dim = self._stated("v_head_dim") if "v_head_dim" in self.config else dim
        window = (
            (self._size("sliding_window") if kind != "chunked_attention" else self._size("attention_chunk_size"))
            if kind in _WINDOWED
            else None
        )
        shape = "hybrid" if state else "sliding" if window else "full"
        return Layer(i, shape, heads * dim + chooser, heads * value_dim, window, state)

    def _heads_of(self, i: int, heads: int, dim: int) -> tuple[int, int]:
        """(KV heads, head_dim) of layer i, where most layers have `heads` and `dim`.

        Some families give their full-attention layers other sizes.
        """
        try:
            own = self.reference.per_layer_config[i]
        except (AttributeError, IndexError, TypeError, KeyError):
            return heads, dim
        found = []
        for name, common in (("num_key_value_heads", heads), ("head_dim", dim)):
            value = getattr(own, name, None)
            found.append(value if isinstance(value, int) and value > 0 and value != self._of_class(name) else common)
        return found[0], found[1]

    def full_heads(self, layer: Layer) -> Layer:
        """A latent layer as engines keep it that multiply the latent out: keys and values of every head."""
        heads = self._stated("num_attention_heads")
        keys = (self._size("qk_nope_head_dim") or 0) + self._stated("qk_rope_head_dim")
        return Layer(
            layer.block, "full", heads * keys, heads * (self._size("v_head_dim") or keys), state_bytes=layer.state_bytes
        )

    def state_bytes(self) -> int:
        """Bytes of one sequence's state: recurrences in float32, inputs of a convolution (its kernel less one) in 16
        bits.
        """
        size, stated = self._size, self._stated
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
                stated("linear_num_value_heads", "linear_num_heads"),
                stated("linear_num_key_heads", "linear_num_heads"),
            )
            key, value = (
                stated("linear_key_head_dim", "linear_head_dim"),
                stated("linear_value_head_dim", "linear_head_dim"),
            )
            return 4 * heads * key * value + 2 * (2 * key_heads * key + heads * value) * (kernel - 1)
        state = size("mamba_d_state", "ssm_state_size", "state_size")
        if state:
            mamba2 = self.spec.model_type == "mamba2"
            heads = size("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", *(("num_heads",) if mamba2 else ())) or 0
            inner = size("mamba_d_ssm", "mamba_intermediate_size") or (
                heads * stated("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
                if heads
                else (size("mamba_expand") or 0) * hidden or size("intermediate_size") or 2 * hidden
            )
            shared = 2 * (size("mamba_n_groups", "mamba_ngroups", "n_groups") or 1) * state if heads else 0
            return 4 * inner * state + 2 * (inner + shared) * (kernel - 1)
        width = size("lru_width")
        if width:
            return 4 * width + 2 * width * (kernel - 1)
        if size("conv_L_cache"):
            return 2 * hidden * (kernel - 1)
        if hasattr(self.reference, "linear_attn_alpha_factor") and self.dim:  # lightning attention: one matrix a head
            return 4 * (self.spec.n_heads or stated("num_attention_heads")) * self.dim**2
        self.notes.append(
            _("the constant state of its linear-attention layers is not known for this family, and not counted")
        )
        return 0
