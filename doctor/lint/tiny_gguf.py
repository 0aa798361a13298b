"""The smallest healthy GGUF file, in memory: a llama of one layer, which an example spoils in one place."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

from doctor.checkpoint import gguf_writer as w
from doctor.checkpoint.ggml_types import BY_NAME
from doctor.checkpoint.gguf_writer import Planned, Value
from doctor.core.lazy_numpy import np
from doctor.lint.tiny import Case, only_in

HIDDEN, FFN, VOCAB = 64, 128, 96


def metadata(architecture: str = "llama", **changes: Value | None) -> dict[str, Value]:
    """What llama.cpp needs of a decoder. changes: keys with _ for a dot; None takes one away."""
    found = {
        "general.architecture": w.text(architecture),
        "general.name": w.text("tiny"),
        "general.file_type": w.u32(0),
        "general.quantization_version": w.u32(2),
        f"{architecture}.block_count": w.u32(1),
        f"{architecture}.context_length": w.u32(128),
        f"{architecture}.embedding_length": w.u32(HIDDEN),
        f"{architecture}.feed_forward_length": w.u32(FFN),
        f"{architecture}.attention.head_count": w.u32(4),
        f"{architecture}.attention.head_count_kv": w.u32(2),
        f"{architecture}.attention.layer_norm_rms_epsilon": w.f32(1e-5),
        f"{architecture}.rope.dimension_count": w.u32(16),
        f"{architecture}.rope.freq_base": w.f32(10000.0),
        f"{architecture}.vocab_size": w.u32(VOCAB),
        "tokenizer.ggml.model": w.text("gpt2"),
        "tokenizer.ggml.pre": w.text("smollm"),
        "tokenizer.ggml.tokens": w.texts([f"t{i}" for i in range(VOCAB)]),
        "tokenizer.ggml.token_type": w.i32s([1] * VOCAB),
        "tokenizer.ggml.merges": w.texts(["t 1"]),
        "tokenizer.ggml.bos_token_id": w.u32(0),
        "tokenizer.ggml.eos_token_id": w.u32(1),
    }
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del found[name]
        else:
            found[name] = value
    return found


def tensors(architecture: str = "llama") -> dict[str, np.ndarray]:
    """f32 tensors of that decoder, in PyTorch's shapes."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for name, shape in {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (32, HIDDEN),
        "attn_v": (32, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN),
        "ffn_up": (FFN, HIDDEN),
        "ffn_down": (HIDDEN, FFN),
    }.items():
        shapes[f"blk.0.{name}.weight"] = shape
    if architecture == "qwen3":
        shapes |= {f"blk.0.attn_{which}_norm.weight": (16,) for which in "qk"}
    return {name: (rng.standard_normal(shape) * 0.05).astype("<f4") for name, shape in shapes.items()}


def file_bytes(
    keys: dict[str, Value] | None = None,
    values: dict[str, np.ndarray] | None = None,
    types: dict[str, tuple[str, bytes]] | None = None,
) -> bytes:
    """A whole file. types: tensors that are stored otherwise, as (type, their bytes)."""
    keys, values, types = keys or metadata(), tensors() if values is None else values, types or {}
    planned = [Planned(n, v.shape, BY_NAME[types[n][0] if n in types else "F32"]) for n, v in values.items()]
    out = io.BytesIO()
    w.write_header(out, keys, planned)
    for plan in planned:
        data = types[plan.name][1] if plan.name in types else values[plan.name].tobytes()
        w.write_data(out, plan, [data])
    return out.getvalue()


@dataclass
class GgufCase(Case):
    """A GGUF file in memory. keys: its metadata; values: f32 tensors; types: tensors that are stored otherwise, as
    (type, bytes).
    """

    keys: dict[str, Value] = field(default_factory=metadata)
    values: dict[str, np.ndarray] = field(default_factory=tensors)
    types: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    name: str = "model.gguf"  # type: ignore[assignment] # of the file

    def write(self, folder: Path) -> Path:
        """Write the file into an existing or new directory, which is returned."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.name).write_bytes(file_bytes(self.keys, self.values, self.types))
        for spoil in self.damage:
            spoil(folder)
        return folder


def tiny_gguf() -> GgufCase:
    """A healthy GGUF file of the family in use."""
    family = only_in("llama", "qwen2", "qwen3", why="examples of GGUF are made of three architectures")
    return GgufCase(family, {}, {}, {}, keys=metadata(family), values=tensors(family))
