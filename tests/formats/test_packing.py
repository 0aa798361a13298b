import json
from pathlib import Path

import packing as pack
import pytest
import torch

from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.quant.solve.grid import Grid, contiguous_groups, dequantize, quantize
from doctor.quant.solve.grid_search import fit

VECTORS = Path(__file__).parents[2] / "fixtures" / "vectors"
GPTQ = sorted(path for path in VECTORS.glob("gptq_w?_in*.json"))
AWQ = sorted(VECTORS.glob("awq_gemm_*.json"))
COMPRESSED = sorted(VECTORS.glob("ct_pack_*.json"))
stem = lambda path: path.stem  # noqa: E731


def load(path):
    return json.loads(path.read_text())


def words(rows):
    return torch.tensor(rows, dtype=torch.int32)


def half(rows):
    bits = torch.tensor([[int(value, 16) for value in row] for row in rows], dtype=torch.int32).to(torch.int16)
    return bits.view(torch.float16)


def test_the_vectors_of_every_format_are_there():
    assert (len(GPTQ), len(AWQ), len(COMPRESSED)) == (18, 3, 7)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", GPTQ, ids=stem)
def test_gptq_packs_and_reads_the_words_of_other_programs(path, version):
    vector = load(path)
    codes = torch.tensor(vector["codes"], dtype=torch.uint8).T.contiguous()
    scales = half(vector["scales_f16_hex"])
    grid = Grid(scales.float().T.contiguous(), torch.tensor(vector["zeros"], dtype=torch.int32).T.contiguous())
    g_idx = words(vector["g_idx"])
    made = pack.gptq_pack(codes, grid, g_idx, vector["bits"], version=version)
    assert torch.equal(made["qweight"], words(vector["tensors"]["qweight"]["data"]))
    assert torch.equal(made["qzeros"], words(vector["tensors"][f"qzeros_v{version}"]["data"]))
    assert torch.equal(made["scales"].view(torch.int16), scales.view(torch.int16))
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "qweight": torch.int32,
        "qzeros": torch.int32,
        "scales": torch.float16,
        "g_idx": torch.int32,
    }
    assert all(tensor.is_contiguous() for tensor in made.values())
    back, read, groups = pack.gptq_unpack(**made, bits=vector["bits"], version=version)
    assert torch.equal(back, codes) and torch.equal(groups, g_idx)
    assert torch.equal(read.scale, grid.scale) and torch.equal(read.zero, grid.zero)
    W = pack.gptq_dequantize(made["qweight"], made["qzeros"], made["scales"], g_idx, vector["bits"], version=version)
    by_rule = scales.float()[g_idx.long()] * (codes.T.float() - grid.zero.T[g_idx.long()].float())
    assert torch.equal(W, by_rule.T)


def test_gptq_v1_refuses_a_zero_point_of_zero_and_v2_writes_it():
    vector = load(VECTORS / "gptq_w4_v1_zero0_hazard.json")
    zero = torch.tensor(vector["zeros"], dtype=torch.int32).T.contiguous()
    grid = Grid(torch.ones(zero.shape), zero)
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    g_idx = contiguous_groups(32, 32)
    with pytest.raises(NotQuantizable, match=r"row 0, group 0 has zero 0 \(4 such groups\): zeros must be 1\.\.15"):
        pack.gptq_pack(codes, grid, g_idx, 4, version=1)
    made = pack.gptq_pack(codes, grid, g_idx, 4, version=2)
    assert torch.equal(made["qzeros"], words(vector["qzeros_v2"]))


