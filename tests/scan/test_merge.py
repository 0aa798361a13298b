"""A merged checkpoint is compared with base plus adapter: right merges pass, each wrong one is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import ShardFile
from doctor.core.errors import DoctorError
from doctor.lint.testing import tiny

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
RANK = 4


def made(folder, dtype="BF16", dora=False):
    """(base, adapter, case): base on disk and an adapter for two of its linears."""
    case = tiny("llama", dtype)
    base = case.write(folder / "base")
    rng = np.random.default_rng(3)
    lora = tiny("llama")
    targets = ["q_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": targets, "use_dora": dora}
    lora.json = {"adapter_config.json": config}
    lora.tensors, lora.dtypes = {}, {}
    for module in MODULES:
        n, k = case.tensors[f"{module}.weight"].shape
        parts = {"lora_A.weight": (RANK, k), "lora_B.weight": (n, RANK)}
        if dora:
            parts["lora_magnitude_vector"] = (n,)
        for tail, shape in parts.items():
            name = f"base_model.model.{module}.{tail}"
            lora.tensors[name] = rng.normal(0, 0.1, shape).astype(np.float32)
            lora.dtypes[name] = "F32"
    adapter = lora.write(folder / "adapter")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    return base, adapter, case


def merged(folder, case, adapter, times=1.0, skip=(), spoil=None):
    """The merge as PEFT makes it, by an implementation of its own; or a wrong one."""
    from safetensors.numpy import load_file

    matrices = load_file(adapter / "adapter_model.safetensors")
    for module in MODULES:
        name = f"{module}.weight"
        if module in skip:
            continue
        a, b = (matrices[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        dtype = case.dtypes[name]
        whole = from_codes(case.tensors[name], dtype) + times * (8 / RANK) * (b @ a)
        if (size := matrices.get(f"base_model.model.{module}.lora_magnitude_vector")) is not None:
            whole *= (size / np.linalg.norm(whole, axis=1))[:, None]
        case.tensors[name] = to_codes(whole.astype(np.float32), dtype)
    if spoil:
        spoil(case)
    return case.write(folder / "merged")


def messages(folder, base, adapter):
    report = check(folder, tiny().recipe, select=["W211"], merged_from=(base, adapter))
    return [f.message for f in report.findings]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_right_merge_passes_in_every_type(dtype, dora, tmp_path):
    base, adapter, case = made(tmp_path, dtype, dora)
    assert messages(merged(tmp_path, case, adapter), base, adapter) == []


def test_doctors_own_merge_passes(tmp_path):
    base, adapter, case = made(tmp_path)
    fix(adapter, tmp_path / "merged", case.recipe, donor=base, unsafe_fixes=True)
    assert messages(tmp_path / "merged", base, adapter) == []


@pytest.mark.parametrize(
    "how, says",
    [
        ({"times": 0.0}, "2 of 2 linears of adapter were not merged"),
        ({"skip": MODULES[:1]}, "1 of 2 linears of adapter was not merged: model.layers.0.self_attn.q_proj.weight"),
        ({"times": 2.0}, "2 of 2 linears of adapter were added 2.00 times"),
        ({"times": 0.5}, "2 of 2 linears of adapter were added 0.50 times"),
        ({"times": -1.0}, "2 of 2 linears of adapter were added -1.00 times"),
    ],
)
def test_each_wrong_merge_is_named(how, says, tmp_path):
    base, adapter, case = made(tmp_path)
    [message] = messages(merged(tmp_path, case, adapter, **how), base, adapter)
    assert message.startswith(says)


def test_noise_and_nan_are_no_merge(tmp_path):
    def noise(case):
        weight = case.tensors[f"{MODULES[0]}.weight"]
        values = from_codes(weight, "BF16")
        spread = np.random.default_rng(5).normal(0, values.std(), values.shape)
        case.tensors[f"{MODULES[0]}.weight"] = to_codes((values + spread).astype(np.float32), "BF16")
        case.tensors[f"{MODULES[1]}.weight"][:] = 0x7FC0

    base, adapter, case = made(tmp_path)
    found = messages(merged(tmp_path, case, adapter, spoil=noise), base, adapter)
    assert sum("is not base plus adapter" in m or "are not base plus adapter" in m for m in found) == 1
    assert "2 of 2 linears are not base plus adapter" in found[0]


def test_what_the_adapter_does_not_touch_must_be_the_bases(tmp_path):
    def other(case):
        case.tensors["model.layers.0.mlp.up_proj.weight"][2, 3] ^= 1

    base, adapter, case = made(tmp_path)
    [message] = messages(merged(tmp_path, case, adapter, spoil=other), base, adapter)
    assert message == (
        "1 tensor differs from base though the adapter does not touch it: model.layers.0.mlp.up_proj.weight"
    )


def test_a_base_of_another_type_is_rounded_to_the_merged_files(tmp_path):
    base, adapter, case = made(tmp_path, "F32")
    for name, codes in case.tensors.items():
        case.tensors[name] = codes if name.startswith(tuple(MODULES)) else to_codes(codes, "BF16")
    # The two linears stay in float32 until they are merged.
    assert messages(merged(tmp_path, case, adapter, spoil=_to_bf16), base, adapter) == []


def _to_bf16(case):
    for name, codes in case.tensors.items():
        if codes.dtype == np.float32:
            case.tensors[name] = to_codes(codes, "BF16")
        case.dtypes[name] = "BF16"


def test_what_cannot_be_compared_is_said(tmp_path):
    base, adapter, case = made(tmp_path)
    good = merged(tmp_path, case, adapter)
    assert "holds no adapter_config.json" in messages(good, base, base)[0]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert "peft_type is IA3" in messages(good, base, adapter)[0]
    with pytest.raises(DoctorError):
        check(good, merged_from=(tmp_path / "absent", adapter))


def test_both_options_go_together():
    from click.testing import CliRunner

    from doctor.cli.main import cli

    ran = CliRunner().invoke(cli, ["check", "x", "--adapter", "y"])
    assert ran.exit_code == 2 and "--base and --adapter go together" in ran.output


def test_the_merged_file_is_read_once_and_the_base_once_beside_it(tmp_path, monkeypatch):
    base, adapter, case = made(tmp_path, dora=True)
    monkeypatch.setattr("doctor.scan.scan.CHUNK_BYTES", 512)  # many chunks of a few rows
    good = merged(tmp_path, case, adapter)
    read = {"base": 0, "merged": 0}
    of_file = ShardFile.read_into

    def counted(self, at, part):
        for side in read:
            read[side] += len(part) if Path(self.path).parent.name == side else 0
        return of_file(self, at, part)

    monkeypatch.setattr(ShardFile, "read_into", counted)
    monkeypatch.setattr("doctor.scan.native.function", lambda *_: None)  # which reads without read_into
    report = check(good, tiny().recipe, select=["W211"], merged_from=(base, adapter))
    tensors = Checkpoint.open(good).tensors
    total = sum(info.nbytes for info in tensors.values())
    assert report.findings == [] and report.bytes_read == total and read["base"] == total
    assert read["merged"] == total + 512  # the head and the embedding differ in the first chunk
