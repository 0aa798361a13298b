"""Cases that several tests of fixes need: adapters, packed linears, and which fixes a plan has."""

import json

import numpy as np

from doctor.lint.testing import shard_bytes, tiny


def codes(result):
    return {s.code for s in result.plan.steps}


def adapter(folder, case, roles=("q", "down"), r=4, **config):
    """An adapter on disk and its tensors; with use_dora, magnitudes that differ from the sums' own by up to a third."""
    rng = np.random.default_rng(9)
    tensors = {}
    for role in roles:
        n, k = case.tensors[case.name(role)].shape
        stem = "base_model.model." + case.name(role).removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = rng.normal(0, 0.1, (r, k)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = rng.normal(0, 0.1, (n, r)).astype(np.float32)
        if config.get("use_dora"):
            tensors[f"{stem}.lora_magnitude_vector"] = rng.uniform(0.5, 1.0, n).astype(np.float32)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(tensors, dict.fromkeys(tensors, "F32")))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": r,
                "lora_alpha": 8,
                "base_model_name_or_path": "org/base",
                "target_modules": list(roles),
                **config,
            }
        )
    )
    return folder, tensors


def quantized(folder, form, bits=4, sym=True, act_order=False):
    """A tiny model packed by the project's own packers, which other programs' vectors prove."""
    import torch

    from doctor.core.recipe import Scheme
    from doctor.formats.grid import Grid
    from doctor.formats.registry import KNOWN

    case = tiny("llama")
    rng = np.random.default_rng(5)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        n, k = case.tensors.pop(name).shape
        groups, module = k // 32, name.removesuffix(".weight")
        codes = torch.from_numpy(rng.integers(0, 1 << bits, (n, k), np.uint8))
        zero = (
            torch.full((n, groups), 1 << (bits - 1), dtype=torch.int32)
            if sym
            else torch.from_numpy(rng.integers(1, 1 << bits, (n, groups), np.int32))
        )
        scale = torch.from_numpy(rng.uniform(0.01, 0.02, (n, groups)).astype(np.float16)).float()
        grid = Grid(scale, zero)
        index = torch.from_numpy(
            rng.permutation(k).astype(np.int32) // 32 if act_order else np.arange(k, dtype=np.int32) // 32
        )
        parts = KNOWN[form].pack(codes, grid, index, Scheme(bits, 32, sym))
        for tail, value in parts.items():
            array = value.numpy()
            kind = {"float16": "F16", "int32": "I32", "int64": "I64"}[str(array.dtype)]
            case.tensors[f"{module}.{tail}"], case.dtypes[f"{module}.{tail}"] = (
                array.view(np.uint16) if kind == "F16" else array,
                kind,
            )
    case.config["quantization_config"] = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": not sym, "version": "gemm"},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "symmetric": sym,
                        "group_size": 32,
                        "strategy": "group",
                    },
                }
            },
            "ignore": ["lm_head"],
        },
    }.get(
        form,
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 32,
            "sym": sym,
            "desc_act": act_order,
            "checkpoint_format": form,
        },
    )
    if form == "gptq":
        case.json["quantize_config.json"] = dict(case.config["quantization_config"])
    return case, case.write(folder)
