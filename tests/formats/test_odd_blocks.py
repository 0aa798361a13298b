"""A quantization_config is a stranger's JSON: values of any type in any place are read as nothing, never a crash."""

import contextlib

import pytest

from doctor.core.errors import DoctorError
from doctor.core.facts import Unavailable
from doctor.formats.known import mlx_parts_missing
from doctor.formats.registry import KNOWN

ODD = (None, True, 7, 0.5, "text", [], [[]], [{}], {}, {"a": {}}, [1, "Linear", ["x"]])
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
WHOLE = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:x": {}}, "lm_head": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["x"], "version": "gemm"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": GROUP},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    },
    "float-quantized": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 8]},
                "input_activations": {"num_bits": 8, "dynamic": False, "strategy": "tensor"},
                "format": "float-quantized",
            }
        },
    },
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["x"]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["x"], "quantization": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["x"]},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq", "sym": True},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]},
}


LINEARS = ("model.layers.0.mlp.down_proj", "lm_head")


def spoilt(value):
    """The same JSON with one place after the other holding something odd."""
    if isinstance(value, dict):
        for key in value:
            for odd in (*spoilt(value[key]), *ODD):
                yield {**value, key: odd}
    elif isinstance(value, list):
        for n in range(len(value)):
            yield from ([*value[:n], odd, *value[n + 1 :]] for odd in (*spoilt(value[n]), *ODD))


@pytest.mark.parametrize("method", WHOLE)
def test_a_block_with_odd_values_is_read_or_refused(method):
    judged = 0
    for raw in spoilt(WHOLE[method]):
        for form in (f for f in KNOWN.values() if f.claims(raw)):
            for ask in (form.packs, form.stored_bits, form.stated_name, form.exclusions, form.needed_beside):
                ask(raw)
            for name in LINEARS:
                takes = form.takes(raw)
                assert takes is None or takes(name) in (True, False)
                assert form.excluded(raw)(name) in (True, False)
                with contextlib.suppress(Unavailable):
                    wanted = form.wanted(raw)
                    wanted(name, None), wanted(name, (64, 32))
            list(form.refused(raw)), form.targets(raw), form.version_key(raw)
            with contextlib.suppress(Unavailable, DoctorError):
                form.read(raw, "config.json", "/quantization_config").bits_of("model.layers.0.mlp.down_proj")
            judged += 1
    assert judged > 20


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_an_odd_mode_of_an_mlx_module_is_no_crash(odd):
    assert mlx_parts_missing({}, "a.weight", {"a": {"mode": odd}}) in (["scales"], ["scales", "biases"])
