"""What config.json says a model is: sizes, heads, token ids, and which tensors are linears.

Families come from the table `architectures` (tensor templates and shape expressions); a family that is not in it is
read by the pattern of its own tensor names, and says so (`family` is None). Nothing here judges: a contradiction
between config and tensors is a rule's business.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.tables import families_of, family_names, table
from doctor.core.tables import family as family_table
from doctor.model.expressions import evaluate, holds

# Where multimodal configs keep the language model's own block.
TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config", "text_model_config")
# Parts of a multimodal checkpoint that hold linears which no text calibration reaches.
NOT_TEXT = re.compile(
    r"(?:^|\.)(?:visual|vision\w*|vit|audio\w*|image\w*|multi_modal_projector|mm_projector|patch_embed)(?:\.|$)"
)
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
QUANTIZABLE = frozenset(
    {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "qkv",
        "gate_up",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "linear_attn_in",
        "linear_attn_out",
    }
)
# Row-parallel linears are cut along in_features by tensor parallelism; the others along out_features.
ROW_PARALLEL = frozenset({"o", "down", "linear_attn_out"})


class Linear(NamedTuple):
    """A module with a 2-D weight that can be quantized. Stored transposed (Conv1D) where `transposed` is true."""

    name: str
    tensor: str
    role: str
    block: int | None
    in_features: int
    out_features: int
    transposed: bool = False
    expert: int | None = None


@dataclass(frozen=True)
class Template:
    """One tensor pattern of a family. `shape` are expressions over config keys."""

    tensor: str
    pattern: re.Pattern
    shape: tuple[str, ...]
    role: str | None
    transposed: bool
    every_layer: bool  # false where only some blocks have it
    bias: object = False
    when: tuple[str | None, str | None] = (None, None)  # (only_with, only_without) of the table
    norm: str | None = None  # how a norm applies its weight, where the family's norms differ in it
    layers: str | None = None  # the kind of decoder layer that has it; None: every layer, or no table says


@dataclass
class ModelSpec:
    """What config.json states, with the family's defaults where it is silent; None where nobody knows."""

    family: str | None
    model_type: str
    architecture: str
    config: dict  # the language model's own block
    text_key: str | None  # key of that block in config.json, None when it is the whole file
    n_layers: int | None
    hidden: int | None
    intermediate: int | None
    n_heads: int | None
    n_kv_heads: int | None
    head_dim: int | None
    vocab: int | None
    max_positions: int | None
    tied: bool  # as a reader takes it: the stated value, else the family's default
    tie_stated: bool | None
    prefix: str = ""  # what this checkpoint writes in front of the family's own names
    linears: tuple[Linear, ...] = ()
    embed_tensor: str | None = None
    head_tensor: str | None = None
    biases: frozenset[str] = frozenset()  # names of all bias tensors
    templates: tuple[Template, ...] = field(default=(), repr=False)
    expert_templates: tuple[Template, ...] = field(
        default=(), repr=False
    )  # linears of experts that this family's own files hold in stacks

    def at(self, key: str) -> str:
        """JSON pointer in config.json of a key of the language model's block."""
        return f"/{self.text_key}/{key}" if self.text_key else f"/{key}"

    def key_for(self, generic: str) -> str:
        """The config key this family uses for a generic name, e.g. hidden_size -> n_embd for GPT-2."""
        if generic in self.config:
            return generic
        for alias in _ALIASES.get(generic, ()):
            if alias in self.config:
                return alias
        return generic

    def expected_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape that config.json and the family's table give this tensor; None where they do not say."""
        found = set()
        for template in self.templates:
            match = template.pattern.match(name)
            if match and self.in_layer(template.layers, int(match.groupdict().get("i") or 0)) is not False:
                found.add(tuple(evaluate(e, self.lookup) for e in template.shape))
        sizes = found.pop() if len(found) == 1 else (None,)
        return None if any(s is None for s in sizes) else sizes

    def lookup(self, key: str) -> int | None:
        return _lookup(self.config, self.family, key)

    def norm_of(self, name: str) -> str | None:
        """How a norm applies the weight in this tensor: "weight * xhat" or "(1 + weight) * xhat"."""
        own = next((t.norm for t in self.templates if t.pattern.match(name)), None)
        return own or family_table(self.family).get("norm")

    def in_layer(self, kind: str | None, layer: int) -> bool | None:
        """Whether config.json makes a decoder layer one of this kind of the table; None where it does not say."""
        entry = family_table(self.family)
        conditions = entry.get("kinds", {}).get(kind)
        return True if kind is None else holds(conditions or (), lambda key: _raw(self.config, entry, key), layer)


