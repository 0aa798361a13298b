"""Tables are read when they are asked for, and every family's file says what its readers need."""

import subprocess
import sys

import pytest

from doctor.core import tables
from doctor.model.expressions import keys_of

NEEDED = {"model_type", "architecture", "verified", "config_keys", "tensor"}
ROLES = {
    "q",
    "k",
    "v",
    "o",
    "qkv",
    "gate",
    "up",
    "down",
    "gate_up",
    "q_a",
    "q_b",
    "kv_a",
    "kv_b",
    "router",
    "shared_gate",
} | {"linear_attn_in", "linear_attn_out", "linear_attn_gate", "indexer", None}
KEYS = {"name", "shape", "role", "transposed", "bias", "norm_before", "norm", "layers", "only_with", "only_without"}


@pytest.mark.parametrize("name", tables.family_names())
def test_a_familys_file_is_complete(name):
    entry = tables.family(name)
    assert entry.keys() >= NEEDED and entry["tensor"]
    for item in entry["tensor"]:
        assert item.keys() <= KEYS and item.get("role") in ROLES, item
        assert all(isinstance(size, str) and isinstance(keys_of(size), tuple) for size in item["shape"])
        assert item.get("layers") is None or item["layers"] in entry["kinds"]
    places = [(i["name"], i.get("layers"), i.get("only_without")) for i in entry["tensor"]]
    assert len(set(places)) == len(places)
    assert set(entry["kinds"]) == {i["layers"] for i in entry["tensor"] if "layers" in i}
    assert (name, entry["model_type"]) in tables.families_of(entry["architecture"])


def test_only_the_file_of_the_family_is_parsed(monkeypatch):
    parsed, parse = [], tables.parse_family
    monkeypatch.setattr(tables, "parse_family", lambda text: parsed.append(text) or parse(text))
    tables.family.cache_clear()
    assert tables.family("mixtral")["architecture"] == "MixtralForCausalLM" and tables.family("mixtral")
    assert len(parsed) == 1 and tables.family("no such family") == {} == tables.family(None)


def test_a_name_from_a_config_is_no_path():
    assert tables.family("../stacks") == {} and tables.family("architectures/llama") == {}


def test_help_reads_no_family():
    code = (
        "import sys; opened = []; sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None); "
        "import doctor.cli.main; print(sum('architectures' in p for p in opened))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "0", run.stderr


def test_a_class_of_several_families_is_first_of_all_its_own():
    assert [name for name, _ in tables.families_of("LlamaForCausalLM")] == ["llama", "exaone", "internlm3"]
    assert tables.families_of("FalconForCausalLM")[0] == ("falcon", "falcon")
