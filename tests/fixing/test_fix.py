"""fix from end to end: planted defects in every family, the proof by logits, and crashes at every step."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.edits.kinds import PadTensor, SetJson
from doctor.edits.overlay import EditedCheckpoint
from doctor.evaluate import proof
from doctor.evaluate.proof import prove
from doctor.fixing.consent import Consent
from doctor.fixing.filesystem import sha256
from doctor.fixing.plan import make_plan
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES
from doctor.lint.testing import FAMILIES, rename_parts, tiny
from doctor.report.plan_text import render_plan

KILLS = int(os.environ.get("DOCTOR_TEST_KILLS", "4"))


def digests(folder):
    return {p.name: sha256(p) for p in sorted(folder.iterdir())}


def spoiled(tmp_path, shards=2):
    """A checkpoint with a safe, an unsafe and a by-name defect: end token, MLP width under tp 2, NaN."""
    case = tiny("llama")
    case.shards = shards
    case.recipe = case.recipe.with_field("tp", 2)
    narrow(case, 96)
    case.json["generation_config.json"]["eos_token_id"] = 0
    case.down()[0, 0] = 0x7FC0
    return case, case.write(tmp_path / "source")


def narrow(case, width):
    """Cut a gated MLP to `width` channels."""
    case.config["intermediate_size"] = width
    for name, codes in case.tensors.items():
        if ".mlp." in name:
            case.tensors[name] = np.ascontiguousarray(codes[:, :width] if "down" in name else codes[:width])


ALL = ("G302", "W201")


def test_everything_is_cured_and_the_receipt_says_how(tmp_path):
    case, source = spoiled(tmp_path)
    before = digests(source)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=ALL)
    assert digests(source) == before
    assert {s.code for s in result.plan.steps} == {"W201", "G302", "C105"}
    assert not check(tmp_path / "out", case.recipe).findings and result.report.ok
    receipt = json.loads(result.receipt_path.read_text())
    assert receipt["schema"] == "doctor.receipt/1" and {s["code"] for s in receipt["steps"]} == {"W201", "G302", "C105"}
    after = digests(tmp_path / "out")
    for entry in receipt["written"]:
        assert entry["sha256_after"] == after[entry["file"]] and entry["sha256_before"] == before[entry["file"]]
    for entry in receipt["unchanged"]:
        assert after[entry["file"]] == before[entry["file"]] and entry["how"] in ("copied", "reflinked")
    assert {e["file"] for e in receipt["written"] + receipt["unchanged"]} | {"doctor.json"} == set(after)
    assert {f["code"] for f in receipt["findings_before"]} == {"W201", "G302", "C105"} and not receipt["findings_after"]
    assert [p["status"] for p in receipt["proofs"]] == ["equal"]
    assert receipt["bytes_written"] == result.plan.bytes_to_write + sum(
        e["bytes"] for e in receipt["unchanged"] if e["how"] == "copied"
    )
    sizes = [(tmp_path / "out" / n).stat().st_size for n in result.plan.files_written]
    assert sum(sizes) == result.plan.bytes_to_write


def test_the_second_run_finds_nothing_to_do_and_gives_every_file(tmp_path):
    case, source = spoiled(tmp_path)
    fix(source, tmp_path / "out", case.recipe, unsafe_fixes=ALL)
    again = fix(tmp_path / "out", tmp_path / "out2", case.recipe, unsafe_fixes=ALL)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert again.receipt_path is not None and {p.name for p in (tmp_path / "out2").iterdir()} == files
    for name in files - {again.receipt_path.name}:
        one, other = tmp_path / "out" / name, tmp_path / "out2" / name
        assert one.read_bytes() == other.read_bytes() and not os.path.samefile(one, other)
    assert "Nothing to fix: the output is a copy of all" in render_plan(again)
    there = fix(tmp_path / "out", None, case.recipe, unsafe_fixes=ALL, in_place=True)
    assert there.receipt_path is None and "Nothing to fix: nothing was written." in render_plan(there)


def test_errors_that_no_fix_applies_to_leave_no_output_behind(tmp_path):
    case, source = spoiled(tmp_path)
    left = fix(source, tmp_path / "out", case.recipe, only=["F001"])
    assert not left.plan.steps and left.receipt_path is None and not (tmp_path / "out").exists()


def test_a_fix_of_a_fixed_checkpoint_quotes_the_earlier_receipt(tmp_path):
    case, source = spoiled(tmp_path)
    fix(source, tmp_path / "one", case.recipe)
    second = fix(tmp_path / "one", tmp_path / "two", case.recipe, unsafe_fixes=ALL)
    receipt = json.loads(second.receipt_path.read_text())
    assert [s["code"] for s in receipt["previous"]["steps"]] == ["C105"]


def test_the_same_input_gives_the_same_output_and_receipt(tmp_path):
    case, source = spoiled(tmp_path)
    for name in ("one", "two"):
        fix(source, tmp_path / name, case.recipe, unsafe_fixes=ALL)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path):
    case, source = spoiled(tmp_path)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True, dry_run=True)
    assert os.listdir(tmp_path) == ["source"]
    text = render_plan(result)
    expected = f"""\