def text_block(config: Mapping) -> tuple[dict, str | None]:
    """The language model's own block of a config, and its key (None when it is the whole file)."""
    for key in TEXT_KEYS:
        block = config.get(key)
        if isinstance(block, dict) and (
            "hidden_size" in block or "num_hidden_layers" in block or "model_type" in block
        ):
            return {**{k: v for k, v in config.items() if k not in TEXT_KEYS and not isinstance(v, dict)}, **block}, key
    return dict(config), None


def build_spec(config: Mapping, tensors: Mapping[str, TensorInfo]) -> ModelSpec:
    """Spec of a parsed config.json and the tensors beside it. Never raises on odd values: what is unusable is None."""
    block, text_key = text_block(config)
    architectures = config.get("architectures")
    architecture = (
        architectures[0]
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
        else ""
    )
    model_type = str(block.get("model_type") or config.get("model_type") or "")
    family = _family(model_type, str(config.get("model_type") or ""), architecture, block)
    entry = family_table(family)
    stated = block.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    tied = stated if isinstance(stated, bool) else entry.get("tie_word_embeddings", False)
    heads = _size(_lookup(block, family, "num_attention_heads"))
    hidden = _size(_lookup(block, family, "hidden_size"))
    templates = tuple(t for t in _templates(family) if exists(t.when, entry["defaults"] | block)) if family else ()
    if templates:
        known = {t.tensor for t in templates}
        templates += tuple(t for t in _stack_templates(model_type) if t.tensor not in known)
    expert_templates = tuple(_expert_templates(model_type))
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
        tensors, entry.get("embed_tokens", "model.embed_tokens"), "embed_tokens", "wte", "word_embeddings"
    )
    spec.head_tensor = _named(tensors, entry.get("lm_head", "lm_head"), "lm_head", "embed_out", "output_layer")
    spec.linears = tuple(_linears(tensors.values(), templates, expert_templates))
    spec.prefix = _prefix(spec.linears, templates)
    spec.biases = frozenset(n for n in tensors if n.endswith(".bias"))
    return spec


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


def _lookup(config: Mapping, family: str | None, key: str) -> int | None:
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


@cache
def _templates(family: str) -> tuple[Template, ...]:
    return tuple(
        Template(
            item["name"],
            _pattern(item["name"]),
            tuple(item["shape"]),
            item.get("role"),
            item.get("transposed", False),
            "layers" not in item,
            item.get("bias", False),
            condition(item),
            item.get("norm"),
            item.get("layers"),
        )
        for item in family_table(family)["tensor"]
    )


def stacks_of(model_type: str) -> list[dict]:
    """Entries of the table `stacks` for a language model's type: how its files hold experts in one tensor."""
    return [entry for entry in table("stacks")["stack"] if model_type in entry["models"]]


def _expert_templates(model_type: str) -> Iterable[Template]:
    for entry in stacks_of(model_type):
        for role in ("gate", "up", "down"):
            tensor = f"model.layers.{{i}}.{entry['linear'].replace('{role}', role)}.weight"
            shape = (entry["hidden"], entry["inner"]) if role == "down" else (entry["inner"], entry["hidden"])
            yield Template(tensor, _pattern(tensor), shape, role, False, False, entry["biases"])


def _stack_templates(model_type: str) -> Iterable[Template]:
    for entry in stacks_of(model_type):
        for role, size in (
            ("gate_up", (f"2 * {entry['inner']}", entry["hidden"])),
            ("down", (entry["hidden"], entry["inner"])),
        ):
            tensor = f"model.layers.{{i}}.{entry[role]}"
            shape = (entry["experts"], *(size[::-1] if entry["in_first"] else size))
            yield Template(tensor, _pattern(tensor), shape, role, False, False, entry["biases"])


def condition(item: Mapping) -> tuple[str | None, str | None]:
    """What a table's entry says about models that have this tensor: (only_with, only_without), keys of config.json."""
    return item.get("only_with"), item.get("only_without")


def exists(when: tuple[str | None, str | None], config: Mapping) -> bool:
    """Whether a model of this config has a tensor with this condition. A key set to null, 0 or false takes away what
    needs it.
    """
    needed, unwanted = (key is not None and not config.get(key, key) for key in when)
    return not needed and (when[1] is None or unwanted)


def _pattern(template: str) -> re.Pattern:
    """Names that fit a template, whatever stands before the part that counts (`model.language_model.` and the like)."""
    body = template
    if "{i}" in template:
        before = template[: template.index("{i}")].rstrip(".").split(".")
        body = ".".join(before[-1:]) + "." + template[template.index("{i}") :]
    elif template.startswith("model."):
        body = template[len("model.") :]
    regex = re.escape(body).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(rf"^(?P<prefix>(?:\w+\.)*?){regex}$")


