"""Checkpoints whose linears are stored in codes, made of 16-bit ones: as FP8, INT4, MXFP4, NVFP4 and bitsandbytes are
published.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}
NVFP4 = compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def fp8_block(name: str, W: Any) -> dict[str, Any]:
    import torch

    tiles = [[W[r : r + 128, c : c + 128] for c in range(0, W.shape[1], 128)] for r in range(0, W.shape[0], 128)]
    scale = torch.tensor([[float(t.abs().max()) / 448 for t in row] for row in tiles])
    wide = scale.repeat_interleave(128, 0)[: W.shape[0]].repeat_interleave(128, 1)[:, : W.shape[1]]
    return {f"{name}.weight": (W / wide).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale}


def fp8_channel(name: str, W: Any) -> dict[str, Any]:
    import torch

    scale = (W.abs().amax(1, keepdim=True) / 448).bfloat16()
    return {f"{name}.weight": (W / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def int4(name: str, W: Any) -> dict[str, Any]:
    from doctor.core.recipe import Scheme
    from doctor.formats.grid import Grid
    from doctor.formats.registry import KNOWN

    groups = W.reshape(W.shape[0], -1, 32)
    scale = (groups.abs().amax(2) / 7.5).bfloat16().float()
    codes = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).byte().reshape(W.shape)
    grid = Grid(scale, scale.int() * 0 + 8)
    parts = KNOWN["compressed-tensors"].pack(codes, grid, None, Scheme(4, 32))
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def floats(W: Any, scale: Any, group: int) -> Any:
    """E2M1 codes, two a byte, of W [n, k] under scales [n, k/group]."""
    import torch

    scaled = W / scale.repeat_interleave(group, 1)
    codes = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).byte()


def nvfp4(name: str, W: Any) -> dict[str, Any]:
    import torch

    whole = 448 * 6 / W.abs().max()
    scale = (W.reshape(W.shape[0], -1, 16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    parts = {"weight_packed": floats(W, scale.float() / whole, 16), "weight_scale": scale}
    return {f"{name}.{part}": t for part, t in (parts | {"weight_global_scale": whole.reshape(1)}).items()}


def modelopt(name: str, W: Any) -> dict[str, Any]:
    parts = nvfp4(name, W)
    return {
        f"{name}.weight": parts[f"{name}.weight_packed"],
        f"{name}.weight_scale": parts[f"{name}.weight_scale"],
        f"{name}.weight_scale_2": 1 / parts[f"{name}.weight_global_scale"].reshape(()),
    }


def mxfp4(name: str, stack: Any) -> dict[str, Any]:
    """gpt-oss's experts: stack [experts, k, n]."""
    import torch

    experts, k, n = stack.shape
    W = stack.transpose(1, 2).reshape(experts * n, k)
    power = W.reshape(len(W), -1, 32).abs().amax(2).log2().floor() - 2
    blocks = floats(W, 2.0**power, 32).reshape(experts, n, k // 32, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": (power + 127).to(torch.uint8).reshape(experts, n, k // 32)}


def bitsandbytes(name: str, W: Any) -> dict[str, Any]:
    import torch

    table, blocks = torch.tensor(NF4), W.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).reshape(-1)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(W.shape)})
    return {
        f"{name}.weight": (16 * codes[::2] + codes[1::2]).byte().reshape(-1, 1),
        f"{name}.weight.absmax": absmax,
        f"{name}.weight.quant_map": table,
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


# How it is stored -> (what encodes one weight, part of the names of those that are, quantization_config).
STORED: dict[str, tuple[Callable[[str, Any], dict[str, Any]], str, dict[str, Any]]] = {
    "fp8-block": (fp8_block, "_proj", FP8),
    "fp8-channel": (fp8_channel, "_proj", compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int4-experts": (
        int4,
        "experts.",
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "mxfp4": (
        mxfp4,
        "experts.",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]},
    ),
    "nvfp4": (nvfp4, "_proj", NVFP4),
    "modelopt": (modelopt, "_proj", MODELOPT),
    "bitsandbytes": (bitsandbytes, "_proj", BITS),
}


def store_as(kind: str, source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with its linears, or its experts, in codes."""
    import torch
    from safetensors.torch import load_file, save_file

    encode, part, stated = STORED[kind]
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        taken = part in name and ".layers." in name and not name.endswith("bias") and tensor.dim() >= 2
        tensors |= encode(name.removesuffix(".weight"), tensor.float()) if taken else {name: tensor}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if "ignore" in stated or kind == "int4-experts":
        plain = [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight") and kind == "int4-experts"]
        stated = stated | {"ignore": ["lm_head", *plain]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return folder
