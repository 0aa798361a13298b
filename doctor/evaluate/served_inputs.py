"""What engines do to a linear's inputs while they serve it: of W8A8, FP8, NVFP4 and MX files they round them.

Weights alone would make such a file look better than its users will find it: SmolLM2's inputs hold massive values, and
in 8-bit integers, a scale a token, they cost ten times what its weights do.

Each format says what its configuration states (doctor/formats/input_rounding.py); ModelOpt's is not computed.

Sources: vllm-project/compressed-tensors 0.20 quantization/lifecycle/forward.py and utils/helpers.py
(calculate_qparams); vllm-project/vllm 0.32 vllm/model_executor/layers/quantization/compressed_tensors, fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from doctor.checkpoint.directory import Checkpoint
from doctor.formats.input_rounding import MOST, InputsOf
from doctor.formats.registry import KNOWN
from doctor.quant.dequantize import quantization, to_torch
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.solve.float_scale import power_of

Reads = Callable[[str], torch.Tensor | None]  # a stored tensor of the linear by its part's name
POWERS = {448.0: 256.0, 6.0: 4.0}  # the largest power of two among the values of a float


@dataclass(frozen=True)
class Rounding:
    """One linear's: args as QuantizationArgs has them; scale f32[]: of the whole tensor, None where it is taken from
    each input; divisor f32[]: of the scales of groups, as NVFP4 has one.
    """

    args: Mapping[str, Any]
    scale: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x f32[..., k] as the engine's product sees it."""
        most = MOST[self.args["type"], self.args["num_bits"]]
        strategy, width = self.args["strategy"], self.args.get("group_size") or 1
        groups = x
        if strategy in ("group", "tensor_group"):  # the last one may be short
            groups = functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
        scale = self.scale
        if scale is None:
            span = groups.abs().amax() if strategy == "tensor" else groups.abs().amax(-1, keepdim=True)
            scale = torch.where(span > 0, self._stored(span, most), 1.0)
        scale = scale.to(x.device)
        found = _nearest(groups / scale, self.args["type"], most).mul_(scale)
        return found if found.dim() == x.dim() else found.flatten(-2)[..., : x.shape[-1]]

    def _stored(self, span: torch.Tensor, most: float) -> torch.Tensor:
        """The scale for a largest value, rounded to the type that it is held in."""
        if self.args.get("scale_dtype") == "torch.uint8":
            return power_of(span) / POWERS[most]
        if self.divisor is None:
            return span / most
        divisor = self.divisor.to(span.device)
        return (span / most * divisor).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).to(torch.float32) / divisor


def _nearest(x: torch.Tensor, kind: str, most: float) -> torch.Tensor:
    """x f32, in units of its scale, rounded to the values that there are."""
    x = x.clamp(-most, most)
    if kind == "int":
        return x.round_()
    if most == MOST["float", 8]:
        return x.to(torch.float8_e4m3fn).to(torch.float32)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    return levels[torch.bucketize(x.abs(), (levels[1:] + levels[:-1]) / 2)].copysign(x)


def round_inputs(checkpoint: Checkpoint, skeleton: Skeleton) -> int:
    """Let the linears of a quantized checkpoint's skeleton round their inputs as engines do, where its configuration
    says that they do. Returns how many.
    """
    args_of, count = _stated(checkpoint), 0
    if args_of is None:
        return 0
    for i in range(len(skeleton.layers)):
        for name, (_linear, module) in skeleton.modules_of(i).items():
            args = args_of(name)
            if args is not None and _packed(checkpoint, name):
                module.register_forward_pre_hook(partial(_hook, rounding(args, partial(_part, checkpoint, name))))
                count += 1
    return count


def rounds_inputs(checkpoint: Checkpoint) -> bool:
    """Whether a quantized checkpoint's configuration has inputs rounded in a way that is computed here."""
    return _stated(checkpoint) is not None


def _stated(checkpoint: Checkpoint) -> InputsOf | None:
    """How its configuration has the inputs of a linear rounded, by the linear's name; None for not at all."""
    raw = quantization(checkpoint)
    form = raw and next((f for f in KNOWN.values() if f.claims(raw)), None)
    return form.inputs_of(raw) if form and raw else None


def _hook(rounded: Rounding, _module: nn.Module, inputs: tuple) -> tuple:
    return (rounded(inputs[0]), *inputs[1:])


def rounding(args: Mapping[str, Any], read: Reads) -> Rounding:
    """Of one linear; its stored scales by their parts' names."""
    if args.get("dynamic") is False:
        return Rounding(args, scale=read("input_scale"))
    return Rounding(args, divisor=read("input_global_scale") if args["strategy"] == "tensor_group" else None)


def _packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a linear has scales of weights: what a list of exceptions leaves out has none."""
    return any(f"{name}.{part}" in checkpoint.tensors for part in ("weight_scale", "weight_scale_inv"))


def _part(checkpoint: Checkpoint, name: str, part: str) -> torch.Tensor | None:
    info = checkpoint.tensors.get(f"{name}.{part}")
    if info is None:
        return None
    return to_torch(checkpoint.load(info.name), info.dtype.name).to(torch.float32).flatten()[:1]