def _named(tensors: Mapping[str, TensorInfo], module: str, *tails: str) -> str | None:
    exact = f"{module}.weight"
    if exact in tensors:
        return exact
    for name in tensors:
        if name.endswith(
            tuple(f".{t}.weight" for t in tails) + tuple(f"{t}.weight" for t in tails)
        ) and not NOT_TEXT.search(name):
            return name
    return None


_BLOCK = re.compile(r"\.(?P<i>\d+)\.")
# Layers of multi-token prediction that are stored under a stem of their own: their number counts from 0 again, so a
# linear of theirs has no decoder layer (block None), and its name alone says which it is.
_EXTRA_LAYERS = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|nextn)\.")


def _linears(
    infos: Iterable[TensorInfo], templates: tuple[Template, ...], experts: tuple[Template, ...]
) -> Iterable[Linear]:
    if templates:
        yield from _by_template(infos, [*(t for t in templates if t.role in QUANTIZABLE), *experts])
    else:
        for linear in _by_shape(infos):
            found = _template_and_match(linear.tensor, experts)
            yield linear._replace(role=found[0].role, expert=int(found[1]["e"])) if found else linear


def in_extra_layer(name: str) -> bool:
    """Whether a tensor or module belongs to a layer of multi-token prediction that has a stem of its own (`mtp.`)."""
    return _EXTRA_LAYERS.search(name) is not None


def _by_template(infos: Iterable[TensorInfo], templates: list[Template]) -> Iterable[Linear]:
    known: dict[
        str, tuple[Template, int | None] | None
    ] = {}  # name without its block's number: a large MoE has 50,000 tensors
    for info in infos:
        if len(info.shape) != 2:
            continue
        block = _BLOCK.search(info.name)
        alike = info.name if block is None else info.name[: block.start() + 1] + info.name[block.end() - 1 :]
        if alike not in known:
            found = _template_and_match(info.name, templates)
            if found is not None and (block is None or found[1].start("i") != block.start("i")):
                alike = info.name  # another number counts the blocks
            expert = found and found[1].groupdict().get("e")
            known[alike] = found and (
                found[0],
                found[1]["i"] if alike == info.name else None,
                int(expert) if expert is not None else None,
            )
        if known[alike] is not None:
            template, number, expert = known[alike]
            out, inn = info.shape[::-1] if template.transposed else info.shape
            layer = None if in_extra_layer(info.name) else int(number or block["i"])
            yield Linear(
                info.name.removesuffix(".weight"),
                info.name,
                template.role,
                layer,
                inn,
                out,
                template.transposed,
                expert,
            )


def _template_and_match(name: str, templates: list[Template]) -> tuple[Template, re.Match] | None:
    if NOT_TEXT.search(name):
        return None
    return next(((t, match) for t in templates if (match := t.pattern.match(name))), None)


ROLE_OF_TAIL = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "qkv_proj": "qkv",
    "gate_up_proj": "gate_up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}


# Parts that stay in 16 bits: norms (some hold matrices), routers, embeddings, and what steers the step of a state-space
# model: x_proj and dt_proj are a few per cent of a Mamba block, as narrow as its step's rank, and feed a recurrence
# that adds up their errors.
_LEFT_OUT = re.compile(r"norm[^.]*(?:\.[^.]*)?$|(?:embed|router)[^.]*$|\.(?:gate|x_proj|dt_proj)$")
NARROWEST = 32  # below, neither a group of weights nor a word of packed ones is filled


def _by_shape(infos: Iterable[TensorInfo]) -> Iterable[Linear]:
    """Linears of a family no table knows: 2-D float weights inside numbered blocks that are wide enough to be worth
    packing.
    """
    for info in infos:
        block = _BLOCK.search(info.name)
        module = info.name.removesuffix(".weight")
        if (
            block is None
            or len(info.shape) != 2
            or module == info.name
            or not info.dtype.is_float
            or min(info.shape) < NARROWEST
            or _LEFT_OUT.search(module, block.end() - 1)
            or NOT_TEXT.search(info.name)
        ):
            continue
        tail = module.rpartition(".")[2]
        layer = None if in_extra_layer(info.name) else int(block["i"])
        yield Linear(
            info.name.removesuffix(".weight"),
            info.name,
            ROLE_OF_TAIL.get(tail, "other"),
            layer,
            info.shape[1],
            info.shape[0],
        )


def _prefix(linears: tuple[Linear, ...], templates: tuple[Template, ...]) -> str:
    for linear in [x for x in linears if x.block is not None][:1]:
        for template in templates:
            match = template.pattern.match(linear.tensor)
            if match:
                return match["prefix"]
    return ""
