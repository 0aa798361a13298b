"""Cache sizes from config dicts: the figures that the field reports, and every kind of layer."""

import pytest

from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.evaluate.kvcache.layer_sizes import read_cache_layout
from doctor.evaluate.kvcache.layout import GIB, KIB
from doctor.evaluate.kvcache.schemes import SCHEMES, custom
from doctor.model.spec import build_spec

BY_NAME = {s.name: s for s in SCHEMES}


def config(kind, layers, heads, kv=None, dim=128, **more):
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * dim,
        "intermediate_size": 2 * heads * dim,
        "vocab_size": 1000,
        **({"num_key_value_heads": kv} if kv else {}),
        **more,
    }


QWEN2_7B = config("qwen2", 28, 28, 4)
LLAMA3_8B = config("llama", 32, 32, 8)
LLAMA2_7B = config("llama", 32, 32)
QWEN2_72B = config("qwen2", 80, 64, 8)
QWEN15_14B = config("qwen2", 40, 40, 40)
QWEN15_72B = config("qwen2", 80, 64, 64)


def layout(document):
    return read_cache_layout(build_spec(document, {}))


def kib(document, scheme="FP16"):
    return layout(document).bytes_per_token(BY_NAME[scheme]) / KIB


# The KiB per token that users reported for these models, and the other widths worked out from them.
@pytest.mark.parametrize(
    "document, figures",
    [
        (QWEN2_7B, (56, 28, 29.75, 22.75, 15.75)),
        (LLAMA3_8B, (128, 64, 68, 52, 36)),
        (LLAMA2_7B, (512, 256, 272, 208, 144)),
        (QWEN2_72B, (320, 160, 170, 130, 90)),
        (QWEN15_14B, (800, 400, 425, 325, 225)),
        (QWEN15_72B, (2560, 1280, 1360, 1040, 720)),
        (config("gemma", 28, 16, 16, 256), (448, 224, 238, 182, 126)),
        (config("llama", 30, 9, 3, 64), (22.5, 11.25, 11.953125, 9.140625, 6.328125)),
    ],
    ids=lambda v: "" if isinstance(v, dict) else str(v[0]),
)
def test_reported_figures_come_out_exactly(document, figures):
    assert tuple(kib(document, s.name) for s in SCHEMES) == figures


def test_qwen2_at_q6_takes_36_8_percent_less_than_llama3_at_q4():
    assert round(100 * (1 - kib(QWEN2_7B, "Q6") / kib(LLAMA3_8B, "Q4")), 1) == 36.8


def test_total_is_batch_times_context():
    assert layout(LLAMA3_8B).total_bytes(BY_NAME["FP16"], 8192, 2) == 2 * GIB


def test_keys_and_values_have_widths_of_their_own():
    shape = layout(LLAMA3_8B)
    assert shape.bytes_per_token(custom(8, 4)) == shape.bytes_per_token(BY_NAME["Q6"])
    assert shape.bytes_per_token(custom(16, 2)) / KIB == 64 + 64 * 2.5 / 16
    with pytest.raises(DoctorError, match="--k-bits 9: must be 2 to 8, or 16"):
        custom(9, 4)


def test_latent_attention_keeps_one_vector_a_token():
    v3 = config(
        "deepseek_v3",
        61,
        128,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        q_lora_rank=1536,
    )
    found = layout(v3)
    assert found.bytes_per_token(BY_NAME["FP16"]) == 61 * 576 * 2 == 70272
    assert {x.keys + x.values for x in found.expanded} == {128 * (192 + 128)} and "full heads" in found.notes[0]


def test_a_window_keeps_its_tokens_and_no_more():
    mistral = config("mistral", 32, 32, 8, sliding_window=4096)
    shape, fp16 = layout(mistral), BY_NAME["FP16"]
    assert shape.bytes_per_token(fp16) == 128 * KIB and shape.bytes_per_token(fp16, 4096) == 0
    assert shape.total_bytes(fp16, 32768) == shape.total_bytes(fp16, 4096) == GIB / 2
    assert layout({**mistral, "sliding_window": None}).total_bytes(fp16, 32768) == 4 * GIB


def test_a_window_that_is_switched_off_is_none():
    """Qwen2's files state sliding_window 131072 with use_sliding_window false."""
    assert layout({**QWEN2_7B, "sliding_window": 131072, "use_sliding_window": False}).windows == []


def test_layer_types_are_taken_from_the_file_before_the_class():
    gemma = config("gemma3_text", 12, 8, 4, 256, sliding_window=512)
    kinds = [x.kind for x in layout(gemma).layers]
    assert kinds.count("full") == 2 and kinds[5] == kinds[11] == "full", "the class's pattern: every sixth"
    stated = {**gemma, "layer_types": ["full_attention"] * 6 + ["sliding_attention"] * 6}
    assert [x.kind for x in layout(stated).layers] == ["full"] * 6 + ["sliding"] * 6


