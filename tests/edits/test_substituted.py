"""`fix --from`: whole files and single tensors of a directory or of the Hub (a server on the loopback), checked, or
nothing; files under new names.
"""

import hashlib
import json
import os

import numpy as np
import pytest
from test_hub import COMMIT, fake, refuse, torn  # noqa: F401 - a fixture

from doctor.api import check, fix, quantize, undo
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.errors import BadCheckpoint, MachineError, PlanRefused
from doctor.core.recipe import Recipe
from doctor.edits.kinds import (
    DropFile,
    DropTensor,
    NameFormat,
    PadTensor,
    RebuildIndex,
    RenameFile,
    RenameTensor,
    TakeFile,
)
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.filesystem import sha256
from doctor.lint.testing import rename_parts, tiny

SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def whole(tmp_path):
    case = tiny()
    case.shards = 3
    return case.write(tmp_path / "whole")


def copy_of(whole, to, damage=None):
    to.mkdir()
    for path in whole.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    if damage is not None:
        damage(to / SECOND)
    return to


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path):
    data = path.read_bytes()
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n"
    )


def scribble(path):
    """An entry of the header that claims one element more."""
    path.write_bytes(path.read_bytes().replace(b"64]", b"65]", 1))


DAMAGE = {
    "F001": cut,
    "F002": pointer,
    "F003": lambda p: p.write_bytes(b"<!DOCTYPE html><html></html>" + b" " * 1200),
    "F004": lambda p: p.write_bytes(bytes(4096)),
    "F005": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(2000)),
    "F006": lambda p: p.write_bytes(b"\x10" + bytes(7) + b'["no object"]'.ljust(2000)),
    "F007": scribble,
    "F009": lambda p: p.write_bytes(p.read_bytes() + bytes(37)),
    "F010": os.unlink,
}


def left_over(folder):
    return sorted(n for n in os.listdir(folder) if ".doctor-" in n)


@pytest.mark.parametrize("code", DAMAGE)
def test_a_damaged_shard_is_replaced_by_the_bases_file(tmp_path, whole, code):
    source = copy_of(whole, tmp_path / "source", DAMAGE[code])
    assert code in {f.code for f in check(source, tiny().recipe).findings}
    result = fix(source, tmp_path / "out", tiny().recipe, donor=whole)
    assert {s.code for s in result.plan.steps} == {code} and not result.report.findings
    assert {p.name: sha256(p) for p in (tmp_path / "out").iterdir() if p.name != "doctor.json"} == {
        p.name: sha256(p) for p in whole.iterdir()
    }
    receipt = json.loads(result.receipt_path.read_text())
    assert receipt["base"] == {"name": "whole", "files": {SECOND: sha256(whole / SECOND)}}
    assert [w["sha256_after"] for w in receipt["written"]] == [sha256(whole / SECOND)] and str(
        tmp_path
    ) not in result.receipt_path.read_text()


def test_a_file_that_nothing_shows_to_be_the_lost_one_is_taken_only_as_an_unsafe_fix(tmp_path, whole):
    source = copy_of(whole, tmp_path / "source", cut)
    for path in whole.glob("*.safetensors"):  # another model of the same shape: every value differs
        raw = bytearray(path.read_bytes())
        raw[-4000::2] = bytes(b ^ 1 for b in raw[-4000::2])
        raw[2000::2] = bytes(b ^ 1 for b in raw[2000::2])
        path.write_bytes(raw)
    assert not fix(source, tmp_path / "out", tiny().recipe, donor=whole).plan.steps
    assert fix(source, tmp_path / "out", tiny().recipe, donor=whole, unsafe_fixes=True).report.ok


def test_what_is_left_of_a_single_file_shows_that_the_bases_is_the_one(tmp_path):
    base = tiny().write(tmp_path / "base")
    source = tiny().write(tmp_path / "source")
    cut(source / "model.safetensors")
    result = fix(source, tmp_path / "out", tiny().recipe, donor=base)
    size = (source / "model.safetensors").stat().st_size
    assert [s.title for s in result.plan.steps] == [
        f"take model.safetensors from {base}: the {size:,} bytes that are left are its first"
    ]
    (source / "model.safetensors").write_bytes(bytes(4096))
    assert not fix(source, tmp_path / "two", tiny().recipe, donor=base).plan.steps


