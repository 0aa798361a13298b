"""Inputs of linears are rounded as engines round them: against compressed-tensors' own code, and in a comparison."""

import pytest
import torch
from healthy_models import save

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.evaluate.compare import Streamed, walk
from doctor.evaluate.served_inputs import Rounding, rounds_inputs
from doctor.formats.compressed_tensors import _INPUTS
from doctor.formats.registry import KNOWN

USUAL = {"num_bits": 8, "symmetric": True, "group_size": None, "dynamic": True}
ROWS = [torch.arange(1, 25)[None] % 90]


def by_the_library(x, args, divisor):
    """x as compressed-tensors rounds it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(**args)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), divisor)
    return fake_quantize(x, scale, zero, args, global_scale=divisor)


@pytest.mark.parametrize("name", [n for n in _INPUTS if n != "fp8-static"])
def test_inputs_are_rounded_as_compressed_tensors_does(name):
    pytest.importorskip("compressed_tensors")
    args = {**USUAL, **_INPUTS[name]}
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 256)
    x[0, 2] = 0
    divisor = torch.tensor([448.0 * 6.0]) / x.abs().max() if name == "fp4" else None
    found, wanted = Rounding(args, divisor=divisor)(x), by_the_library(x, args, divisor)
    step = x.abs().max() / {4: 4, 8: 100}[args["num_bits"]]
    assert (found - wanted).abs().max() < step  # a tie goes another way
    # int8: the library's scale is largest / 127.5, that of vLLM's kernels largest / 127
    assert (found != wanted).float().mean() < 0.01 or name == "int8"
    assert not torch.equal(found, x) and not found[0, 2].any()


def test_a_last_group_may_be_short():
    args = {**USUAL, **_INPUTS["fp8-block"]}
    x = torch.randn(1, 3, 192, generator=torch.Generator().manual_seed(4))
    found = Rounding(args)(x)
    assert found.shape == x.shape
    assert torch.equal(found[..., :128], Rounding(args)(x[..., :128]))
    assert torch.equal(found[..., 128:], Rounding(args)(torch.nn.functional.pad(x[..., 128:], (0, 64)))[..., :64])


def test_a_scale_that_was_measured_clips():
    args = {**USUAL, **_INPUTS["fp8-static"]}
    found = Rounding(args, scale=torch.tensor([0.5]))(torch.tensor([[1000.0, 1.0, -1000.0]]))
    assert found.tolist() == [[224.0, 1.0, -224.0]]


@pytest.mark.parametrize(
    "form, rounds", [("int-quantized", True), ("float-quantized", True), ("compressed-tensors", False)]
)
def test_a_comparison_sees_what_the_rounding_of_inputs_costs(form, rounds, tmp_path):
    source = save("llama", tmp_path / "m")
    recipe = Recipe(method="rtn", bits=8, group_size=-1 if rounds else 32, format=form)
    out = api.quantize(source, tmp_path / "o", recipe).output
    checkpoint = Checkpoint.open(out)
    assert rounds_inputs(checkpoint) == rounds
    served = Streamed(checkpoint, ROWS)
    assert served.rounded_inputs == (len(served.spec.linears) if rounds else 0)
    plain = Streamed(checkpoint, ROWS)
    for module in plain.skeleton.model.modules():
        module._forward_pre_hooks.clear()
    walk([served, plain])
    assert torch.equal(served.hidden[0], plain.hidden[0]) != rounds


def test_names_come_before_classes_and_what_is_not_known_is_left():
    int8, odd = {**USUAL, **_INPUTS["int8"]}, {**USUAL, "type": "int", "num_bits": 4, "strategy": "token"}
    groups = {
        "a": {"targets": ["Linear"], "input_activations": int8},
        "b": {"targets": ["re:.*down_proj"], "input_activations": None},
        "c": {"targets": ["x.up_proj"], "input_activations": odd},
        "d": {"targets": ["re:(", 3], "input_activations": {"type": [], "num_bits": {}}},
    }
    for group in groups.values():
        group["weights"] = {"num_bits": 8}
    args_of = KNOWN["compressed-tensors"].inputs_of({"config_groups": groups})
    assert args_of("x.q_proj") == int8 and args_of("x.down_proj") is None and args_of("x.up_proj") is None
    assert KNOWN["fp8"].inputs_of({"weight_block_size": [128, 128]})("x")["group_size"] == 128
    assert KNOWN["gptq"].inputs_of({"bits": 4}) is None