1  C105  safe     set "eos_token_id": [2, 0] (stop at either)
   --- generation_config.json
   +++ out/generation_config.json
   @@ -3,1 +3,1 @@
   -  "eos_token_id": 0,
   +  "eos_token_id": [2, 0],
2  G302  unsafe   {result.plan.waiting[0].title}  (waits for W201)
   --- config.json
   +++ out/config.json
   @@ -7,1 +7,1 @@
   -  "intermediate_size": 96,
   +  "intermediate_size": 128,
"""
    assert text.startswith(expected)
    assert "   ~ model.layers.{0-1}.mlp.down_proj.weight  bf16 [64, 96] → [64, 128]\n" in text
    assert "-  W201  by name  replace the non-finite values by 0   (with --unsafe-fixes=W201)\n" in text
    assert "Would fix 1 of 3 findings now, 1 more once W201 is gone. Would write 1 file (71 bytes)" in text
    assert text.endswith("Nothing was written. Exit 1: G302 and W201 would remain.\n")


def test_without_consent_only_safe_fixes_are_done(tmp_path):
    case, source = spoiled(tmp_path)
    result = fix(source, tmp_path / "out", case.recipe)
    assert [s.code for s in result.plan.steps] == ["C105"] and not result.report.ok
    name = "model-00001-of-00002.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "✓  C105" in render_plan(result) and "undo: delete" in render_plan(result)


def test_unknown_codes_are_refused(tmp_path):
    from doctor.core.errors import DoctorError

    with pytest.raises(DoctorError, match="'W999': no rule has this code") as error:
        fix(tiny().write(tmp_path / "source"), tmp_path / "out", only=("W999",))
    assert error.value.hint == "Did you mean W214, W213, W212?"


# the law of every rule that offers a fix

RULES_WITH_EXAMPLES = load_rules()


@pytest.mark.parametrize("code", [r.code for r in RULES_WITH_EXAMPLES])
def test_the_fix_of_every_rule_cures_its_own_bad_example_and_adds_nothing(code, tmp_path):
    entry = RULES[code]
    case, _ = sys.modules[entry.module].bad()
    source = Checkpoint.open(case.write(tmp_path / "source"))
    facts = [(s, n, v) for (s, n), v in case.facts.items()]
    consent = Consent(unsafe=True, codes=frozenset({code}), only=frozenset({code}))
    plan = make_plan(source, case.recipe, RULES_WITH_EXAMPLES, consent, facts=facts)
    assert not plan.problems
    own = [f for f in plan.before.findings if f.code == code]
    offered = [f for f in own if consent.can_carry_out(f.fix)]
    if not offered:
        assert not plan.steps and [f.code for f in plan.after.findings].count(code) == len(own)
        return
    assert [s.code for s in plan.steps] == [code], [s.waits for s in plan.waiting]
    assert not [f.message for f in plan.after.findings if f.code == code and consent.can_carry_out(f.fix)]


# proof

WIDTHS = {"qwen2_moe": "moe_intermediate_size", "opt": "ffn_dim"}


def padding(case, source, *, fused_blocks=2):
    """Edits that grow every MLP by 32 channels."""
    key = WIDTHS.get(case.family, "intermediate_size")
    old = case.config[key]
    new, edits = old + 32, [SetJson("config.json", f"/{key}", old + 32, old)]
    for name in source.tensors:
        if case.family == "qwen2_moe" and ".experts." not in name:
            continue
        if "gate_up_proj" in name:
            edits.append(PadTensor(name, 0, 2 * new, blocks=fused_blocks))
        elif any(part in name for part in ("gate_proj", "up_proj", "fc1")):
            edits.append(PadTensor(name, 0, new))
        elif "down_proj" in name or "fc2.weight" in name:
            edits.append(PadTensor(name, 1, new))
    return edits


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_leaves_the_logits_of_every_family_as_they_were(tmp_path, family):
    case = tiny(family)
    source = Checkpoint.open(case.write(tmp_path / "source"))
    found = prove(source, EditedCheckpoint(source, padding(case, source)))
    assert found.status in ("equal", "agrees"), found
    assert found.largest_logit > 0.5 and found.blocks is None


def test_padding_a_fused_matrix_at_its_end_is_caught(tmp_path):
    case = tiny("phi3")
    source = Checkpoint.open(case.write(tmp_path / "source"))
    edits = [
        e if not isinstance(e, PadTensor) else PadTensor(e.tensor, e.axis, e.size, 1, spread=False)
        for e in padding(case, source)
    ]
    found = prove(source, EditedCheckpoint(source, edits))
    assert found.status == "differs" and found.max_difference > 0.01


def test_a_model_that_cannot_be_built_is_a_proof_not_run_with_its_reason(tmp_path):
    case = tiny()
    case.config["model_type"] = "nobody_knows"
    source = Checkpoint.open(case.write(tmp_path / "source"))
    found = prove(source, source)
    assert found.status == "not run" and "has no model of type 'nobody_knows'" in found.detail
    del case.config["model_type"]
    case.config["model_type"] = "llama"
    del case.tensors[case.name("down")]
    found = prove(*[Checkpoint.open(case.write(tmp_path / "less"))] * 2)
    assert found.status == "not run" and "finds no fitting tensor for" in found.detail


def test_a_model_too_large_is_proved_on_its_first_blocks_and_says_so(tmp_path, monkeypatch):
    case = tiny()
    source = Checkpoint.open(case.write(tmp_path / "source"))
    monkeypatch.setattr(proof, "TRUNCATED_LAYERS", 1)
    whole, part = proof._need(source, None), proof._need(source, 1)
    assert part < whole
    monkeypatch.setattr(os, "sysconf", lambda name: (part + whole) if name == "SC_AVPHYS_PAGES" else 1)
    found = prove(source, EditedCheckpoint(source, padding(case, source)))
    assert found.status in ("equal", "agrees") and found.blocks == 1 and "first 1 decoder layers only" in found.detail
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert prove(source, source).status == "not run"


def test_logits_that_differ_stop_the_fix(tmp_path, monkeypatch):
    case, source = spoiled(tmp_path)
    real = proof.logits
    calls = []

    def wrong(checkpoint, blocks=None, vocabulary=None):
        calls.append(1)
        return real(checkpoint, blocks, vocabulary) * (1 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(proof, "logits", wrong)
    with pytest.raises(PlanRefused, match="the logits differ: logits on 4 fixed prompts differ by at most"):
        fix(source, tmp_path / "out", case.recipe, unsafe_fixes=ALL)
    assert os.listdir(tmp_path) == ["source"]


def test_a_proof_not_run_is_in_the_receipt_and_among_the_findings(tmp_path, monkeypatch):
    case, source = spoiled(tmp_path)

    def cannot(checkpoint, blocks=None, vocabulary=None):
        raise proof.CannotBuild("no such model here")

    monkeypatch.setattr(proof, "logits", cannot)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=ALL)
    assert [p["status"] for p in json.loads(result.receipt_path.read_text())["proofs"]] == ["not run"]
    assert [f.message.rpartition(": ")[2] for f in result.report.findings] == ["no such model here"]
    assert "proof: not run: no such model here" in render_plan(result)


# crashes

RUNNER = """
import errno, os, sys
sys.path.insert(0, {root!r})
from doctor.api import fix
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.checkpoint.directory import Checkpoint

