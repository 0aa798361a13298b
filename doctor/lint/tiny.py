"""The smallest healthy checkpoints, in memory: what examples in rule files and tests begin with.

`tiny()` is healthy under every rule for its own recipe. A rule's `bad()` breaks one thing and returns the case.
`use_family` sets the family, so that one example plants its defect in several families.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doctor.checkpoint.codecs import to_bf16
from doctor.checkpoint.dtypes import CODE_NUMPY, DTYPES
from doctor.checkpoint.header_text import header_bytes
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.lazy_numpy import np
from doctor.core.recipe import Recipe
from doctor.core.tables import family as family_table
from doctor.formats.registry import KNOWN
from doctor.model.expressions import evaluate
from doctor.model.spec import ModelSpec, build_spec
from doctor.model.templates import condition, exists

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 128, 4, 2, 16, 96, 2
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "qwen2_moe", "phi3", "opt")
# Sizes of latent and linear attention and of state spaces, for the families whose shapes are made of them.
_OWN_SIZES = {
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_dt_rank": 8,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
}
_family: ContextVar[str | None] = ContextVar("family", default=None)


class NotHere(Exception):
    """The example of a rule cannot exist in the current family; the text says why."""


@contextlib.contextmanager
def use_family(name: str) -> Iterator[None]:
    """Inside this context `tiny()` builds this family."""
    token = _family.set(name)
    try:
        yield
    finally:
        _family.reset(token)


def only_in(*families: str, why: str) -> str:
    """The current family if it is one of these, the first of these if none is set. Raises NotHere with `why` for
    others.
    """
    family = _family.get() or families[0]
    if family not in families:
        raise NotHere(why)
    return family


def never_in(*families: str, why: str) -> str:
    """The current family. Raises NotHere with `why` if it is one of these."""
    family = _family.get() or "llama"
    if family in families:
        raise NotHere(why)
    return family


@dataclass
class Case:
    """One checkpoint in memory. tensors: name -> raw codes; dtypes: name -> safetensors dtype; facts: (subject, name)
    -> value.
    """

    family: str
    tensors: dict[str, np.ndarray]
    dtypes: dict[str, str]
    json: dict[str, dict]
    recipe: Recipe = field(default_factory=lambda: Recipe(group_size=32))
    shards: int = 1
    facts: dict[tuple[str, str], object] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # written last, over anything of the same name
    damage: list = field(default_factory=list)  # callables(directory), run after everything is written

    @property
    def config(self) -> dict:
        return self.json["config.json"]

    @property
    def spec(self) -> ModelSpec:
        """ModelSpec of the config and the tensors as they are now."""
        return build_spec(self.config, self.infos())

    @property
    def head(self) -> str:
        """Tensor name of the output head, whether it is stored or not."""
        return family_table(self.family)["lm_head"] + ".weight"

    def name(self, role: str, layer: int = 0) -> str:
        """Tensor name of the first linear of a role ("down", "k", …) in a decoder layer of this family."""
        found = [x.tensor for x in self.spec.linears if x.role == role and x.block == layer]
        if not found:
            raise KeyError(f"{self.family} has no linear of role {role!r}")
        return found[0]

    def down(self, layer: int = 0) -> np.ndarray:
        """Codes of a linear that every family has: the MLP's down projection, [hidden, intermediate]."""
        return self.tensors[self.name("down", layer)]

    def packed(self, role: str, layer: int = 0) -> str:
        """Module name of the first packed linear of a role in a decoder layer, for cases of `tiny_gptq`."""
        name = tiny(self.family).name(role, layer).removesuffix(".weight")
        if f"{name}.qweight" not in self.tensors:
            raise KeyError(f"{name} is not packed in this case")
        return name

    def put(self, subject: str, name: str, value: object) -> None:
        """Add a fact that a calibration, a run or a comparison would have produced."""
        self.facts[subject, name] = value

    def infos(self) -> dict[str, TensorInfo]:
        """TensorInfo of every tensor, as the header will say."""
        return {
            n: TensorInfo(n, DTYPES[self.dtypes[n]], a.shape, "model.safetensors", 0, a.nbytes)
            for n, a in self.tensors.items()
        }

    def write(self, folder: Path) -> Path:
        """Write the checkpoint into an existing or new directory and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(self.tensors)
        if self.shards == 1:
            (folder / "model.safetensors").write_bytes(shard_bytes({n: self.tensors[n] for n in names}, self.dtypes))
        else:
            weight_map = {}
            for i in range(self.shards):
                part = names[i :: self.shards]
                file = f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors"
                (folder / file).write_bytes(shard_bytes({n: self.tensors[n] for n in part}, self.dtypes))
                weight_map.update({n: file for n in part})
            total = sum(a.nbytes for a in self.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name, document in self.json.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        for spoil in self.damage:
            spoil(folder)
        return folder


def shard_bytes(tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> bytes:
    """A safetensors file: header padded to 8 bytes, then the tensors' codes in the order given."""
    header = header_bytes((name, dtypes[name], codes.shape, codes.nbytes) for name, codes in tensors.items())
    return header + b"".join(np.ascontiguousarray(codes).tobytes() for codes in tensors.values())


