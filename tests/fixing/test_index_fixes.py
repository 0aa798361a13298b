"""Indexes of another save, and tensors that two shards hold: what the fix writes is what transformers then loads."""

import json

import numpy as np
import pytest
from healthy_models import save

from doctor.api import check, fix
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import shard_bytes

RECIPE = Recipe(group_size=32)
INDEX = "model.safetensors.index.json"


def sharded(folder, parts, names="model-{:05d}-of-{:05d}.safetensors", total=None):
    """A tiny Llama in so many shards, and the tensors that it holds."""
    source = Checkpoint.open(save("llama", folder, tie=False))
    tensors = {n: source.load(n) for n in sorted(source.tensors)}
    (folder / "model.safetensors").unlink()
    where = {}
    for part in range(parts):
        file = names.format(part + 1, total or parts)
        own = {n: tensors[n] for n in list(tensors)[part::parts]}
        (folder / file).write_bytes(shard_bytes(own, dict.fromkeys(own, "BF16")))
        where |= dict.fromkeys(own, file)
    write_index(folder, where, tensors)
    return tensors


def write_index(folder, where, tensors):
    size = sum(a.nbytes for a in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2))


def findings(folder):
    report = check(folder, RECIPE)
    assert not report.crashed, [r.crashed for r in report.crashed]
    return [f for f in report.findings if not f.consequence_of]


def logits(folder):
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(torch.arange(1, 33)[None]).logits


def spread(tensors, files):
    """An index that spreads the tensors over so many files, in the order of their names."""
    names = sorted(tensors)
    return {n: f"model-{i * files // len(names) + 1:05d}-of-{files:05d}.safetensors" for i, n in enumerate(names)}


@pytest.mark.parametrize("total", [6, 3], ids=["shards named of 6", "no listed file exists"])
def test_a_stale_index_is_rebuilt_and_nothing_is_fetched(total, tmp_path):
    import torch

    folder = tmp_path / "model"
    tensors = sharded(folder, 3, total=total)
    right = logits(folder)  # with the right index
    write_index(folder, spread(tensors, 6), tensors)
    if total == 3:
        assert not set(Checkpoint.open(folder).weight_map.values()) & {p.name for p in folder.iterdir()}
    [only] = findings(folder)
    assert only.code == "F028" and only.fix.safety == "safe" and f"the {len(tensors)} tensors" in only.message
    assert not any("fetch" in f.fix.title for f in findings(folder))
    fix(folder, tmp_path / "fixed", RECIPE)
    assert not findings(tmp_path / "fixed") and torch.equal(logits(tmp_path / "fixed"), right)
    assert set(Checkpoint.open(tmp_path / "fixed").shards) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}


def test_a_missing_shard_whose_tensors_are_nowhere_must_be_fetched(tmp_path):
    sharded(tmp_path / "model", 3)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    codes = {f.code for f in check(tmp_path / "model", RECIPE).findings}
    assert "F010" in codes and "F028" not in codes


def test_an_index_with_most_tensors_in_the_wrong_shard_is_one_finding(tmp_path):
    tensors = sharded(tmp_path / "model", 3)
    write_index(tmp_path / "model", spread(tensors, 3), tensors)
    [only] = findings(tmp_path / "model")
    assert only.code == "F028" and "in shards that do not hold them" in only.message


def overlaid(folder):
    """A model whose author put new values of two tensors into an overlay and left the old ones in the base shard."""
    tensors = sharded(folder, 1)
    names = ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    new = {n: tensors[n] ^ np.uint16(0x8000) for n in names}  # the other sign
    (folder / "model-overlay-00001.safetensors").write_bytes(shard_bytes(new, dict.fromkeys(new, "BF16")))
    where = {n: "model-overlay-00001.safetensors" if n in new else "model-00001-of-00001.safetensors" for n in tensors}
    write_index(folder, where, tensors)
    return tensors | new


def test_the_copy_that_the_index_names_is_kept_and_the_stale_bytes_are_dropped(tmp_path):
    meant = overlaid(tmp_path / "model")
    found = findings(tmp_path / "model")
    assert [(f.code, f.fix.safety, f.fix.by_name) for f in found] == [("F016", "unsafe", False)] * 2
    assert all("the index names model-overlay-00001.safetensors" in f.message for f in found)
    fix(tmp_path / "model", tmp_path / "fixed", RECIPE, unsafe_fixes=True)
    fixed = Checkpoint.open(tmp_path / "fixed")
    assert not findings(tmp_path / "fixed")
    assert all(np.array_equal(fixed.load(name), value) for name, value in meant.items())
    held = [(t.name, s.name) for s in fixed.shards.values() for t in s.tensors]
    assert len(held) == len(meant) == len(dict(held))
    assert dict(held)["model.layers.0.self_attn.o_proj.weight"] == "model-overlay-00001.safetensors"
    logits(tmp_path / "fixed")


def test_the_copy_in_the_base_shard_is_kept_where_the_index_names_it(tmp_path):
    """The other choice: it is the index that decides, not the order or the names of the files."""
    overlaid(tmp_path / "model")
    tensors = {n: a for n, a in sharded(tmp_path / "other", 1).items()}
    write_index(tmp_path / "model", dict.fromkeys(tensors, "model-00001-of-00001.safetensors"), tensors)
    assert not [f for f in findings(tmp_path / "model") if f.code == "F016"], "files beside the index are not read"
    where = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    extra = "model.layers.1.mlp.down_proj.weight"
    where[extra] = "model-overlay-00001.safetensors"
    write_index(tmp_path / "model", where, tensors)
    fix(tmp_path / "model", tmp_path / "fixed", RECIPE, unsafe_fixes=True)
    fixed = Checkpoint.open(tmp_path / "fixed")
    first = "model.layers.0.self_attn.o_proj.weight"
    assert np.array_equal(fixed.load(first), tensors[first])
    assert not np.array_equal(fixed.load(extra), tensors[extra])


def test_a_rebuilt_index_keeps_the_shard_of_another_name_that_it_lists(tmp_path):
    """A wrong total_size beside an overlay: the fix of the one must not undo the other."""
    meant = overlaid(tmp_path / "model")
    fix(tmp_path / "model", tmp_path / "once", RECIPE, unsafe_fixes=True)
    index = json.loads((tmp_path / "once" / INDEX).read_text())
    index["metadata"]["total_size"] += 4096
    (tmp_path / "once" / INDEX).write_text(json.dumps(index))
    [only] = findings(tmp_path / "once")
    assert only.code == "F014"
    fix(tmp_path / "once", tmp_path / "twice", RECIPE)
    fixed = Checkpoint.open(tmp_path / "twice")
    assert all(np.array_equal(fixed.load(name), value) for name, value in meant.items())
