"""GGUF files that llama.cpp refuses or dies of, each broken in one place: name -> (the code that names it, what spoils
it). What llama.cpp does with each is asked in tests/clients/test_llama_cpp.py.
"""

import numpy as np

from doctor.checkpoint import gguf_writer as w

U64, F64 = 10, 12
w._LETTERS.update({U64: "Q", F64: "d"})  # types that doctor does not write
COUNT = 96  # tokens of the tiny file
TEXTS = [f"t{i}" for i in range(COUNT)]


def key(name, value):
    """Set a metadata key; None takes it away."""

    def spoil(case):
        case.keys.pop(name, None)
        if value is not None:
            case.keys[name] = value

    return spoil


def tensor(name, *shape):
    """Add a tensor of ones, or replace it."""
    return lambda case: case.values.update({name: np.ones(shape, "<f4")})


def halved(name, size):
    """Store a vector in float16."""

    def spoil(case):
        case.values.setdefault(name, np.zeros(size, "<f4"))
        case.types[name] = ("F16", np.ones(size, "<f2").tobytes())

    return spoil


def both(*spoilers):
    return lambda case: [spoil(case) for spoil in spoilers]


BROKEN = {
    "pre-tokenizer of no version": ("F076", key("tokenizer.ggml.pre", w.text("my-own"))),
    "tokenizer of no version": ("F076", key("tokenizer.ggml.model", w.text("tiktoken"))),
    "pre-tokenizer as a number": ("F077", key("tokenizer.ggml.pre", w.u32(3))),
    "no tokens and no size": (
        "F073",
        both(
            key("tokenizer.ggml.model", w.text("none")),
            key("tokenizer.ggml.tokens", None),
            key("llama.vocab_size", None),
        ),
    ),
    "few rotary factors": ("F074", tensor("rope_freqs.weight", 4)),
    "many rotary factors": ("F074", tensor("rope_freqs.weight", 16)),
    "few factors for long texts": ("F074", tensor("rope_factors_long.weight", 4)),
    "one text twice": ("O643", key("tokenizer.ggml.tokens", w.texts([*TEXTS[:-1], "t0"]))),
    "one text for all": ("O643", key("tokenizer.ggml.tokens", w.texts(["a"] * COUNT))),
    "epsilon NaN": ("F073", key("llama.attention.layer_norm_rms_epsilon", w.f32(float("nan")))),
    "epsilon negative": ("F073", key("llama.attention.layer_norm_rms_epsilon", w.f32(-1e-5))),
    "epsilon in f64": ("F077", key("llama.attention.layer_norm_rms_epsilon", w.Value(F64, 1e-5))),
    "rotary base in u32": ("F077", key("llama.rope.freq_base", w.u32(10000))),
    "layers in u64": ("F077", key("llama.block_count", w.Value(U64, 1))),
    "heads in i32": ("F077", key("llama.attention.head_count", w.Value(w.I32, 4))),
    "heads of two layers": ("F077", key("llama.attention.head_count", w.i32s([4, 4]))),
    "no key heads": ("F073", key("llama.attention.head_count_kv", w.u32(0))),
    "end of text in i32": ("F077", key("tokenizer.ggml.eos_token_id", w.Value(w.I32, 1))),
    "a flag as text": ("F077", key("tokenizer.ggml.add_bos_token", w.text("true"))),
    "types of tokens in f32": ("F077", key("tokenizer.ggml.token_type", w.f32s([1.0] * COUNT))),
    "scores as text": ("F077", key("tokenizer.ggml.scores", w.texts(["1"] * COUNT))),
    "a shard count in u32": ("F077", both(key("split.count", w.u32(2)), key("split.no", w.u32(0)))),
    "experts of which none is used": ("F073", key("llama.expert_count", w.u32(4))),
    "a tensor beside the model": ("F074", tensor("foo.weight", 8)),
    "a tensor of no layer": ("F074", tensor("blk.0.mystery.weight", 8)),
    "a rotary buffer": ("F074", tensor("blk.0.attn_rot_embd.weight", 8)),
    "norms of heads": ("F074", tensor("blk.0.attn_q_norm.weight", 16)),
    "a bias of a norm": ("F074", tensor("output_norm.bias", 64)),
    "a head with fewer rows": ("O643", tensor("output.weight", 95, 64)),
    "a short bias": ("F074", tensor("blk.0.attn_q.bias", 60)),
    "a norm in float16": ("O641", halved("blk.0.attn_norm.weight", 64)),
    "a bias in float16": ("O641", halved("blk.0.attn_q.bias", 64)),
}
# Rotations that make every activation NaN: loaded, and of no use.
NAN = {f"rotary base {base}": ("F073", key("llama.rope.freq_base", w.f32(base))) for base in (0.0, -1.0)}
# What llama.cpp loads and computes.
SOUND = {
    "a bias of an MLP": tensor("blk.0.ffn_up.bias", 128),
    "a factor beside a weight": tensor("blk.0.attn_q.scale", 1),
    "rotary factors in one row": tensor("rope_freqs.weight", 1, 8),
    "heads of each layer": key("llama.attention.head_count", w.i32s([4])),
    "no types of tokens": key("tokenizer.ggml.token_type", None),
    "tokens without a text": key("tokenizer.ggml.tokens", w.texts([*TEXTS[:-2], "", ""])),
    "an id of padding past the end": key("tokenizer.ggml.padding_token_id", w.u32(5000)),
    "epsilon zero": key("llama.attention.layer_norm_rms_epsilon", w.f32(0.0)),
}