NAMES = ("open", "mkdir", "rename", "link", "fsync", "write", "copy_file_range", "listdir", "statvfs")

def arm(at, code):
    count = [0]
    for name in NAMES:
        real = getattr(os, name)
        def call(*a, _real=real, _name=name, **k):
            count[0] += 1
            if count[0] == at:
                raise OSError(code, os.strerror(code))
            return _real(*a, **k)
        setattr(os, name, call)
    return count
"""


def run_all_failures(source, out, code, codes):
    """Run fix in one process with its n-th system call failing, for every n; one line per n: what became of it."""
    script = (
        RUNNER.format(root=os.getcwd())
        + f"""
saved = {{n: getattr(os, n) for n in NAMES}}
recipe = Recipe(group_size=32, tp=2)
checkpoint = Checkpoint.open({str(source)!r})
import doctor.evaluate.proof as proof
from doctor.fixing.proof import Proof
proof.prove = lambda a, b: Proof("equal", "not the subject here")
import shutil
fix(checkpoint, {str(out)!r} + "-warm", recipe, unsafe_fixes={codes})
n = 0
while True:
    n += 1
    target = {str(out)!r} + f"-{{n}}"
    count = arm(n, {code})
    try:
        fix(checkpoint, target, recipe, unsafe_fixes={codes}, copy=n % 2 == 0)
        word = "done"
    except DoctorError as error:
        word = type(error).__name__
    finally:
        for name, real in saved.items():
            setattr(os, name, real)
    print(n, word, "present" if os.path.exists(target) else "absent", count[0] >= n, flush=True)
    if count[0] < n:
        break