def test_a_base_that_is_damaged_too_gives_no_file(tmp_path, whole):
    source = copy_of(whole, tmp_path / "source", cut)
    cut(whole / SECOND)
    assert not fix(source, tmp_path / "out", tiny().recipe, donor=whole, unsafe_fixes=True).plan.steps


def test_a_file_of_the_base_that_changes_meanwhile_is_refused(tmp_path, whole, monkeypatch):
    from doctor.edits.donor import Donor

    source = copy_of(whole, tmp_path / "source", cut)
    real = Donor._offer_file

    def then_changed(self, name):
        offer = real(self, name)
        raw = bytearray((whole / name).read_bytes())
        raw[-2] ^= 1
        (whole / name).write_bytes(raw)
        return offer

    monkeypatch.setattr(Donor, "_offer_file", then_changed)
    with pytest.raises(BadCheckpoint, match="the plan was made for"):
        fix(source, tmp_path / "out", tiny().recipe, donor=whole)
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


def test_a_shard_that_is_taken_can_be_edited_by_other_fixes(tmp_path):
    case = tiny(mlp=96)
    case.shards = 3
    case.recipe = case.recipe.with_field("tp", 2)
    base = case.write(tmp_path / "base")
    source = copy_of(base, tmp_path / "source", cut)
    result = fix(source, tmp_path / "out", case.recipe, donor=base, unsafe_fixes=("G302",))
    assert {s.code for s in result.plan.steps} == {"F001", "G302"} and not result.report.findings
    padded = fix(base, tmp_path / "padded", case.recipe, unsafe_fixes=("G302",))
    assert sha256(tmp_path / "out" / SECOND) == sha256(padded.output / SECOND)


def test_a_shard_that_cannot_be_read_is_taken_from_the_base(tmp_path, whole, monkeypatch):
    """Root reads everything, so the refusal is played."""
    import builtins

    source = copy_of(whole, tmp_path / "source")
    locked, real_os, real_open = str(source / SECOND), os.open, builtins.open

    def refused(real):
        def call(path, *args, **more):
            if isinstance(path, (str, os.PathLike)) and os.path.realpath(path) == locked:
                raise PermissionError(13, "Permission denied", locked)
            return real(path, *args, **more)

        return call

    monkeypatch.setattr(os, "open", refused(real_os))
    monkeypatch.setattr(builtins, "open", refused(real_open))
    result = fix(source, tmp_path / "out", tiny().recipe, donor=whole, unsafe_fixes=True)
    assert (
        [s.code for s in result.plan.steps] == ["F006"]
        and not result.report.findings
        and sha256(tmp_path / "out" / SECOND) == sha256(whole / SECOND)
    )
    (entry,) = json.loads(result.receipt_path.read_text())["written"]
    assert entry["sha256_before"] is None and entry["sha256_after"] == sha256(whole / SECOND)


# from the Hub