def tiny(family: str | None = None, dtype: str = "BF16", mlp: int | None = None, hidden: int = HIDDEN) -> Case:
    """A healthy checkpoint of two decoder layers: hidden 64, intermediate 128, 4 heads of 16 (2 for keys), vocabulary
    96.

    mlp: another width for all its MLPs, experts included. hidden: another hidden_size, for families that state a head's
    size too.
    """
    family = family or _family.get() or "llama"
    entry = family_table(family)
    config = _config(family, entry, mlp, hidden)
    rng = np.random.default_rng(7)
    tensors, dtypes = {}, {}
    for name, shape in _shapes(family, entry, config):
        tensors[name] = _values(rng, name, shape, dtype, entry)
        dtypes[name] = dtype
    return Case(family, tensors, dtypes, {"config.json": config, **_tokenizer_files(config)})


def _config(family: str, entry: dict, mlp: int | None, hidden: int = HIDDEN) -> dict:
    generic = {
        "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": HIDDEN,
        "shared_expert_intermediate_size": HIDDEN,
    }
    if mlp is not None:
        generic |= dict.fromkeys((k for k in generic if "intermediate" in k), mlp)
    keys = entry["config_keys"]
    config: dict[str, Any] = {"architectures": [entry["architecture"]], "model_type": entry["model_type"]}
    for name, value in generic.items():
        key = keys.get(name)
        if isinstance(key, str) and key.isidentifier():
            config[key] = value
    used = " ".join(e for item in entry["tensor"] for e in item["shape"])
    config |= {name: size for name, size in _OWN_SIZES.items() if name in used}
    if "norm_eps" in keys and isinstance(keys["norm_eps"], str):
        config[keys["norm_eps"]] = 1e-6
    if "num_key_value_heads" in config:
        config["head_dim"] = HEAD_DIM
    if family == "opt":
        config["word_embed_proj_dim"] = HIDDEN
    config |= {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": entry["tie_word_embeddings"],
        "torch_dtype": "bfloat16",
    }
    return config


def _shapes(family: str, entry: dict, config: dict):
    spec = build_spec(config, {})
    for item in sorted(entry["tensor"], key=lambda t: t["name"]):
        tied_head = item["name"].startswith("lm_head") and config["tie_word_embeddings"]
        if tied_head or not exists(condition(item), entry["defaults"] | config):
            continue
        shape = tuple(evaluate(e, spec.lookup) for e in item["shape"])
        for i in range(LAYERS) if "{i}" in item["name"] else [None]:
            if i is not None and spec.in_layer(item.get("layers"), i) is False:
                continue
            for e in range(spec.lookup("num_experts") or 0) if "{e}" in item["name"] else [None]:
                name = item["name"].replace("{i}", str(i)).replace("{e}", str(e))
                yield name, shape
                if item.get("bias") is True:
                    out = shape[-1] if item.get("transposed") else shape[0]
                    if len(shape) == 3:  # a stack of experts [experts, in, out] has one bias each
                        yield f"{name}_bias", (shape[0], shape[-1])
                    else:
                        yield name.replace(".weight", ".bias"), (out,)
    if family == "opt":
        for i in range(LAYERS):
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                yield f"model.decoder.layers.{i}.{norm}.bias", (HIDDEN,)
        yield "model.decoder.final_layer_norm.bias", (HIDDEN,)


