"""Files of torch.save are read as data: the numbers are those of torch.load, and what is more than tensors is refused unrun."""

import io
import json
import os
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub import fake  # noqa: F401 - a fixture

from doctor.api import check, fix, quantize
from doctor.checkpoint import Checkpoint
from doctor.edits import ReadPickle, RenameFile
from doctor.errors import PlanRefused
from doctor.pickled import STORAGES, NotPlain, read_pickle
from doctor.recipe import Recipe
from doctor.testing import tiny, torch_file
from doctor.view import EditedCheckpoint
from doctor.writer import sha256


def of_bytes(path, infos):
    raw = path.read_bytes()
    return {i.name: (i.dtype.name, i.shape, raw[i.begin : i.end]) for i in infos}


def of_torch(tensors):
    names = {getattr(torch, {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
                             "I8": "int8", "U8": "uint8", "BOOL": "bool"}[kind]): kind for kind in STORAGES.values()}
    return {n: (names[t.dtype], tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


def states():
    torch.manual_seed(0)
    shared = torch.randn(5, 3)
    every = {f"x.{kind}": torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in
             ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")}
    yield every
    yield OrderedDict(embed=shared, head=shared, again=shared.view(3, 5), rows=torch.randn(10, 4)[2:5], scalar=torch.tensor(2.5),
                      empty=torch.zeros(0, 4), one=torch.ones(1, 3, 1).transpose(0, 2), **{"a.ü": torch.ones(2).half()})
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    yield module.state_dict()  # with _metadata
    yield dict(module.named_parameters())
    yield {f"t{i}": torch.full((1,), float(i)) for i in range(300)}  # long memo keys


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("number", range(5))
def test_the_tensors_are_those_of_torch_load(tmp_path, number, protocol):
    state = list(states())[number]
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    want = torch.load(tmp_path / "a.bin", weights_only=protocol == 2)  # torch itself reads the newer one only unguarded
    assert of_bytes(tmp_path / "a.bin", read_pickle(tmp_path / "a.bin", "a.bin")) == of_torch(want) and len(want) == len(state)


def test_the_file_put_together_by_hand_is_what_torch_reads(tmp_path):
    case = tiny()
    (tmp_path / "a.bin").write_bytes(torch_file(case.tensors, case.dtypes))
    assert of_bytes(tmp_path / "a.bin", read_pickle(tmp_path / "a.bin", "a")) == of_torch(torch.load(tmp_path / "a.bin", weights_only=True))
    assert case.tensors.keys() == {i.name for i in read_pickle(tmp_path / "a.bin", "a")}


class Runs:
    """Its pickle calls os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def archive(data, members=(), **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("archive/data.pkl", data, **options)
        for name, raw in members:
            z.writestr(f"archive/{name}", raw)
    return buffer.getvalue()


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def tensor_pickle(shape=(2, 3), strides=(3, 1), offset=0, numel=6, kind="FloatStorage", stored=None):
    """One tensor of a storage whose numbers are as given."""
    number = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731
    row = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"  # noqa: E731
    data = (b"\x80\x02}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            + number(numel) + b"tQ" + number(offset) + row(shape) + row(strides) + b"\x89ccollections\nOrderedDict\n)RtRu.")
    return archive(data, [("data/0", bytes(stored if stored is not None else max(numel, 0) * 4))])


BOMB = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 200  # a tuple of two times a tuple of two times …: 2 ** 200 when written out


@pytest.mark.parametrize("raw, why", [
    (lambda p: saved({"w": torch.ones(2), "x": Runs(p / "ran")}), "it calls posix.mkdir, which is no tensor"),
    (lambda p: saved({"w": np.float32(1)}), "it calls"),
    (lambda p: saved({"w": torch.ones(2, 3).t()}), "it holds a view of strides [1, 3] for the shape [3, 2]"),
    (lambda p: saved({"model": {"w": torch.ones(2)}, "step": 3}), "its entry 'model' is no tensor"),
    (lambda p: saved([torch.ones(2)]), "its pickle has the operation EMPTY_LIST"),
    (lambda p: saved({}), "it holds no dictionary of tensors"),
    (lambda p: saved({3: torch.ones(2)}), "it holds a key that is a int"),
    (lambda p: saved({"w": torch.ones(2)}, _use_new_zipfile_serialization=False), "it is no zip file of torch.save"),
    (lambda p: saved({"w": torch.ones(2).to(torch.complex64)}), "it holds a storage of the kind torch.ComplexFloatStorage"),
    (lambda p: saved({"w": torch.ones(2)})[:-40], "it is no zip file of torch.save"),
    (lambda p: archive(b"\x80\x02}."), "it holds no dictionary of tensors"),
    (lambda p: archive(b"\x80\x02"), "its pickle"),
    (lambda p: archive(BOMB + b"."), "it holds no dictionary of tensors"),
    (lambda p: archive(b"\x80\x02}(" + BOMB[2:] + b"Nu."), "it holds a key that is a tuple"),
    (lambda p: archive(BOMB + b")R."), "it calls a tuple"),
    (lambda p: tensor_pickle(offset=1), "w is not inside its storage 0"),
    (lambda p: tensor_pickle(offset=-1), "whose sizes are no numbers"),
    (lambda p: tensor_pickle(shape=(2, 4), strides=(4, 1)), "w is not inside its storage 0"),
    (lambda p: tensor_pickle(strides=(3,)), "whose sizes are no numbers"),
    (lambda p: tensor_pickle(numel=5, shape=(5,), strides=(1,), stored=24), "w is not inside its storage 0"),
    (lambda p: tensor_pickle(kind="QInt8Storage"), "it holds a storage of the kind torch.QInt8Storage"),
    (lambda p: archive(zipfile.ZipFile(io.BytesIO(tensor_pickle())).read("archive/data.pkl")), "its archive/data/0 is not there, or is packed"),
    (lambda p: archive(b"\x80\x02}.", [("byteorder", b"big")]), "its numbers are not little-endian"),
    (lambda p: archive(b"\x80\x02}.", compress_type=zipfile.ZIP_DEFLATED), "its archive/data.pkl is not there, or is packed"),
    (lambda p: b"no zip", "it is no zip file of torch.save"),
    (lambda p: archive(b"x", [("sub/data.pkl", b"y")]), "it holds no data.pkl as torch.save writes it"),
], ids=range(26))
def test_what_is_more_than_plain_tensors_is_refused_by_name_and_not_run(tmp_path, raw, why):
    (tmp_path / "a.bin").write_bytes(raw(tmp_path))
    with pytest.raises(NotPlain) as refused:
        read_pickle(tmp_path / "a.bin", "a.bin")
    assert why in str(refused.value) and os.listdir(tmp_path) == ["a.bin"]


def test_the_file_that_would_run_something_does_run_it_elsewhere(tmp_path):
    """Without this, the test above would prove nothing of its example."""
    torch.load(io.BytesIO(saved({"x": Runs(tmp_path / "ran")})), weights_only=False)
    assert os.listdir(tmp_path) == ["ran"]


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_damage_is_tensors_inside_the_file_or_a_refusal(tmp_path_factory, data):
    raw = bytearray(saved(OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(2).half())))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(raw)
    try:
        infos = read_pickle(path, "a")
    except NotPlain:
        return
    assert all(0 <= i.begin <= i.end <= len(raw) and i.nbytes == i.dtype.nbytes(i.numel) for i in infos)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=60))
def test_any_pickle_is_followed_to_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(archive(b"\x80\x02" + data))
    with pytest.raises(NotPlain):
        read_pickle(path, "a")


# as a cure


def in_pickles(folder, case, parts=1, last=None):
    """The case with its weights in files of torch.save alone."""
    names = sorted(case.tensors)
    case.write(folder)
    (folder / "model.safetensors").unlink()
    for i in range(last or parts):
        state = {n: torch.from_numpy(case.tensors[n].view(np.int16).copy()).view(torch.bfloat16) for n in names[i::parts]}
        torch.save(state, folder / ("pytorch_model.bin" if parts == 1 else f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin"))
    if parts > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {}}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_a_model_of_torch_files_becomes_safetensors_byte_for_byte(tmp_path, parts):
    case = tiny()
    source = in_pickles(tmp_path / "source", case, parts)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    result = fix(source, tmp_path / "out", case.recipe)
    assert [s.code for s in result.plan.steps] == ["F023"] and not check(tmp_path / "out", case.recipe).findings
    out = Checkpoint.open(tmp_path / "out")
    assert out.tensors.keys() == case.tensors.keys() and all((out.load(n) == a).all() for n, a in case.tensors.items())
    assert not [n for n in out.entries if "pytorch_model" in n] and {p.name: p.read_bytes() for p in source.iterdir()} == before
    receipt = json.loads(result.receipt_path.read_text())
    assert {w["sha256_before"] for w in receipt["written"] if w["file"].endswith(".safetensors")} == {sha256(p) for p in source.glob("*.bin")}


def test_a_head_in_the_same_bytes_as_its_embedding_is_stored_once(tmp_path):
    case = tiny("gemma")
    folder = in_pickles(tmp_path / "source", case)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
    result = fix(folder, tmp_path / "out", case.recipe)
    assert [s.code for s in result.plan.steps] == ["F023", "F055"] and not result.report.findings
    assert Checkpoint.open(tmp_path / "out").tensors.keys() == case.tensors.keys()


def test_what_the_weights_show_is_said_after_them_and_cured_with_them(tmp_path):
    """A defect that could not be seen in a pickle was not caused by reading it."""
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    case.tensors[case.name("up", 1)][:] = 0
    folder = in_pickles(tmp_path / "source", case)
    result = fix(folder, tmp_path / "out", case.recipe, unsafe_fixes=("W201",))
    assert [s.code for s in result.plan.steps] == ["F023", "W201"] and {f.code for f in result.report.findings} == {"W202", "W204", "W209"}
    assert Checkpoint.open(tmp_path / "out").load(case.name("down"))[3, 5] == 0


def test_torch_files_are_quantized_through_the_view(tmp_path):
    case, plain = tiny(), tiny()
    outs = [quantize(folder, tmp_path / f"out{i}", Recipe(method="rtn", group_size=32), fix=True).output
            for i, folder in enumerate((in_pickles(tmp_path / "source", case), plain.write(tmp_path / "plain")))]
    weights = [Checkpoint.open(out) for out in outs]
    assert weights[0].tensors.keys() == weights[1].tensors.keys() and all((weights[0].load(n) == weights[1].load(n)).all() for n in weights[0].tensors)


@pytest.mark.parametrize("spoil, why", [("part", "2 files are not all the parts that their names say"), ("twice", "two files hold a tensor of the same name"),
                                        ("code", "pytorch_model-00001-of-00003.bin: it calls posix.mkdir, which is no tensor")])
def test_a_model_that_is_not_whole_or_not_plain_is_left_to_its_user(tmp_path, spoil, why):
    case = tiny()
    folder = in_pickles(tmp_path / "source", case, 3, last=2 if spoil == "part" else None)
    if spoil == "twice":
        (folder / "pytorch_model-00002-of-00003.bin").write_bytes((folder / "pytorch_model-00001-of-00003.bin").read_bytes())
    if spoil == "code":
        torch.save({"x": Runs(tmp_path / "ran")}, folder / "pytorch_model-00001-of-00003.bin")
    (item,) = [f for f in check(folder, case.recipe).findings if f.code == "F023"]
    assert item.fix.safety == "manual" and why in item.fix.title and not (tmp_path / "ran").exists()
    assert not fix(folder, tmp_path / "out", case.recipe, unsafe_fixes=True).plan.steps


def test_a_file_that_changes_after_the_plan_is_refused(tmp_path):
    folder = in_pickles(tmp_path / "source", tiny())
    source = Checkpoint.open(folder)
    view = EditedCheckpoint(source, [ReadPickle("pytorch_model.bin", "model.safetensors"), RenameFile("model.safetensors", "other.safetensors")])
    assert list(view.shards) == ["other.safetensors"] and view.origin("other.safetensors") == "pytorch_model.bin"
    torch.save({"x": Runs(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(PlanRefused, match="pytorch_model.bin: it calls posix.mkdir"):
        EditedCheckpoint(source, [ReadPickle("pytorch_model.bin", "model.safetensors")])
    with pytest.raises(PlanRefused, match="nobody.bin: is not there"):
        EditedCheckpoint(source, [ReadPickle("nobody.bin", "model.safetensors")])


def test_an_adapter_of_a_torch_file_is_written_first_and_merged_then(tmp_path):
    from test_cures import adapter

    case = tiny("llama")
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({n: torch.from_numpy(a) for n, a in parts.items()}, folder / "adapter_model.bin")
    first = fix(folder, tmp_path / "plain", case.recipe, base=base)
    assert [s.code for s in first.plan.steps] == ["F023"]
    assert "where F023 writes one, merge that" in next(f.fix.title for f in first.plan.for_you if f.code == "F022")
    merged = fix(tmp_path / "plain", tmp_path / "out", case.recipe, base=base)
    assert [s.code for s in merged.plan.steps] == ["F022"] and not merged.report.findings


def test_a_repository_of_torch_files_is_judged_from_afar_without_them(fake, tmp_path):  # noqa: F811
    fake.put(in_pickles(tmp_path / "local", tiny()))
    report = check("org/name", Recipe(group_size=32))
    assert not report.crashed and [f.fix.safety for f in report.findings if f.code == "F023"] == ["manual"]
