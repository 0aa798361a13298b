"""A checkpoint's names, sizes and values as GGUF has them, and back: what llama.cpp's converter does, as tables.

Tensors keep their rows but for q and k of the architecture llama, whose rotation pairs neighbours where transformers
pairs halves: GGUF row h*D + 2j + s holds row h*D + s*D/2 + j of head h. Gemma's norms are stored with 1 added.

Source: see rules/tables/gguf.toml; checked against llama.cpp's own conversion of SmolLM2-135M and against transformers'
reading of GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from doctor.checkpoint.gguf import GgufModel
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.messages import _, listed
from doctor.core.tables import table
from doctor.formats.arrays import Array
from doctor.model.gguf_rope import scaling_of

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """One entry of the table."""

    name: str
    transformers_class: str
    model_type: str
    permuted: bool
    rope_dimension: bool
    shift: float
    layer: Mapping[str, str]  # module inside a layer -> GGUF's name
    outside: Mapping[str, str]
    experts: Mapping[str, str]  # linear of single experts, without their numbers -> GGUF's name of all of them
    heads_normed: bool
    renormalized: bool

    def gguf_name(self, name: str) -> str | None:
        """GGUF's name of a tensor, or of the stack that holds it; None where it has none."""
        match = _LAYER.match(name)
        if match is not None:
            own = self.layer.get(match[2]) or self.experts.get(_EXPERT.sub(".experts.", match[2]))
            return f"blk.{match[1]}.{own}.{match[3]}" if own else None
        module, _dot, part = name.rpartition(".")
        own = self.outside.get(module)
        return f"{own}.{part}" if own else None

    def expert_of(self, name: str) -> int | None:
        """Which part of a stack a tensor is; None for one that is a tensor of the file itself."""
        match = _EXPERT.search(name)
        return int(match[1]) if match is not None and self.experts else None

    def names_of(self, gguf_name: str, experts: int) -> list[str]:
        """transformers' names of a GGUF tensor: one for each of so many experts where it is a stack."""
        match = _BLOCK.match(gguf_name)
        linear = next((k for k, v in self.experts.items() if match and v == match[2]), None)
        if match is None or linear is None:
            name = self.name_of(gguf_name)
            return [] if name is None else [name]
        before, _dot, last = linear.rpartition(".")
        return [f"model.layers.{match[1]}.{before}.{i}.{last}.{match[3]}" for i in range(experts)]

    def name_of(self, gguf_name: str) -> str | None:
        """transformers' name of a GGUF tensor that is no stack."""
        match = _BLOCK.match(gguf_name)
        if match is not None:
            own = next((k for k, v in self.layer.items() if v == match[2]), None)
            return f"model.layers.{match[1]}.{own}.{match[3]}" if own else None
        module, _dot, part = gguf_name.rpartition(".")
        own = next((k for k, v in self.outside.items() if v == module), None)
        return f"{own}.{part}" if own else None

    def heads_of(self, name: str, heads: int, kv_heads: int) -> int:
        """By how many heads the rows of a tensor are permuted; 0 for none."""
        if not self.permuted:
            return 0
        return heads if ".q_proj." in name else kv_heads if ".k_proj." in name else 0

    def shift_of(self, name: str) -> float:
        """What is added to a tensor's values."""
        return self.shift if name.endswith("norm.weight") else 0.0


@cache
def architecture(key: str) -> Architecture | None:
    """The entry of the table; None where there is none."""
    known = table("gguf")
    entry = known["architectures"].get(key)
    if entry is None:
        return None
    mlp = {} if "experts" in entry else known["mlp"]
    return Architecture(
        entry.get("file", key),
        entry["class"],
        entry["model_type"],
        entry.get("permuted", False),
        entry.get("rope_dimension", False),
        entry.get("shift", 0.0),
        {**known["layer"], **mlp, **entry["layer"]},
        known["outside"],
        entry.get("experts", {}),
        entry.get("heads_normed", False),
        entry.get("renormalized", False),
    )