def test_one_file_is_fetched_from_the_hub_and_checked_by_its_hash(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    result = fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert {s.code for s in result.plan.steps} == {"F001"} and not result.report.findings
    assert sha256(tmp_path / "out" / SECOND) == sha256(whole / SECOND) and not left_over(tmp_path)
    receipt = json.loads(result.receipt_path.read_text())
    assert receipt["base"] == {"name": f"hf://org/name@{COMMIT}", "files": {SECOND: sha256(whole / SECOND)}}
    others = [e for e in fake.requests_for("/cdn/model-00003") if e[1] != "bytes=0-65535"]
    assert not others, "only headers of the other shards"


def test_a_revision_is_asked_for(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    assert fix(source, tmp_path / "out", tiny().recipe, donor="org/name@v1").report.ok and fake.requests_for(
        "/revision/v1"
    )


@pytest.fixture
def large(tmp_path):
    """A shard whose tensors lie behind what a header costs: MLPs of 2,048 channels."""
    return tiny(mlp=2048).write(tmp_path / "large")


def test_one_tensor_is_one_range_of_its_shard(fake, tmp_path, large):  # noqa: F811
    fake.put(large)
    case = tiny(mlp=2048)
    case.down()[3, 5] = 0x7FC0
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, donor="org/name")
    assert {s.code for s in result.plan.steps} == {"W201"} and not result.report.findings
    info = Checkpoint.open(large).tensors[case.name("down")]
    asked = [e[1] for e in fake.requests_for("/cdn/") if e[1] != "bytes=0-65535"]
    assert asked == [f"bytes={info.begin}-{info.end - 1}"]
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(large / "model.safetensors")


@pytest.mark.parametrize("what", ["shard", "tensor"])
def test_a_torn_network_leaves_nothing(fake, tmp_path, whole, what):  # noqa: F811
    fake.put(whole)
    if what == "shard":
        source, name = copy_of(whole, tmp_path / "source", cut), SECOND
    else:
        case = tiny()
        case.shards = 3
        case.down()[3, 5] = 0x7FC0
        source = case.write(tmp_path / "source")
        name = Checkpoint.open(whole).tensors[case.name("down")].shard
    before = {p.name: sha256(p) for p in source.iterdir()}
    real = fake.serve

    def breaks(request, data):
        asked = request.headers.get("Range")
        if data == fake.files[name] and not asked.endswith("-65535"):
            return torn(data, 10)(request)
        return real(request, data)

    fake.serve = breaks
    with pytest.raises(MachineError, match=f"{name}: incomplete after 5 tries"):
        fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert (
        not (tmp_path / "out").exists()
        and not left_over(tmp_path)
        and {p.name: sha256(p) for p in source.iterdir()} == before
    )


def test_a_connection_that_tears_once_goes_on(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    real, torn_once = fake.serve, []

    def breaks(request, data):
        if data == fake.files[SECOND] and not request.headers["Range"].endswith("-65535") and not torn_once:
            torn_once.append(1)
            return torn(data, 10)(request)
        return real(request, data)

    fake.serve = breaks
    assert fix(source, tmp_path / "out", tiny().recipe, donor="org/name").report.ok and torn_once
    assert sha256(tmp_path / "out" / SECOND) == sha256(whole / SECOND)


def test_a_file_whose_bytes_are_not_those_of_its_hash_is_refused(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    real = fake.serve

    def lies(request, data):
        if data == fake.files[SECOND]:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return real(request, data)

    fake.serve = lies
    with pytest.raises(BadCheckpoint, match=r"arrived with sha256 .*; the Hub states"):
        fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert not (tmp_path / "out").exists() and not left_over(tmp_path)


def test_a_hub_that_refuses_ends_the_fix_and_says_so(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    fake.failures["/resolve/"] = [refuse(403)] * 3
    with pytest.raises((MachineError, BadCheckpoint)):
        fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert not left_over(tmp_path)


def test_an_interrupted_fetch_is_removed_by_the_next_run(fake, tmp_path, whole):  # noqa: F811
    fake.put(whole)
    source = copy_of(whole, tmp_path / "source", cut)
    dead = tmp_path / ".out.doctor-fetch"
    dead.mkdir()
    (dead / SECOND).write_bytes(b"half")
    fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert not left_over(tmp_path)


def test_an_adapter_is_merged_into_a_base_of_the_hub_which_is_fetched_whole(fake, tmp_path, whole, monkeypatch):  # noqa: F811
    import doctor.rules.f022_adapter_without_base as module

    from doctor.fixing import donor_source

    source = module.bad()[0].write(tmp_path / "adapter")
    base = tiny().write(tmp_path / "base")
    fake.put(base)
    asked = []
    real = donor_source.open_checkpoint
    monkeypatch.setattr(
        donor_source,
        "open_checkpoint",
        lambda text, **more: asked.append(more) or (Checkpoint.open(base) if more else real(text)),
    )
    result = fix(source, tmp_path / "out", tiny().recipe, donor="org/name")
    assert {s.code for s in result.plan.steps} == {"F022"} and asked == [{}, {"download": True}]
    receipt = json.loads(result.receipt_path.read_text())
    assert receipt["base"]["files"] == {"model.safetensors": sha256(base / "model.safetensors")}
    assert receipt["written"][0]["sha256_before"] == sha256(base / "model.safetensors")
    assert not np.array_equal(Checkpoint.open(result.output).load(tiny().name("down")), tiny().down())


# other cures by whole files and by names


def test_a_tokenizer_is_taken_from_the_base_only_as_an_unsafe_fix(tmp_path):
    base = tiny().write(tmp_path / "base")
    source = copy_of(base, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    assert not fix(source, tmp_path / "safe", tiny().recipe, donor=base).plan.steps
    result = fix(source, tmp_path / "out", tiny().recipe, donor=base, unsafe_fixes=True)
    assert {s.code for s in result.plan.steps} == {"C110"} and sha256(tmp_path / "out" / "tokenizer.json") == sha256(
        base / "tokenizer.json"
    )


def test_weights_that_are_all_lost_are_taken_with_their_index(tmp_path, whole):
    source = copy_of(whole, tmp_path / "source")
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    result = fix(source, tmp_path / "out", tiny().recipe, donor=whole, unsafe_fixes=True)
    assert {s.code for s in result.plan.steps} == {"F021"} and not result.report.findings
    assert all(sha256(tmp_path / "out" / p.name) == sha256(p) for p in whole.glob("model*"))


def test_a_template_that_does_not_parse_is_taken_from_the_base(tmp_path):
    case = tiny()
    case.json["tokenizer_config.json"]["chat_template"] = "{{ messages }}"
    base = case.write(tmp_path / "base")
    case.json["tokenizer_config.json"]["chat_template"] = "{% if %}"
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, donor=base, unsafe_fixes=True)
    assert "C109" in {s.code for s in result.plan.steps}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("shards", [1, 3])
def test_wrapped_names_are_unwrapped_and_no_byte_of_a_tensor_changes(tmp_path, shards):
    case = tiny()
    case.tensors = {f"module.{n.replace('layers.', 'layers._orig_mod.')}": a for n, a in case.tensors.items()}
    case.dtypes = dict.fromkeys(case.tensors, "BF16")
    case.shards = shards
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe)
    out, want = Checkpoint.open(tmp_path / "out"), tiny()
    assert {s.code for s in result.plan.steps} == {"F058"} and not check(tmp_path / "out", case.recipe).findings
    assert out.tensors.keys() == want.tensors.keys() and all((out.load(n) == a).all() for n, a in want.tensors.items())


def test_two_tensors_never_get_one_name(tmp_path):
    from doctor.core.errors import PlanRefused
    from doctor.edits.kinds import RenameTensor
    from doctor.edits.overlay import EditedCheckpoint

    source = Checkpoint.open(tiny().write(tmp_path / "source"))
    first, second, *_ = source.tensors
    for edits in ([RenameTensor(first, second)], [RenameTensor(first, "x"), RenameTensor(second, "x")]):
        with pytest.raises(PlanRefused, match="two tensors would have this name"):
            EditedCheckpoint(source, edits)
    swapped = EditedCheckpoint(source, [RenameTensor(first, second), RenameTensor(second, first)])
    assert (swapped.load(first) == source.load(second)).all() and (swapped.load(second) == source.load(first)).all()


def test_a_format_is_written_into_the_header_by_name_only(tmp_path):
    import doctor.rules.f026_no_format_metadata as module

    source = module.bad()[0].write(tmp_path / "source")
    assert not fix(source, tmp_path / "none", tiny().recipe, unsafe_fixes=True).plan.steps
    fix(source, tmp_path / "out", tiny().recipe, unsafe_fixes=("F026",))
    out = Checkpoint.open(tmp_path / "out")
    assert out.shards["model.safetensors"].metadata == {"format": "pt"}
    assert all((out.load(n) == a).all() for n, a in tiny().tensors.items())


# files under new names

FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
NEW = "model-00007-of-00009.safetensors"


def of_names(case, tmp_path, *numbers):
    case.shards = len(numbers)
    case.damage.append(rename_parts(*numbers))
    return case.write(tmp_path / "source")


def read(view, shard):
    with view.open_file(shard) as file:
        return file.read(0, file.size())


def test_a_renamed_shard_is_linked_and_the_index_keeps_its_text_but_for_the_name(tmp_path, whole):
    view = EditedCheckpoint(Checkpoint.open(whole), [RenameFile(SECOND, NEW)])
    assert list(view.shards) == [FIRST, LAST, NEW] == [n for n in view.entries if n.startswith("model-")]
    assert {t.shard for t in view.shards[NEW].tensors} == {NEW} and not view.missing_shards
    assert view.json[INDEX_NAME].raw == (whole / INDEX_NAME).read_bytes().replace(SECOND.encode(), NEW.encode())
    assert view.changed == {INDEX_NAME} and view.origin(NEW) == SECOND and view.new_name(SECOND) == NEW
    assert read(view, NEW) == (whole / SECOND).read_bytes() and view.path(NEW) == whole / SECOND
    name = view.shards[NEW].tensors[0].name
    assert (view.load(name) == Checkpoint.open(whole).load(name)).all()


@pytest.mark.parametrize("edit", ["pad", "drop", "drop here", "format", "rename", "index", "base", "swap"])
def test_a_new_name_goes_with_every_other_edit_of_the_shard(tmp_path, whole, edit):
    """As if the one had been done after the other; a chain of names loses no file."""
    source = Checkpoint.open(whole)
    name = source.shards[SECOND].tensors[0].name
    first = {
        "pad": lambda: [PadTensor(name, 0, 200)],
        "drop": lambda: [DropTensor(name)],
        "drop here": lambda: [DropTensor(name, SECOND)],
        "format": lambda: [NameFormat(SECOND)],
        "rename": lambda: [RenameTensor(name, "x.y")],
        "index": lambda: [RebuildIndex()],
        "base": lambda: [TakeFile(SECOND, str(copy_of(whole, tmp_path / "base")), sha256(whole / SECOND))],
        "swap": lambda: [RenameFile(LAST, SECOND)],
    }[edit]()
    view = EditedCheckpoint(source, [*first, RenameFile(SECOND, NEW)])
    alone = EditedCheckpoint(source, first if edit != "swap" else [])
    if edit == "swap":
        assert read(view, NEW) == (whole / SECOND).read_bytes() and read(view, SECOND) == (whole / LAST).read_bytes()
    else:
        assert read(view, NEW) == read(alone, SECOND)
        assert {
            n: t._replace(shard=SECOND if t.shard == NEW else t.shard) for n, t in view.tensors.items()
        } == alone.tensors
        assert view.index == json.loads(json.dumps(alone.index).replace(SECOND, NEW))
    assert view.substituted == ({NEW} if edit == "base" else set())


@pytest.mark.parametrize(
    "edits, message",
    [
        ([RenameFile(SECOND, LAST)], "belongs to another file"),
        ([RenameFile(SECOND, NEW), RenameFile(LAST, NEW)], "belongs to another file"),
        ([RenameFile("config.json", NEW)], "config.json: not a weight file"),
        ([RenameFile(NEW, SECOND)], "not a weight file"),
        ([RenameFile(SECOND, "../x.safetensors")], "is not a valid name of a weight file"),
        ([RenameFile(SECOND, "x.bin")], "is not a valid name of a weight file"),
        ([RenameFile(SECOND, NEW), DropFile(SECOND)], "one edit drops it and another renames it to"),
    ],
)
def test_a_name_that_is_not_free_or_no_name_is_refused(whole, edits, message):
    with pytest.raises(PlanRefused, match=message):
        EditedCheckpoint(Checkpoint.open(whole), edits)


def test_a_name_that_the_index_has_for_lost_tensors_is_not_free(whole):
    (whole / LAST).unlink()
    with pytest.raises(PlanRefused, match="belongs to another file"):
        EditedCheckpoint(Checkpoint.open(whole), [RenameFile(SECOND, LAST)])


def test_parts_of_a_whole_model_are_numbered_anew_and_no_weight_is_written(tmp_path):
    case = tiny()
    source = of_names(case, tmp_path, "1-of-5", "3-of-5", "5-of-5")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    result = fix(source, tmp_path / "out", case.recipe)
    assert (
        [s.code for s in result.plan.steps] == ["F027"]
        and not result.report.findings
        and result.plan.files_written == [INDEX_NAME]
    )
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    for old, new in (("model-00001-of-00005", FIRST), ("model-00003-of-00005", SECOND), ("model-00005-of-00005", LAST)):
        assert (result.output / new).read_bytes() == (source / f"{old}.safetensors").read_bytes()
    assert (
        result.plan.after.bytes_read == 0 and not check(result.output, case.recipe).findings
    )  # what has a new name alone is not read twice
    assert "model-00003-of-00005.safetensors → model-00002-of-00003.safetensors" in result.plan.steps[0].notes


def test_parts_that_were_lost_or_are_of_two_saves_are_not_numbered_anew_unasked(tmp_path):
    case = tiny()
    of_names(case, tmp_path, "1-of-2", "2-of-3")
    assert not fix(tmp_path / "source", tmp_path / "none", case.recipe, unsafe_fixes=True).plan.steps
    assert [
        s.code for s in fix(tmp_path / "source", tmp_path / "out", case.recipe, unsafe_fixes=["F027"]).plan.steps
    ] == ["F027"]
    lost = tiny()
    of_names(lost, tmp_path / "lost", "1-of-3", "3-of-3")
    name = lost.name("down")
    del lost.tensors[name]
    lost.write(tmp_path / "less")
    (item,) = [f for f in check(tmp_path / "less", lost.recipe).findings if f.code == "F027"]
    assert item.fix.safety == "manual" and not item.fix.edits


def test_a_new_name_goes_with_the_cures_of_other_rules_in_place_and_back(tmp_path):
    """One shard with NaN is written under its new name, and every finding that stays is the one that was there."""
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    case.tensors[case.name("up", 1)][:] = 0
    source = of_names(case, tmp_path, "1-of-4", "3-of-4")
    before = {p.name: sha256(p) for p in source.iterdir()}
    result = fix(source, None, case.recipe, in_place=True, unsafe_fixes=("W201",))
    assert {s.code for s in result.plan.steps} == {"F027", "W201"} and {f.code for f in result.report.findings} == {
        "W202",
        "W204",
        "W209",
    }
    assert result.plan.files_written in (
        [SECOND.replace("3.", "2."), INDEX_NAME],
        [FIRST.replace("3.", "2."), INDEX_NAME],
    )
    receipt = json.loads(result.receipt_path.read_text())
    (shard,) = [w for w in receipt["written"] if w["file"] != INDEX_NAME]
    assert shard["sha256_before"] in before.values() and shard["sha256_after"] == sha256(source / shard["file"])
    assert "is as it was before the fix" in undo(source)[0]
    assert {p.name: sha256(p) for p in source.iterdir()} == before


def test_a_damaged_shard_is_taken_from_the_base_and_gets_its_name(tmp_path):
    case = tiny()
    base = of_names(case, tmp_path / "base", "1-of-4", "3-of-4")
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        (source / path.name).write_bytes(path.read_bytes()[: -100 if "00003-of" in path.name else None])
    result = fix(source, tmp_path / "out", case.recipe, donor=base)
    assert {s.code for s in result.plan.steps} == {"F001", "F027"} and not result.report.findings
    assert sha256(result.output / "model-00002-of-00002.safetensors") == sha256(
        base / "model-00003-of-00004.safetensors"
    )
    assert json.loads(result.receipt_path.read_text())["base"]["files"].keys() == {"model-00003-of-00004.safetensors"}


def test_a_renamed_shard_is_quantized_through_the_view(tmp_path):
    case = tiny()
    source = of_names(case, tmp_path, "1-of-4", "3-of-4")
    plain = tiny()
    plain.shards = 2
    recipe = Recipe(method="rtn", group_size=32)
    outs = [
        quantize(folder, tmp_path / f"out{i}", recipe, fix=True).output
        for i, folder in enumerate((source, plain.write(tmp_path / "plain")))
    ]
    weights = [{p.name: sha256(p) for p in out.glob("*.safetensors")} for out in outs]
    assert weights[0] == weights[1] and weights[0]


def test_every_rule_stands_in_the_table_with_its_cure_or_the_reason_why_there_is_none(capsys):
    import runpy
    from pathlib import Path

    from doctor.lint.engine import load_rules

    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "list_fixes.py"))["main"]()
    lines = [
        line.split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ") and "rule |" not in line
    ]
    assert {line[0][2:6] for line in lines} == {r.code for r in load_rules()}
    without = {line[0][2:6]: line[3].rstrip(" |") for line in lines if line[1] == "-"}
    assert len(without) < 0.4 * len(lines) and not {
        c: why for c, why in without.items() if len(why) < 10 or why.startswith("manual")
    }
