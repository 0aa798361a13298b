"""GGUF files that llama.cpp refuses, each broken in one place, and files as its converter writes them."""

import numpy as np
import pytest

from doctor.api import check
from doctor.lint.testing import tiny_gguf, use_family, w
from tests.helpers.broken_gguf import BROKEN, NAN, SOUND

UP, DOWN, EMBED = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight", "token_embd.weight"


def said(case, folder):
    report = check(case.write(folder), case.recipe)
    assert not report.crashed
    return [f"{f.code} {f.message}" for f in report.findings if f.severity == "error"]


@pytest.mark.parametrize(
    ("key", "value", "code", "words"),
    [
        ("llama.attention.head_count", w.u32(3), "F073", "rope.dimension_count is 16; must be 21, the size of a head"),
        ("llama.attention.head_count_kv", w.u32(4), "F074", "[32, 64], must be [64, 64]"),
        ("llama.rope.dimension_count", w.u32(32), "F073", "is 32; must be 16"),
        ("llama.feed_forward_length", w.u32(256), "F074", "3 tensors are of another shape"),
        ("llama.attention.layer_norm_rms_epsilon", None, "F073", "lacks llama.attention.layer_norm_rms_epsilon"),
        ("llama.rope.scaling.type", w.text("dynamic"), "F073", "must be one of none, linear, yarn"),
        ("tokenizer.ggml.merges", None, "F073", "lacks tokenizer.ggml.merges"),
        ("llama.attention.key_length", w.text("x"), "F073", "rope.dimension_count is 16; must be x"),
        ("llama.embedding_length", None, "F073", "lacks llama.embedding_length"),
        ("llama.embedding_length", w.text("64"), "F073", "llama.embedding_length"),
        ("tokenizer.ggml.tokens", w.i32s([7] * 96), "F077", "tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_llama_cpp_refuses_is_named(tmp_path, key, value, code, words):
    with use_family("llama"):
        case = tiny_gguf()
    case.keys.pop(key, None)
    if value is not None:
        case.keys[key] = value
    assert any(line.startswith(code) and words in line for line in said(case, tmp_path)), said(case, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            DOWN,
            np.transpose,
            "F074 model.gguf: 1 tensor is of another shape than by feed_forward_length",
        ),
        (EMBED, lambda x: np.vstack([x, x[:6]]), "O643 model.gguf: token_embd.weight has 102 rows for 96 tokens"),
        ("blk.1.ffn_up.weight", lambda x: x, "F074 model.gguf: 1 tensor is of a layer past its 1, blk.1.ffn_up.weight"),
        (
            "blk.0.attn_norm.weight",
            lambda x: x[:60],
            "F074 model.gguf: 1 tensor is of another shape than by embedding_length",
        ),
    ],
)
def test_tensors_that_llama_cpp_refuses_are_named(tmp_path, name, change, words):
    with use_family("llama"):
        case = tiny_gguf()
    case.values[name] = np.ascontiguousarray(change(case.values.get(name, case.values[UP])))
    [line] = said(case, tmp_path)
    assert line.startswith(words)


@pytest.mark.parametrize("key", ["llama.rope.dimension_count", "llama.rope.freq_base", "llama.vocab_size"])
def test_keys_that_llama_cpp_does_without_are_not_asked_for(tmp_path, key):
    with use_family("llama"):
        case = tiny_gguf()
    del case.keys[key]
    assert said(case, tmp_path) == []


def broken(spoil):
    with use_family("llama"):
        case = tiny_gguf()
    spoil(case)
    return case


@pytest.mark.parametrize("name", [*BROKEN, *NAN])
def test_what_ends_a_load_by_llama_cpp_is_one_error(tmp_path, name):
    code, spoil = (BROKEN | NAN)[name]
    case = broken(spoil)
    report = check(case.write(tmp_path), case.recipe)
    assert not report.crashed
    assert {f.code for f in report.findings if f.severity == "error" and not f.consequence_of} == {code}


@pytest.mark.parametrize("name", SOUND)
def test_what_llama_cpp_loads_is_no_error(tmp_path, name):
    assert said(broken(SOUND[name]), tmp_path) == []


def test_an_architecture_of_no_version_is_named(tmp_path):
    with use_family("llama"):
        case = tiny_gguf()
    case.keys = {k.replace("llama.", "nosuch.", 1): v for k, v in case.keys.items()}
    case.keys["general.architecture"] = w.text("nosuch")
    [line] = said(case, tmp_path)
    assert line.startswith("F076 model.gguf: general.architecture is 'nosuch'")
