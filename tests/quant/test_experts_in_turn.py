"""A mixture's experts one after the other: the same bytes as all at once, with the Hessians and weights of one."""

import json
import random

import pytest
from healthy_models import save

from doctor import api
from doctor.core.recipe import Recipe
from doctor.model.linears import Linear
from doctor.quant import setup
from doctor.quant.forward.linear_groups import in_turn
from doctor.quant.forward.staged import StagedForward
from doctor.quant.forward.stored_linear import StoredLinear

ALL = 1 << 30


def rows(folder):
    rng = random.Random(0)
    path = folder / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(47)]}) for _ in range(8))
    )
    return path


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("family, method", [("qwen3_moe", "gptq"), ("qwen3_moe", "awq"), ("gpt_oss", "gptq")])
def test_however_many_experts_are_in_memory_the_bytes_are_the_same(family, method, tmp_path, monkeypatch):
    experts = {"num_experts": 6, "num_local_experts": 6} if family == "qwen3_moe" else {}
    save(family, tmp_path / "m", num_hidden_layers=1, **experts)
    written, together = {}, {}
    real = StagedForward.hessians

    def counted(self, stage):
        found = real(self, stage)
        together[count] = max(together.get(count, 0), len(found))
        held = [m for e in self._experts for m in e.experts.modules() if isinstance(m, StoredLinear)]
        assert all(m._parameters["weight"].is_meta for m in held)
        return found

    monkeypatch.setattr(StagedForward, "hessians", counted)
    for count in (1, 3, ALL):
        monkeypatch.setattr(setup, "EXPERTS_AT_ONCE", count)
        done = api.quantize(
            tmp_path / "m",
            tmp_path / f"o{count}",
            Recipe(method=method, group_size=32),
            calibration=rows(tmp_path),
            max_seq_length=48,
        )
        written[count] = bytes_of(done.output)
    assert written[1] == written[3] == written[ALL]
    assert together[1] == 1 < together[3] <= 3 < together[ALL]


def test_experts_in_turn_keep_the_order_of_computing():
    names = ["q", *(f"e.{e}.{role}" for role in ("up", "down") for e in range(3)), "s"]
    linears = {n: Linear(n, n, n[-1], 0, 8, 8, expert=int(n[2]) if n[0] == "e" else None) for n in names}
    stages = [[["q"]], [["e.0.up"], ["e.1.up"], ["e.2.up"]], [["e.0.down"], ["e.2.down"], ["e.1.down"]], [["s"]]]
    inside = {n for n in names if n[0] == "e"}
    want = [[["q"]], *([[f"e.{e}.{role}"]] for e in range(3) for role in ("up", "down")), [["s"]]]
    assert in_turn(stages, linears, inside, 1) == want
    assert in_turn(stages, linears, inside, 2)[1:3] == [[["e.0.up"], ["e.1.up"]], [["e.0.down"], ["e.1.down"]]]
    assert in_turn(stages, linears, inside, ALL) == stages
    assert in_turn(stages, linears, set(), 1) == stages  # a module that takes all of them at once