def _values(rng, name: str, shape: tuple[int, ...], dtype: str, entry: dict) -> np.ndarray:
    if "norm" in name and name.endswith("weight"):
        plus_one = entry["norm"].startswith("(1 +")
        values = rng.normal(0.0 if plus_one else 1.0, 0.05, shape)
    elif name.endswith("bias"):
        values = rng.normal(0, 0.1, shape)
    else:
        values = rng.normal(0, 0.08, shape)
    return encode(values, dtype)


def encode(values: np.ndarray | Sequence, dtype: str) -> np.ndarray:
    """Raw codes of float values in a safetensors dtype (BF16, F16, F32, F64)."""
    if dtype == "BF16":
        return to_bf16(np.asarray(values, np.float32))
    if dtype == "F16":
        return np.asarray(values, np.float16).view(np.uint16)
    return np.asarray(values, CODE_NUMPY[dtype])


def _tokenizer_files(config: dict) -> dict[str, dict]:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(0x21 + i): 3 + i for i in range(VOCAB - 3)}
    added = [
        {
            "id": i,
            "content": t,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for t, i in list(vocabulary.items())[:3]
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return {
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **names},
    }


def tiny_gptq(family: str | None = None, version: str = "gptq") -> Case:
    """The same checkpoint quantized to 4 bits: groups of 32, symmetric, groups in place, float16 scales.

    The codes are drawn anew and decode to weights of the same spread; no rule compares them with the original.
    """
    case = tiny(family)
    spec = build_spec(case.config, case.infos())
    rng = np.random.default_rng(11)
    bits, group = 4, 32
    zero = KNOWN[version].zero_word(bits)
    for linear in spec.linears:
        del case.tensors[linear.tensor], case.dtypes[linear.tensor]
        width, height = linear.in_features, linear.out_features
        groups = width // group
        parts = {
            "qweight": (rng.integers(0, 1 << 32, (width * bits // 32, height), np.uint32).view(np.int32), "I32"),
            "qzeros": (np.full((groups, height * bits // 32), zero, np.uint32).view(np.int32), "I32"),
            "scales": (encode(rng.uniform(0.01, 0.03, (groups, height)), "F16"), "F16"),
            "g_idx": (np.arange(width, dtype=np.int32) // group, "I32"),
        }
        for tail, (codes, dtype) in parts.items():
            case.tensors[f"{linear.name}.{tail}"], case.dtypes[f"{linear.name}.{tail}"] = codes, dtype
    case.config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": version,
        "lm_head": False,
    }
    return case


def tiny_packed(layout: str = "pack-quantized", targets: Sequence[str] = ("Linear",)) -> Case:
    """tiny() with every linear in words of compressed-tensors: 4-bit integers in groups of 32, or NVFP4 without
    activations.
    """
    case, rng, floats = tiny(), np.random.default_rng(3), layout.startswith("nvfp4")
    for linear in case.spec.linears:
        n, k = case.tensors.pop(linear.tensor).shape
        case.dtypes.pop(linear.tensor)
        if floats:
            parts = {
                "weight_packed": (rng.integers(0, 256, (n, k // 2), np.uint8), "U8"),
                "weight_scale": (rng.integers(0x30, 0x7F, (n, k // 16), np.uint8), "F8_E4M3"),
                "weight_global_scale": (np.array([2688.0], np.float32), "F32"),
            }
        else:
            words = rng.integers(-(1 << 31), 1 << 31, (n, k // 8), np.int64)
            parts = {
                "weight_packed": (words.astype(np.int32), "I32"),
                "weight_scale": (encode(np.full((n, k // 32), 0.01), "F16"), "F16"),
                "weight_shape": (np.array([n, k], np.int64), "I64"),
            }
        for part, (values, dtype) in parts.items():
            case.tensors[f"{linear.name}.{part}"], case.dtypes[f"{linear.name}.{part}"] = values, dtype
    weights = {"num_bits": 4, "type": "float" if floats else "int", "symmetric": True}
    weights |= {"strategy": "tensor_group", "group_size": 16} if floats else {"strategy": "group", "group_size": 32}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": list(targets), "weights": weights}},
    }
    return case
