"""The end of a run that writes GGUF: its parts become one file, tensor by tensor.

Linears were packed layer by layer. The embedding and the output head are rounded here, in runs of rows, since no
calibration reaches them; norms and biases are stored in float32, as llama.cpp's converter does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from doctor.checkpoint import gguf_writer as w
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.ggml_types import BY_NAME, FILE_TYPES, GgmlType
from doctor.checkpoint.gguf_writer import Planned, Value
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo, open_shard
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.formats.gguf import blocks_of
from doctor.model.gguf_names import (
    ROPE_FREQS,
    Architecture,
    permuted_rows,
    require_writable,
    rope_of,
)
from doctor.model.gguf_rope import rope_factors
from doctor.model.gguf_tokenizer import Encode, tokenizer_metadata
from doctor.quant.block_change import NewValue
from doctor.quant.dequantize import to_torch
from doctor.quant.solve.ggml import round_blocks

_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # what llama.cpp's converter leaves in float32
NewValues = Mapping[str, NewValue]
IMPORTANCE = "importance"  # the part of a linear that holds diag(H) / 2, for --imatrix
GEMMA_WINDOW = 4096  # where config.json does not say, transformers takes this
_ROWS_BYTES = 64 << 20  # of float32 rows that are rounded at once


@dataclass(frozen=True)
class _Stored:
    """One tensor of a part. value: what stands in its place, or becomes of it; None for what the part holds."""

    info: TensorInfo
    file: Path
    value: NewValue | None = None

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Leading rows [begin, end)."""
        if isinstance(self.value, torch.Tensor):
            return self.value[begin:end] if self.info.shape else self.value
        shape = (end - begin, *self.info.shape[1:])
        size = self.info.nbytes // max(self.info.shape[0], 1)
        raw = np.empty((end - begin) * size, np.uint8)
        reader = ShardFile(self.file, self.file.name)
        try:
            reader.read_into(self.info.begin + begin * size, raw.data)
        finally:
            reader.close()
        values = to_torch(raw, self.info.dtype.name).reshape(shape)
        return values if self.value is None else self.value.of(values, begin)

    def whole(self) -> torch.Tensor:
        """The tensor."""
        return self.rows(0, self.info.shape[0]) if self.info.shape else self.rows(0, 1)


def file_name(recipe: Recipe) -> str:
    """Of the output: model-Q4_K_M.gguf."""
    return f"model-{mixture(recipe)}.gguf"


def mixture(recipe: Recipe) -> str:
    """What llama.cpp calls the mixture of types that the recipe asks for."""
    return blocks_of(recipe).mixtures[recipe.bits]


def write_model(
    stage: Path,
    parts: list[Path],
    checkpoint: Checkpoint,
    recipe: Recipe,
    encode: Encode,
    values: NewValues = MappingProxyType({}),
) -> Path:
    """One GGUF file in `stage`, of the parts of a finished run. values: of tensors that differ from what they hold."""
    config = checkpoint.value("config.json") or {}
    known = require_writable(config)
    stored = _stored(parts, values)
    planned = _planned(stored, known, config, recipe)
    embedding = next(p for p in planned if p.name == "token_embd.weight")
    metadata = {
        **model_metadata(config, known, recipe),
        **tokenizer_metadata(checkpoint, embedding.shape[0], encode),
    }
    path = stage / file_name(recipe)
    with open(path, "wb") as file:
        w.write_header(file, metadata, planned)
        for plan in planned:
            w.write_data(file, plan, _chunks(plan, stored, known, config))
    return path


def write_imatrix(path: Path, parts: list[Path], config: Mapping[str, Any], tokens: int, source: str) -> None:
    """diag(H) / 2 of every linear as llama-quantize reads it (--imatrix)."""
    known = require_writable(config)
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, entry in _stored(parts).items():
        module, _dot, part = name.rpartition(".")
        if part == IMPORTANCE:
            target = known.gguf_name(f"{module}.weight") or module
            found.setdefault(target, {})[known.expert_of(module + ".") or 0] = entry.whole()
    planned, values = [], {}
    for name in sorted(found):
        rows = torch.stack([found[name][i] for i in sorted(found[name])])
        seen = (
            (rows > 0).any(1, keepdim=True).float()
        )  # an expert that no token reached: llama-quantize weighs it evenly
        for tail, value in (("in_sum2", rows), ("counts", seen)):
            planned.append(Planned(f"{name}.{tail}", tuple(value.shape), BY_NAME["F32"]))
            values[planned[-1].name] = value.contiguous()
    metadata = {
        "general.type": w.text("imatrix"),
        "imatrix.datasets": w.texts([source]),
        "imatrix.chunk_count": w.u32(1),
        "imatrix.chunk_size": w.u32(max(tokens, 1)),
    }
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        w.write_header(file, metadata, planned)
        for plan in planned:
            w.write_data(file, plan, [values[plan.name].numpy().tobytes()])
    beside.rename(path)