def architecture_in(model: GgufModel) -> Architecture | None:
    """The architecture of a file; None where it is not in the table. One with experts may have an entry of its own."""
    name, mixed = model.architecture, bool(model.own("expert_count"))
    entries = (architecture(key) for key in table("gguf")["architectures"])
    return next((a for a in entries if a and a.name == name and bool(a.experts) == mixed), None)


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a checkpoint of this config.json becomes; None where it is not in the table."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else ""
    found = (a for a, entry in table("gguf")["architectures"].items() if name in entry["classes"])
    return architecture(next(found, ""))


def written_classes() -> list[str]:
    """Classes of transformers that can be written as GGUF."""
    return [name for entry in table("gguf")["architectures"].values() for name in entry["classes"]]


def permuted_rows(rows: Array, heads: int) -> Array:
    """Rows [n, ...] in GGUF's order, for q and k of llama."""
    return _swapped(rows, heads, 2, rows.shape[0] // heads // 2)


def unpermuted_rows(rows: Array, heads: int) -> Array:
    """Rows of GGUF in transformers' order."""
    return _swapped(rows, heads, rows.shape[0] // heads // 2, 2)


def _swapped(rows: Array, heads: int, first: int, second: int) -> Array:
    """Rows of each head as [first, second], taken as [second, first]."""
    return rows.reshape(heads, first, second, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_of(config: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]]:
    """(base, scaling) of the rotation of full attention; scaling is {} for none."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found) if isinstance(found, Mapping) else {}
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    return float(theta), found if kind not in ("default", None) else {}


def config_of(model: GgufModel, factors: Sequence[float] | None = None) -> dict[str, Any]:
    """config.json of the model that a GGUF file holds. factors: the values of ROPE_FREQS, where it has them.

    Raises BadCheckpoint for an architecture or a rotation that is not read.
    """
    known = architecture_in(model)
    if known is None:
        raise BadCheckpoint(
            _(
                "{file}: its architecture {name!r} is not read as a model here; {known} are.",
                file=model.name,
                name=model.architecture,
                known=listed(sorted(table("gguf")["architectures"])),
            )
        )
    tensors = model.tensors
    embedding = tensors.get("token_embd.weight")
    try:
        heads, hidden = int(model.own("attention.head_count")), int(model.own("embedding_length"))
        head_dim = int(model.own("attention.key_length", hidden // heads))
        config: dict[str, Any] = {
            "architectures": [known.transformers_class],
            "model_type": known.model_type,
            "hidden_size": hidden,
            "intermediate_size": int(model.own("feed_forward_length")),
            "num_hidden_layers": int(model.own("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(model.own("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "max_position_embeddings": int(model.own("context_length")),
            "rms_norm_eps": float(model.own("attention.layer_norm_rms_epsilon")),
            "vocab_size": embedding.shape[0] if embedding else int(model.own("vocab_size", 0)),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "torch_dtype": "float32",
        } | _experts_of(model, known)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise BadCheckpoint(
            _("{file}: its metadata does not give a model: {error}.", file=model.name, error=str(error)),
            _("Run `doctor check` on it."),
        ) from None
    theta = float(model.own("rope.freq_base", 10000.0))
    if known.name == "gemma3":
        return config | _gemma(model, theta)
    scaling = _scaling(model, theta, head_dim, factors)
    return config | {"rope_theta": theta, "rope_scaling": scaling or None}


def _experts_of(model: GgufModel, known: Architecture) -> dict[str, Any]:
    """What config.json says of experts; {} where there are none."""
    if not known.experts:
        return {}
    count, used = int(model.own("expert_count")), int(model.own("expert_used_count"))
    if known.model_type == "mixtral":
        return {"num_local_experts": count, "num_experts_per_tok": used}
    shared = model.own("expert_shared_feed_forward_length")
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": int(model.own("expert_feed_forward_length")),
        **({"shared_expert_intermediate_size": int(shared)} if shared is not None else {}),
        "norm_topk_prob": known.renormalized,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(model: GgufModel, theta: float) -> dict[str, Any]:
    """What Gemma 3's config.json has of its own. Every sixth layer attends to everything."""
    layers = int(model.own("block_count"))
    local = float(model.own("rope.freq_base_swa", 10000.0))
    if model.own("rope.scaling.type", "none") not in ("none", "linear"):
        raise BadCheckpoint(_("{file}: its rope scaling is not read for this architecture.", file=model.name))
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if model.own("rope.scaling.type") == "linear":
        full = {"rope_type": "linear", "rope_theta": theta, "factor": float(model.own("rope.scaling.factor", 1.0))}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": int(model.own("attention.sliding_window", 512)),
        "query_pre_attn_scalar": _attention_scale(
            layers,
            int(model.own("embedding_length")),
            int(model.own("attention.head_count")),
            int(model.own("attention.key_length", 256)),
        ),
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        "rope_theta": theta,
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "attn_logit_softcapping": None,
        "final_logit_softcapping": model.own("final_logit_softcapping"),
    }


def _attention_scale(layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """What llama.cpp takes for query_pre_attn_scalar of Gemma 3, which no key of the file holds: the size of a head; in
    the 27B, which it knows by its 62 layers, hidden_size / heads. Source: llama.cpp src/llama-model.cpp.
    """
    return hidden // heads if layers == 62 else head_dim


def _scaling(model: GgufModel, theta: float, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    """rope_scaling of config.json; {} for none. Llama 3's is in no key, only in the values of ROPE_FREQS."""
    kind = model.own("rope.scaling.type", "none")
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": float(model.own("rope.scaling.factor", 1.0)),
            "original_max_position_embeddings": int(model.own("rope.scaling.original_context_length", 0)),
        }
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(model.own("rope.scaling.factor", 1.0))}
    if kind not in ("none", "", None):
        raise BadCheckpoint(_("{file}: rope scaling {kind!r} is not read here.", file=model.name, kind=kind))
    if factors is None:
        return {}
    found = scaling_of(factors, theta, head_dim)
    if found is None:
        raise BadCheckpoint(
            _(
                "{file}: its {count} values of {name} are no scaling of Llama 3.",
                file=model.name,
                count=len(factors),
                name=ROPE_FREQS,
            )
        )
    return found


_GEMMA_SIZES = {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "head_dim": 256}  # and defaults


def unwritable(config: Mapping[str, Any]) -> str:
    """Why a checkpoint of this config.json cannot be written as GGUF here; "" where it can."""
    known = architecture_of(config)
    stated = config.get("architectures")
    if known is None:
        return _(
            "{name} is not written as GGUF here; {known} are",
            name=str(stated[0]) if isinstance(stated, list) and stated else str(config.get("model_type")),
            known=listed(written_classes()),
        )
    _theta, scaling = rope_of(config)
    kind = str(scaling.get("rope_type", scaling.get("type", ""))) if scaling else ""
    if kind not in ("", "linear", "yarn", *(("llama3",) if known.name == "llama" else ())):
        return _("rope scaling {kind} is not written as GGUF here", kind=kind)
    if known.experts and known.model_type != "mixtral":
        if bool(config.get("norm_topk_prob", False)) != known.renormalized:
            return _(
                "norm_topk_prob is {value}, and llama.cpp computes this architecture as {other}",
                value=str(bool(config.get("norm_topk_prob", False))).lower(),
                other=str(known.renormalized).lower(),
            )
        if int(config.get("decoder_sparse_step") or 1) != 1 or config.get("mlp_only_layers"):
            return _("llama.cpp wants experts in every layer of this architecture, and some have none")
    if known.name == "gemma3":
        layers = config.get("layer_types")
        pattern = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
            for i in range(int(config.get("num_hidden_layers") or 0))
        ]
        if isinstance(layers, list) and layers != pattern:
            return _("llama.cpp takes every sixth layer of Gemma 3 as full attention, and layer_types says otherwise")
        sizes = [int(config.get(key) or usual) for key, usual in _GEMMA_SIZES.items()]
        stated_scale, taken = config.get("query_pre_attn_scalar", 256), _attention_scale(*sizes)
        if stated_scale != taken:
            return _(
                "query_pre_attn_scalar is {value}, and llama.cpp takes {other} in a Gemma 3 of these sizes",
                value=stated_scale,
                other=taken,
            )
    return ""


def require_writable(config: Mapping[str, Any]) -> Architecture:
    """The architecture, or NotQuantizable with the reason."""
    reason = unwritable(config)
    known = architecture_of(config)
    if reason or known is None:
        raise NotQuantizable(_("config.json: {reason}.", reason=reason), _("Choose another --scheme, or --format."))
    return known