"""
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return [line.split() for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    "code, codes",
    [("errno.ENOSPC", ALL), ("errno.EIO", ALL), ("errno.EIO", ("W201",))],
    ids=["ENOSPC", "EIO", "EIO-renamed"],
)
def test_failure_of_any_call_leaves_the_source_untouched_and_the_output_absent_or_whole(tmp_path, code, codes):
    """The last of them writes one shard and links the other, both under new names."""
    _, source = spoiled(tmp_path)
    if codes != ALL:
        rename_parts("1-of-4", "3-of-4")(source)
    before = digests(source)
    lines = run_all_failures(source, tmp_path / "out", code, codes)
    assert digests(source) == before
    whole = digests(tmp_path / "out-warm")
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} < whole.keys()
    assert len(lines) > 20 and lines[-1][1:] == ["done", "present", "False"]
    failed = [line for line in lines if line[1] != "done"]
    assert len(failed) > 15 and all(line[1] in ("MachineError", "BadCheckpoint", "PlanRefused") for line in failed), (
        lines
    )
    for n, word, there, _ in lines:
        assert (word == "done") == (there == "present"), (n, word, there)
        if there == "present":
            found = digests(tmp_path / f"out-{n}")
            assert {k: v for k, v in found.items() if k != "doctor.json"} == {
                k: v for k, v in whole.items() if k != "doctor.json"
            }
    left = [n for n in os.listdir(tmp_path) if ".doctor-" in n and not n.endswith(".doctor-lock")]
    assert not left, left


def test_a_kill_at_any_moment_leaves_the_output_absent_or_whole_and_the_next_run_cleans_up(tmp_path):
    case = tiny("llama")
    case.shards = 2
    case.config["vocab_size"] = 96
    narrow(case, 96)
    case.recipe = case.recipe.with_field("tp", 2)
    source = case.write(tmp_path / "source")
    before = digests(source)
    script = (
        RUNNER.format(root=os.getcwd())
        + f"""
import doctor.evaluate.proof as proof, time
from doctor.fixing.proof import Proof
proof.prove = lambda a, b: Proof("equal", "not the subject here")
print("ready", flush=True)
sys.stdin.readline()
fix({str(source)!r}, {str(tmp_path / "out")!r}, Recipe(group_size=32, tp=2), unsafe_fixes=("G302",), copy=True)
print("finished", flush=True)
"""
    )
    fix(source, tmp_path / "reference", case.recipe, unsafe_fixes=("G302",))
    whole = {k: v for k, v in digests(tmp_path / "reference").items() if k != "doctor.json"}
    draw = random.Random(5)
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(draw.uniform(0.0, 0.6))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
        assert digests(source) == before
        if (tmp_path / "out").exists():
            assert {k: v for k, v in digests(tmp_path / "out").items() if k != "doctor.json"} == whole
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            (tmp_path / "out").rmdir()
    stage = tmp_path / ".out.doctor-stage"
    stage.mkdir(exist_ok=True)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=("G302",))
    assert any("left by a run that was killed" in note for note in result.notes)
    assert not [n for n in os.listdir(tmp_path) if ".doctor-" in n]
    assert not check(tmp_path / "out", case.recipe).findings