def _stored(parts: list[Path], values: NewValues = MappingProxyType({})) -> dict[str, _Stored]:
    shards: list[tuple[Path, Shard]] = [(path, open_shard(path, path.name)) for path in parts]
    return {info.name: _Stored(info, path, values.get(info.name)) for path, shard in shards for info in shard.tensors}


def source_of(name: str) -> tuple[str, GgmlType | None]:
    """(transformers' name of the tensor, its type where it is in blocks) of a part's tensor."""
    module, _dot, part = name.rpartition(".")
    return (f"{module}.weight", BY_NAME[part]) if part in BY_NAME else (name, None)


def _planned(
    stored: Mapping[str, _Stored], known: Architecture, config: Mapping[str, Any], recipe: Recipe
) -> list[Planned]:
    """Every tensor of the file, in llama.cpp's order."""
    form, found = blocks_of(recipe), []
    stacks: dict[str, dict[int, tuple[tuple[int, ...], GgmlType]]] = {}
    tied = "lm_head.weight" not in stored
    for name, entry in stored.items():
        source, packed = source_of(name)
        if name.endswith(f".{IMPORTANCE}") or (source.startswith("lm_head") and config.get("tie_word_embeddings")):
            continue
        target, shape = known.gguf_name(source), tuple(entry.info.shape)
        if target is None:
            raise NotQuantizable(
                _("{name}: has no place in GGUF's {architecture}.", name=source, architecture=known.name),
                _("Choose another --scheme."),
            )
        if packed is not None:
            kind = packed
            shape = (shape[0], shape[1] // kind.nbytes * kind.block)
        elif target.endswith(_ROUTERS):
            kind, shape = BY_NAME["F32"], shape[1:] if shape[0] == 1 else shape
        elif target in ("token_embd.weight", "output.weight"):
            kind = form.outer_type(target, recipe.bits, shape[1], tied or bool(config.get("tie_word_embeddings")))
            if shape[1] % kind.block:
                kind = BY_NAME["F16"]
        elif len(shape) < 2:
            kind = BY_NAME["F32"]
        else:
            kind = BY_NAME[entry.info.dtype.name if entry.info.dtype.name in ("F16", "BF16") else "F32"]
        expert = known.expert_of(source)
        if expert is None:
            found.append(Planned(target, shape, kind))
        else:
            stacks.setdefault(target, {})[expert] = shape, kind
    found += [_stack(target, parts) for target, parts in stacks.items()]
    _theta, scaling = rope_of(config)
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        found.append(Planned(ROPE_FREQS, (_head_dim(config) // 2,), BY_NAME["F32"]))
    return sorted(found, key=_place)


def _stack(target: str, parts: Mapping[int, tuple[tuple[int, ...], GgmlType]]) -> Planned:
    """The tensor of all experts. Raises NotQuantizable where they do not have one shape and one type."""
    shape, kind = parts[min(parts)]
    other = next((i for i in range(len(parts)) if parts.get(i) != (shape, kind)), None)
    if other is not None:
        raise NotQuantizable(
            _(
                "{tensor}: expert {i} is {found}, the first {kind} {shape}; the experts of a layer are one tensor.",
                tensor=target,
                i=other,
                found=f"{parts[other][1].name} {list(parts[other][0])}" if other in parts else _("absent"),
                kind=kind.name,
                shape=list(shape),
            ),
            _("Keep all experts of a layer in 16 bits, or none."),
        )
    return Planned(target, (len(parts), *shape), kind)


def _place(tensor: Planned) -> tuple[int, str]:
    """Embedding, layers, final norm, head."""
    if tensor.name.startswith("blk."):
        return int(tensor.name.split(".")[1]), tensor.name
    return (-1 if tensor.name in ("token_embd.weight", ROPE_FREQS) else 1 << 30), tensor.name


def _chunks(
    plan: Planned, stored: Mapping[str, _Stored], known: Architecture, config: Mapping[str, Any]
) -> Iterator[bytes]:
    """The bytes of one tensor."""
    if plan.name == ROPE_FREQS:
        theta, scaling = rope_of(config)
        yield np.array(rope_factors(scaling, theta, _head_dim(config)), "<f4").tobytes()
        return
    experts = plan.shape[0] if len(plan.shape) == 3 else 0
    if experts:
        for name in known.names_of(plan.name, experts):
            entry, module = stored.get(name), name.rpartition(".")[0]
            packed = stored.get(f"{module}.{plan.type.name}")
            if packed is not None:
                yield packed.whole().contiguous().numpy().tobytes()
            elif entry is not None:
                yield _as_type(entry.whole().to(torch.float32), plan)
        return
    source = known.name_of(plan.name)
    assert source is not None  # _planned() made the name from one
    module = source.rpartition(".")[0]
    packed = stored.get(f"{module}.{plan.type.name}") if source.endswith(".weight") else None
    heads = known.heads_of(
        source, config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    )
    if packed is not None:
        words = packed.whole()
        yield (permuted_rows(words, heads) if heads else words).contiguous().numpy().tobytes()
        return
    entry = stored[source]
    if heads or len(plan.shape) < 2:
        rows = entry.whole().to(torch.float32)
        yield _as_type(permuted_rows(rows, heads) if heads else rows + known.shift_of(source), plan)
        return
    step = max(_ROWS_BYTES // (4 * plan.shape[-1]), 1)
    for begin in range(0, plan.shape[0], step):
        yield _as_type(entry.rows(begin, min(begin + step, plan.shape[0])).to(torch.float32), plan)


def _as_type(values: torch.Tensor, plan: Planned) -> bytes:
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(plan.type.name)
    if plain is not None:
        return values.to(plain).contiguous().view(torch.uint8).numpy().tobytes()
    return round_blocks(values.contiguous(), plan.type).numpy().tobytes()


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def model_metadata(config: Mapping[str, Any], known: Architecture, recipe: Recipe) -> dict[str, Value]:
    """general.* and the architecture's own keys, of config.json."""
    name = mixture(recipe)
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    theta, scaling = rope_of(config)
    own: dict[str, Value] = {
        "block_count": w.u32(config["num_hidden_layers"]),
        "context_length": w.u32(config["max_position_embeddings"]),
        "embedding_length": w.u32(config["hidden_size"]),
        "feed_forward_length": w.u32(config["intermediate_size"]),
        "attention.head_count": w.u32(heads),
        "attention.head_count_kv": w.u32(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": w.f32(config["rms_norm_eps"]),
        "attention.key_length": w.u32(head_dim),
        "attention.value_length": w.u32(head_dim),
        "rope.freq_base": w.f32(theta),
    }
    if known.rope_dimension:
        own["rope.dimension_count"] = w.u32(head_dim)
    if known.experts:
        own["expert_count"] = w.u32(config.get("num_experts") or config["num_local_experts"])
        own["expert_used_count"] = w.u32(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        own["expert_feed_forward_length"] = w.u32(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        own["expert_shared_feed_forward_length"] = w.u32(config["shared_expert_intermediate_size"])
    if known.name == "gemma3":
        own["attention.sliding_window"] = w.u32(config.get("sliding_window") or GEMMA_WINDOW)
        if config.get("final_logit_softcapping"):
            own["final_logit_softcapping"] = w.f32(config["final_logit_softcapping"])
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        own["rope.scaling.type"] = w.text(kind)
        own["rope.scaling.factor"] = w.f32(scaling["factor"])
        if kind == "yarn":
            context = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
            own["rope.scaling.original_context_length"] = w.u32(context)
    found = {
        "general.architecture": w.text(known.name),
        "general.type": w.text("model"),
        "general.name": w.text(str(config.get("_name_or_path") or known.transformers_class)),
        "general.file_type": w.u32(next(number for number, known_as in FILE_TYPES.items() if known_as == name)),
        "general.quantization_version": w.u32(2),
        "general.quantized_by": w.text("doctor"),
        **{f"{known.name}.{key}": value for key, value in own.items()},
        f"{known.name}.vocab_size": w.u32(config["vocab_size"]),
    }
    return found


def true_bits(planned: list[Planned]) -> float:
    """Bits a weight of a whole file."""
    return 8 * sum(p.nbytes for p in planned) / max(sum(math.prod(p.shape) for p in planned), 1)