def test_reading_v1_data_as_v2_shifts_every_weight_by_one_step():
    grid = Grid(torch.full((32, 1), 0.5), torch.full((32, 1), 8, dtype=torch.int32))
    codes = torch.randint(0, 16, (32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    made = pack.gptq_pack(codes, grid, contiguous_groups(32, 32), 4, version=1)
    shift = pack.gptq_dequantize(*made.values(), 4, version=2) - pack.gptq_dequantize(*made.values(), 4, version=1)
    assert (shift == 0.5).all()


@pytest.mark.parametrize("path", AWQ, ids=stem)
def test_awq_packs_and_reads_the_words_of_autoawq(path):
    vector = load(path)
    codes = torch.tensor(vector["codes"], dtype=torch.uint8).T.contiguous()
    groups, n = len(vector["scales_f16_hex"]), codes.shape[0]
    zero = vector.get("zeros") or [[8] * n] * groups
    grid = Grid(
        half(vector["scales_f16_hex"]).float().T.contiguous(), torch.tensor(zero, dtype=torch.int32).T.contiguous()
    )
    made = pack.awq_pack(codes, grid)
    for name in ("qweight", "qzeros"):
        assert torch.equal(made[name], words(vector["tensors"][name]["data"]))
    back, read, g_idx = pack.awq_unpack(**made)
    assert torch.equal(back, codes) and torch.equal(read.zero, grid.zero) and torch.equal(read.scale, grid.scale)
    assert torch.equal(pack.awq_dequantize(**made), dequantize(codes, grid, g_idx))


@pytest.mark.parametrize("path", COMPRESSED, ids=stem)
def test_compressed_tensors_packs_and_reads_the_words_of_its_own_program(path):
    vector = load(path)
    bits, middle = vector["bits"], 2 ** (vector["bits"] - 1)
    codes = (torch.tensor(vector["signed_codes"]) + middle).to(torch.uint8)
    scale = half(vector["scales_f16_hex"]).float()
    zero = torch.full(scale.shape, middle, dtype=torch.int32)
    if vector["zero_points"]:
        zero = (torch.tensor(vector["zero_points"]) + middle).to(torch.int32)
    grid = Grid(scale, zero)
    made = pack.compressed_pack(codes, grid, bits, vector["symmetric"])
    for name in ("weight_packed", "weight_zero_point"):
        if name in vector["tensors"]:
            assert torch.equal(made[name], words(vector["tensors"][name]["data"]))
    assert made["weight_shape"].tolist() == vector["tensors"]["weight_shape"]["data"]
    assert ("weight_zero_point" in made) == (not vector["symmetric"])
    back, read, g_idx = pack.compressed_unpack(**made, bits=bits)
    assert torch.equal(back, codes) and torch.equal(read.zero, zero)
    assert torch.equal(pack.compressed_dequantize(**made, bits=bits), dequantize(codes, grid, g_idx))
    for name, layout in vector.items():
        if name.startswith("legacy"):
            old = words(layout["data"])
            assert torch.equal(pack.compressed_unpack(**{**made, "weight_packed": old}, bits=bits)[0], codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 40, 107, 256])
def test_unpack_undoes_pack_for_any_length(bits, count):
    codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack.pack_rows(codes, bits)
    assert packed.shape == (5, -(-count * bits // 32))
    assert torch.equal(pack.unpack_rows(packed, bits, count), codes)
    stream = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes[0])
    first = sum(int(bit) << place for place, bit in enumerate(stream[:32]))
    assert int(packed[0, 0]) & 0xFFFFFFFF == first


def test_a_fitted_layer_survives_every_format_bit_for_bit():
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    grid = fit(W, 4, 32, False, zero_min=1)
    codes, g_idx = quantize(W, grid, 4), contiguous_groups(96, 32)
    want = dequantize(codes, grid)
    for version in (1, 2):
        made = pack.gptq_pack(codes, grid, g_idx, 4, version=version)
        assert torch.equal(pack.gptq_dequantize(**made, bits=4, version=version), want)
    assert torch.equal(pack.awq_dequantize(**pack.awq_pack(codes, grid)), want)
    assert torch.equal(pack.compressed_dequantize(**pack.compressed_pack(codes, grid, 4, False), bits=4), want)


def test_a_scale_that_the_file_cannot_hold_is_refused():
    grid = Grid(torch.full((32, 1), 0.1), torch.full((32, 1), 8, dtype=torch.int32))
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    with pytest.raises(NotQuantizable, match="32 of 32 scales are not exact in float16"):
        pack.gptq_pack(codes, grid, contiguous_groups(32, 32), 4)
    grid = Grid(torch.full((32, 1), float("nan")), grid.zero)
    with pytest.raises(NotQuantizable, match="32 of 32 scales"):
        pack.awq_pack(codes, grid)


def test_odd_sizes_and_damaged_tensors_are_named():
    grid = Grid(torch.ones(40, 1), torch.full((40, 1), 8, dtype=torch.int32))
    codes = torch.zeros(40, 32, dtype=torch.uint8)
    with pytest.raises(NotQuantizable, match=r"\[40, 32\]: out_features and in_features must be multiples of 32"):
        pack.gptq_pack(codes, grid, contiguous_groups(32, 32), 4)
    with pytest.raises(NotQuantizable, match=r"AWQ gemm packing of \[40, 32\]"):
        pack.awq_pack(codes, grid)
    with pytest.raises(NotQuantizable, match=r"a group has 7\.\.8: all must be 8"):
        pack.compressed_pack(codes[:2], Grid(torch.ones(2, 1), torch.tensor([[7], [8]])), 4, True)
    good = pack.gptq_pack(codes[:32], Grid(grid.scale[:32], grid.zero[:32]), contiguous_groups(32, 32), 4)
    with pytest.raises(BadCheckpoint, match=r"qzeros is \[1, 3\]: .* ask for \[1, 4\]"):
        pack.gptq_unpack(**{**good, "qzeros": good["qzeros"][:, :3]}, bits=4)
    with pytest.raises(BadCheckpoint, match=r"g_idx spans 0\.\.1: there are 1 groups"):
        pack.gptq_unpack(**{**good, "g_idx": good["g_idx"] + (torch.arange(32) > 20).int()}, bits=4)
    with pytest.raises(BadCheckpoint, match="weight_packed has 5 words a row for 32 codes of 4 bits"):
        pack.compressed_unpack(torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, 1), (2, 32), 4)