def test_linear_attention_keeps_a_state_of_constant_size():
    qwen = config(
        "qwen3_next",
        8,
        16,
        2,
        256,
        linear_num_value_heads=32,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
    )
    shape = layout(qwen)
    assert [x.kind for x in shape.layers] == ["state", "state", "state", "full"] * 2
    assert shape.layers[0].state_bytes == 4 * 32 * 128 * 128 + 2 * (2 * 16 * 128 + 32 * 128) * 3
    fp16 = BY_NAME["FP16"]
    assert shape.bytes_per_token(fp16) == 2 * 2 * 2 * 256 * 2
    assert shape.total_bytes(fp16, 0) == 6 * shape.layers[0].state_bytes


def test_state_space_layers_beside_attention():
    bamba = config(
        "bamba",
        4,
        32,
        8,
        attn_layer_indices=[3],
        mamba_n_heads=128,
        mamba_d_head=64,
        mamba_d_state=256,
        mamba_n_groups=1,
        mamba_d_conv=4,
    )
    shape = layout(bamba)
    assert [x.kind for x in shape.layers] == ["state", "state", "state", "full"]
    assert shape.layers[0].state_bytes == 4 * 8192 * 256 + 2 * (8192 + 512) * 3


def test_infinity_as_transformers_spells_it_is_no_unreadable_config():
    spelled = config("bamba", 4, 32, 8, attn_layer_indices=[3], time_step_limit=[0.0, {"__float__": "Infinity"}])
    shape = layout(spelled)
    assert not shape.notes
    assert [x.kind for x in shape.layers] == ["state", "state", "state", "full"]


def test_shared_caches_and_other_heads_in_full_layers():
    gemma4 = config(
        "gemma4_text",
        12,
        8,
        4,
        256,
        sliding_window=512,
        global_head_dim=512,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
    )
    shape = layout(gemma4)
    full, window = (next(x for x in shape.layers if x.kind == k) for k in ("full", "sliding"))
    assert (window.keys, window.window) == (4 * 256, 512)
    assert (full.keys, full.values) == (2 * 512, 2 * 512), "key and value share a matrix; after RoPE both are kept"
    shared = layout({**gemma4, "num_kv_shared_layers": 6})
    assert [x.kind for x in shared.layers[6:]] == ["none"] * 6


@pytest.mark.parametrize("more, heads", [({"multi_query": True}, 1), ({"attn_config": {"kv_n_heads": 8}}, 8)])
def test_other_ways_to_state_few_key_heads(more, heads):
    assert layout(config("custom_model", 2, 32, **more)).layers[0].keys == heads * 128


def test_a_model_type_that_no_library_knows_is_read_from_its_keys():
    shape = layout(
        config(
            "my_model",
            4,
            8,
            2,
            layer_types=["full_attention", "sliding_attention", "something_new", "mamba"],
            sliding_window=64,
        )
    )
    assert [x.kind for x in shape.layers] == ["full", "sliding", "full", "state"]
    assert any("'something_new' is not known here" in n for n in shape.notes) and any(
        "not counted" in n for n in shape.notes
    )


def test_largest_context_fits_and_one_token_more_does_not():
    fp16 = BY_NAME["FP16"]
    for document in (LLAMA3_8B, config("gemma3_text", 12, 8, 4, 256, sliding_window=512)):
        shape = layout(document)
        for room in (3e6, 5e7, 3e9):
            n = shape.largest_context(fp16, room, 2)
            assert shape.total_bytes(fp16, n, 2) <= room < shape.total_bytes(fp16, n + 1, 2)
    assert layout(LLAMA3_8B).largest_context(fp16, -1.0) == 0
    assert layout(config("mistral", 32, 32, 8, sliding_window=4096)).largest_context(fp16, GIB) is None


def test_sizes_that_are_not_stated_are_named():
    with pytest.raises(BadCheckpoint, match="the number of layers is not stated"):
        layout({"model_type": "my_model", "hidden_size": 64})
    with pytest.raises(BadCheckpoint, match="the size of a key is not stated"):
        layout({"model_type": "my_model", "num_hidden_layers": 2})


def test_a_model_without_attention_has_a_state_and_no_cache():
    shape = layout(
        {
            "model_type": "mamba",
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "state_size": 16,
            "expand": 2,
            "conv_kernel": 4,
        }
    )
    assert {(x.kind, x.state_bytes) for x in shape.layers} == {("state", 4 * 128 * 16 + 2 * 128 * 3)}
    assert shape.largest_context(BY_NAME["FP16"], GIB) is None
