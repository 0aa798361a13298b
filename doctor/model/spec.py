"""The model that config.json describes: family, sizes, heads, and which tensors are linears.

Families are those of rules/tables/architectures; a family without a table is read by the pattern of its tensor names,
and its `family` is None. Nothing here judges: a contradiction between config and tensors is a rule's business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.tables import families_of, family_names
from doctor.core.tables import family as family_table
from doctor.model.expressions import evaluate, holds
from doctor.model.linears import NOT_TEXT, Linear, find_linears
from doctor.model.templates import Template, exists, expert_templates_of, fused_templates_of, templates_of

# Keys under which multimodal configs keep the language model's own object.
TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")


_ALIASES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "head_dim": ("kv_channels", "attention_head_dim"),
    "vocab_size": ("padded_vocab_size",),
    "max_position_embeddings": ("n_positions", "seq_length", "max_seq_len", "max_sequence_length"),
}
# Keys that hold one word or letter for each decoder layer.
_LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern")


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


class _Known(NamedTuple):
    """shapes: of each template that fits, (kind of decoder layer or None, which part of the name is the layer's number
    or -1, shape with None for what is not stated).
    """

    shapes: tuple[tuple[str | None, int, tuple[int | None, ...]], ...]
    transposed: bool
    tower: bool


@dataclass
class ModelSpec:
    """What config.json states, else the family's default, else None."""

    family: str | None
    model_type: str
    architecture: str
    config: dict[str, Any]  # the language model's own object
    text_key: str | None  # path of that object in config.json ("text_config"), None if it is the whole file
    n_layers: int | None
    hidden: int | None
    intermediate: int | None
    n_heads: int | None
    n_kv_heads: int | None
    head_dim: int | None
    vocab: int | None
    max_positions: int | None
    tied: bool  # the stated value, else the family's default
    tie_stated: bool | None
    prefix: str = ""  # what this checkpoint puts before the family's own names
    linears: tuple[Linear, ...] = ()
    embed_tensor: str | None = None
    head_tensor: str | None = None
    biases: frozenset[str] = frozenset()  # names of all bias tensors
    templates: tuple[Template, ...] = field(default=(), repr=False)
    # Linears of single experts, if the files of this family hold fused experts.
    expert_templates: tuple[Template, ...] = field(default=(), repr=False)
    # By the name with every number 0, as a large mixture of experts has 50,000 tensors.
    _known: dict[str, _Known] = field(default_factory=dict, init=False, repr=False, compare=False)
    _kinds: dict[tuple[str | None, int], bool | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def at(self, key: str) -> str:
        """JSON pointer in config.json of a key of the language model."""
        return f"/{self.text_key}/{key}" if self.text_key else f"/{key}"

    def section(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The language model's own object as config.json states it; empty where it is no object."""
        found: Any = config
        for key in self.text_key.split("/") if self.text_key else ():
            found = found.get(key) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def key_for(self, generic: str) -> str:
        """The config key this family uses for a generic name, e.g. hidden_size -> n_embd for GPT-2."""
        if generic in self.config:
            return generic
        for alias in _ALIASES.get(generic, ()):
            if alias in self.config:
                return alias
        return generic

    def linear_shape(self, module: str) -> tuple[int, ...] | None:
        """(out_features, in_features) of a linear, also where its family stores the plain weight as [in, out]; None
        where config.json does not say them, and for towers, whose layers have the text's names and other sizes.
        """
        name = f"{module}.weight"
        known = self._known_of(name)
        shape = None if known.tower else self.expected_shape(name)
        if shape is None or len(shape) != 2:
            return None
        return shape[::-1] if known.transposed else shape

    def expected_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape that config.json and the family's table give this tensor; None if they do not say."""
        found: set[tuple[int | None, ...]] = set()
        for kind, place, shape in self._known_of(name).shapes:
            if kind is None or self.in_layer(kind, int(name.split(".")[place]) if place >= 0 else 0) is not False:
                found.add(shape)
        stated = found.pop() if len(found) == 1 else (None,)
        sizes = tuple(size for size in stated if size is not None)
        return sizes if len(sizes) == len(stated) else None

    def _known_of(self, name: str) -> _Known:
        """What the family's table says of all tensors that this name differs from in numbers only; no template has a
        number of its own.
        """
        alike = _NUMBER.sub("0", name)
        known = self._known.get(alike)
        if known is None:
            matches = [(t, match) for t in self.templates if (match := t.pattern.match(name))]
            known = self._known[alike] = _Known(
                tuple(
                    (
                        template.layers,
                        name.count(".", 0, match.start("i")) if match.groupdict().get("i") else -1,
                        tuple(evaluate(e, self.lookup) for e in template.shape),
                    )
                    for template, match in matches
                ),
                any(template.transposed for template, _match in matches),
                NOT_TEXT.search(name) is not None,
            )
        return known

    def lookup(self, key: str) -> Any:
        """Value of a generic or family key, with aliases and defaults; None if nobody states one."""
        return _lookup(self.config, self.family, key)

    def norm_of(self, name: str) -> str | None:
        """How a norm applies the weight in this tensor: "weight * xhat" or "(1 + weight) * xhat"."""
        own = next((t.norm for t in self.templates if t.pattern.match(name)), None)
        return own or family_table(self.family).get("norm")

    def in_layer(self, kind: str | None, layer: int) -> bool | None:
        """Whether config.json makes a decoder layer one of this kind of the table; None if it does not say."""
        if kind is None:
            return True
        if (kind, layer) not in self._kinds:  # asked for each of 50,000 tensors of 60 layers
            entry = family_table(self.family)
            conditions = entry.get("kinds", {}).get(kind) or ()
            self._kinds[kind, layer] = holds(conditions, lambda key: _raw(self.config, entry, key), layer)
        return self._kinds[kind, layer]


def text_block(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The language model's own object of a config, and its path (None if it is the whole file)."""
    for key in TEXT_KEYS:
        block = config.get(key)
        if isinstance(block, dict) and (
            "hidden_size" in block or "num_hidden_layers" in block or "model_type" in block
        ):
            outer = {k: v for k, v in config.items() if k not in TEXT_KEYS and not isinstance(v, dict)}
            inner, path = text_block(block)  # an Omni model's thinker has a text_config of its own
            return {**outer, **inner}, f"{key}/{path}" if path else key
    return dict(config), None


def _by_layer(block: dict[str, Any]) -> dict[str, Any]:
    """Dory's config.json lists attention and MLP as two; transformers makes one layer of each pair (5.24,
    models/dory/configuration_dory.py) and halves the numbers of layers.
    """
    kinds = block.get("layer_types")
    if not isinstance(kinds, list) or not kinds or len(kinds) % 2 or set(map(str, kinds[1::2])) != {"mlp"}:
        return block
    counts = ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")
    halves = {key: block[key] // 2 for key in counts if isinstance(block.get(key), int)}
    return {**block, **halves, "layer_types": kinds[::2]}


def build_spec(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Spec of a parsed config.json and its tensors. Never raises on odd values: an unusable value is None."""
    block, text_key = text_block(config)
    block = _by_layer(block)
    architectures = config.get("architectures")
    architecture = (
        architectures[0]
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
        else ""
    )
    model_type = str(block.get("model_type") or config.get("model_type") or "")
    family = _family(model_type, str(config.get("model_type") or ""), architecture, block)
    entry = family_table(family)
    # The whole model's class obeys its own key; transformers 5 writes the text class's default inside as well.
    stated = _outermost(config, text_key, "tie_word_embeddings")
    tied = stated if isinstance(stated, bool) else entry.get("tie_word_embeddings", False)
    heads = _size(_lookup(block, family, "num_attention_heads"))
    hidden = _size(_lookup(block, family, "hidden_size"))
    templates = tuple(t for t in templates_of(family) if exists(t.when, entry["defaults"] | block)) if family else ()
    if templates:
        known = {t.tensor for t in templates}
        templates += tuple(t for t in fused_templates_of(model_type) if t.tensor not in known)
    expert_templates = tuple(expert_templates_of(model_type))
    spec = ModelSpec(
        family=family,
        model_type=model_type,
        architecture=architecture,
        config=block,
        text_key=text_key,
        n_layers=_size(_lookup(block, family, "num_hidden_layers")),
        hidden=hidden,
        intermediate=_size(_lookup(block, family, "intermediate_size")),
        n_heads=heads,
        n_kv_heads=_size(_lookup(block, family, "num_key_value_heads")),
        head_dim=_size(_lookup(block, family, "head_dim")),
        vocab=_size(_lookup(block, family, "vocab_size")),
        max_positions=_size(_lookup(block, family, "max_position_embeddings")),
        tied=tied,
        tie_stated=stated if isinstance(stated, bool) else None,
        templates=templates,
        expert_templates=expert_templates,
    )
    spec.embed_tensor = _named(
        tensors,
        entry.get("embed_tokens", "model.embed_tokens"),
        "embed_tokens",
        "wte",
        "word_embeddings",
        "backbone.embeddings",
    )
    spec.head_tensor = _named(tensors, entry.get("lm_head", "lm_head"), "lm_head", "embed_out", "output_layer")
    spec.linears = tuple(find_linears(tensors.values(), templates, expert_templates))
    spec.prefix = _prefix(spec.linears, templates)
    spec.biases = frozenset(n for n in tensors if n.endswith(".bias"))
    return spec


def _outermost(config: Mapping[str, Any], text_key: str | None, key: str) -> Any:
    """What the outermost object states that has this key: the whole config, an Omni model's thinker, the text part."""
    found: Any = config
    for name in (text_key or "").split("/"):
        if not isinstance(found, Mapping) or key in found:
            break
        found = found.get(name)
    return found.get(key) if isinstance(found, Mapping) else None


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else None


def _family(model_type: str, outer_type: str, architecture: str, block: Mapping) -> str | None:
    if model_type == "falcon" and block.get("new_decoder_architecture"):
        return "falcon_new"
    for candidate in (model_type, f"{model_type}_text", outer_type, f"{outer_type}_text"):
        if candidate in family_names():
            return candidate
    return next((name for name, _ in families_of(architecture)), None)


def _raw(config: Mapping, entry: Mapping, key: str) -> object:
    """What config.json states for a key, of whatever type, else the class's default."""
    value = config.get(key)
    return entry.get("defaults", {}).get(key) if value is None else value


def _lookup(config: Mapping[str, Any], family: str | None, key: str) -> Any:
    """Value of a generic or family key: stated, aliased, derived as transformers derives it, or the class's default."""
    entry = family_table(family)
    mapped = entry.get("config_keys", {}).get(key)
    names = [key, *([mapped] if isinstance(mapped, str) and mapped.isidentifier() else []), *_ALIASES.get(key, ())]
    for name in names:
        value = config.get(name)
        if value is not None and not isinstance(value, (dict, str)):
            return max(value) if isinstance(value, list) and value and all(isinstance(v, int) for v in value) else value
    default = entry.get("defaults", {}).get(key)
    if default is not None and not isinstance(default, (dict, str, list)):
        return default
    if key == "head_dim":
        hidden, heads = _lookup(config, family, "hidden_size"), _lookup(config, family, "num_attention_heads")
        return hidden // heads if _size(hidden) and _size(heads) else None
    if key == "num_key_value_heads":
        return _lookup(config, family, "num_attention_heads")
    if key == "n_inner":
        hidden = _lookup(config, family, "n_embd")
        return 4 * hidden if _size(hidden) else None
    if key == "num_hidden_layers":  # Nemotron-H states only which layers there are
        return next(
            (len(config[n]) for n in _LAYER_LISTS if isinstance(config.get(n), (list, str)) and config[n]), None
        )
    if key in ("n_head", "n_embd", "d_model", "num_heads", "n_heads"):
        generic = {
            "n_head": "num_attention_heads",
            "num_heads": "num_attention_heads",
            "n_heads": "num_attention_heads",
        }.get(key, "hidden_size")
        return next((config[n] for n in (generic, *_ALIASES[generic]) if _size(config.get(n))), None)
    return None


def _named(tensors: Mapping[str, TensorInfo], module: str, *tails: str) -> str | None:
    exact = f"{module}.weight"
    if exact in tensors:
        return exact
    ends = tuple(f"{t}.weight" for t in tails)
    for name in tensors:
        if name.endswith(ends) and not NOT_TEXT.search(name):
            return name
    return None


def _prefix(linears: tuple[Linear, ...], templates: tuple[Template, ...]) -> str:
    for linear in [x for x in linears if x.block is not None][:1]:
        for template in templates:
            match = template.pattern.match(linear.tensor)
            if match:
                return match["prefix"]
    return ""
