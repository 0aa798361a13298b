"""Every command that README, docs, rule pages and hints print is run where the text sends its reader, and does it."""

import json
import shlex
import shutil
import sys
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fix_cases import adapter
from printed import record, texts

from doctor.api import check, fix, quantize
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.core.recipe import Recipe
from doctor.lint.engine import load_rules
from doctor.lint.testing import encode, tiny, tiny_gguf

RULES = {rule.code: rule for rule in load_rules()}

# Names that texts use -> directories and files of `world`.
PLACES = {
    **dict.fromkeys(("CKPT", "CHECKPOINT", "ckpt/", "my-model/", "SmolLM2-135M", "my-finetune/"), "model/"),
    "MODEL": "model/",
    **dict.fromkeys(("QUANTIZED", "q4/", "q/", "gptq/", "a/"), "quantized/"),
    **dict.fromkeys(("awq/", "b/"), "eight/"),
    "c/": "fixed/",
    **dict.fromkeys(("BASE", "base-model/"), "base/"),
    **dict.fromkeys(("ORIGINAL", "m"), "model/"),
    "ADAPTER": "lora/",
    "OUT": "new/",
    "DIR": "new/",
    "FILE": "doctor.toml",
    "NAME": "transformers4",
    "N": "1024",
    **dict.fromkeys(("CODE", "C190"), "W201"),
    **dict.fromkeys(("its message", "pasted error", "error"), "Hessian is not invertible"),
    "json:REPORT.json": "json:report.json",
    "~/vllm/bin/python": sys.executable,
}
# What a text leaves to its reader: from a mention of an option to a whole command.
REST = {
    "check": ["model/"],
    "fix": ["model/", "-o", "new/"],
    "quantize": ["model/", "-o", "new/"],
    "convert": ["quantized/", "-o", "new/", "--format", "bf16"],
    "tune": ["quantized/", "--to", "model/", "-o", "new/"],
    "verify": ["model/", "quantized/"],
    "compare": ["quantized/", "eight/", "--original", "model/"],
    "kvcache": ["model/"],
    "advise": ["model/", "--memory", "24GB"],
    "explain": ["Hessian is not invertible"],
    "render": ["report.json"],
    "trust": ["doctor.toml"],
    "undo": ["model/"],
    "completion": ["bash"],
}
# (file, command) -> the test that runs the same on a model of its own: a client is imported there anyway.
ELSEWHERE = {
    ("verify.md", "doctor verify model/ quantized/ --client transformers"): "tests/evaluate/clients/test_logprobs.py",
    ("kvcache.md", "doctor kvcache --measure --rows 1"): "tests/evaluate/kvcache",
}
DONE: set[tuple] = set()
QUICK = {  # the same work on a few tokens
    "quantize": ["--rows", "2", "--max-seq-length", "32"],
    "tune": ["--rows", "4", "--max-seq-length", "32"],
    "verify": ["--rows", "1", "--context", "32"],
    "compare": ["--rows", "2", "--context", "32"],
}
# (file, command) -> the rule whose bad example stands at model/ (with its donor at base/): the command cures it.
SITUATIONS = {
    ("C119.md", "doctor fix --from BASE --unsafe-fixes"): "C110",
    ("readings.toml", "doctor fix CKPT -o OUT"): "F051",
    ("readings.toml", "doctor fix CKPT -o OUT --unsafe-fixes=O620"): "O620",
    ("fixing.md", "doctor fix model/ -o fixed/ --for-readers transformers4"): "C160",
    ("readers.toml", "doctor fix --for-readers NAME"): "C160",
}
# A word of a command -> what it says on a machine that lacks what the word asks for. Its tests with it are elsewhere:
# tests/cuda and bench/gpu.py, tests/checkpoint/test_hub.py, tests/clients, tests/evaluate/test_tasks.py.
LACKS = {
    "cuda": "cuda",
    "cuda:1": "cuda",
    **dict.fromkeys(("choices,gsm8k", "choices,gsm8k,arc_easy"), "lm-evaluation-harness's, which is not installed"),
    "org/name": "org/name",
    "org/name@revision": "org/name",
    "org/model": "org/model",
    "vllm": "vllm",
}


def model():
    """A healthy Llama whose linears are multiples of 256 columns, with a tokenizer that GGUF can hold."""
    case = tiny("llama", mlp=256, hidden=256)
    case.config["head_dim"] = 64
    rng = np.random.default_rng(3)
    for name in case.tensors:
        rows = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "o_proj": 256}.get(name.split(".")[-2])
        if rows:
            case.tensors[name] = encode(rng.normal(0, 0.08, (rows, 256)), "BF16")
    words = case.json["tokenizer.json"]["model"]
    case.json["tokenizer.json"]["model"] = {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": words["vocab"],
        "merges": [],
    }
    return case


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Directories and files of all kinds that texts speak of, all of one small model."""
    folder = tmp_path_factory.mktemp("world")
    case = model()
    for name in ("model", "base", "fixed"):
        case.write(folder / name)
    adapter(folder / "lora", case)
    fix(folder / "lora", folder / "merged", Recipe(), donor=folder / "base")
    tiny_gguf().write(folder / "gguf")
    next((folder / "gguf").glob("*.gguf")).rename(folder / "model.gguf")
    text = "".join(chr(0x21 + i % 90) for i in range(9000))
    (folder / "mine.txt").write_text(text)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text[i:]}) for i in range(8)))
    quantize(folder / "model", folder / "quantized", Recipe(method="rtn"))
    quantize(folder / "model", folder / "eight", Recipe(method="rtn", bits=8))
    (folder / "doctor.toml").write_text('ignore = ["C110"]\n')
    (folder / "recipes.toml").write_text('[[recipe]]\nmethod = "rtn"\n\n[[recipe]]\nmethod = "rtn"\nbits = 8\n')
    for name in ("doctor.json", "report.json", "before.json"):
        CliRunner().invoke(cli, ["check", str(folder / "model"), "-f", f"json:{folder / name}"])
    case.config["bos_token_id"] = "1"  # C106, which a safe fix cures
    case.write(folder / "sick")
    return folder


def vocabulary_grown():
    """tiny() with tokens whose rows the embedding has and config.json does not count."""
    case = tiny("llama")
    case.config["vocab_size"] -= 8
    return case


def whole(command: str) -> list[str]:
    """The words of a command in `world`, with what its text leaves to the reader."""
    if command.startswith("doctor check"):
        command = command.replace("FILE.gguf", "FILE").replace("FILE", "model.gguf")
    if command.startswith("doctor convert"):
        command = command.replace("NAME", "awq")
    if command.startswith("doctor advise"):
        command = command.replace("NAME", "l4")
    command = command.replace("--recipes FILE", "--recipes recipes.toml")
    words = [PLACES.get(w, w) for w in shlex.split(command.split(" | ")[0].replace("…", "").replace(" FLAGS", ""))]
    name = words[1]
    if name == "check" and words[2:3] == ["new/"]:
        words[2] = "model/"
    rest = list(REST.get(name, ()))
    asks_itself = {"--show-settings", "--forget", "--in-place"} & set(words)
    if name in ("explain", "facts", "completion", "rules"):
        return words if len(words) > 2 else words + rest
    follow = {flag for flag, value in pairwise(words) if flag.startswith("-")}
    given = [w for before, w in pairwise(words[1:]) if not w.startswith("-") and before not in follow - {"--fix"}]
    if not given and "--show-settings" not in asks_itself:
        words[2:2] = takewhile(lambda word: not word.startswith("-"), rest)
    for flag, value in pairwise(rest):
        if flag.startswith("-") and flag not in words and not asks_itself:
            words += [flag, value]
    quick = QUICK.get(name, [])
    if name == "quantize" and dict(pairwise(words)).get("--tune", "").isdigit():
        quick = ["--rows", dict(pairwise(words))["--tune"], *quick[2:]]  # as many calibrate as are tuned on
    return words + [w for at in range(0, len(quick), 2) if quick[at] not in words for w in quick[at : at + 2]]


def prepare(where: str, command: str, words: list[str]) -> str:
    """Bring the current directory, a copy of `world`, into the state in which a text prints the command. Returns the
    code of the rule that the command cures; "" for none.
    """
    cures = ""
    if code := SITUATIONS.get((where, command)):
        module = sys.modules[RULES[code].module]
        shutil.rmtree("model")
        case = vocabulary_grown() if code == "F051" else module.bad()[0]
        case.write(Path("model"))
        shutil.rmtree("base")
        getattr(module, "donor", module.good)().write(Path("base"))
        cures = code
    elif words[1] in ("fix", "undo") or "--fix" in words:
        if "lora/" not in words:
            shutil.rmtree("model")
            shutil.move("sick", "model")
        cures = "F022" if "lora/" in words else "C106"
    elif words[:3] == ["doctor", "convert", "model/"]:
        shutil.rmtree("model")
        shutil.move("quantized", "model")
    if words[1] == "undo":
        assert CliRunner().invoke(cli, ["fix", "model/", "--in-place"]).exit_code == 0
    if "-o" in words:
        shutil.rmtree(dict(pairwise(words))["-o"], ignore_errors=True)  # of an earlier command
    if "--rules" in words:
        Path(dict(pairwise(words))["--rules"]).mkdir()
    if words[1] in ("check", "verify") and "out/" in words:
        shutil.copytree("quantized", "out")
    if "Q4_K_M" in words or "Q8_0" in words:
        shutil.rmtree("model")
        shutil.copytree("base", "model")
    return cures


def written(words: list[str]) -> Path | None:
    """What a command names as its output."""
    flags = dict(pairwise(words))
    return Path(flags["-o"]) if "-o" in flags and not {"--plan", "--preflight", "--dry-run"} & set(words) else None


@pytest.mark.parametrize(("where", "command"), list(texts()), ids=lambda text: text[:60])
def test_each_command_of_a_text_does_what_it_says(where, command, world, tmp_path, monkeypatch, request):
    words = whole(command)
    if other := ELSEWHERE.get((where, command)):
        assert (Path(__file__).parents[2] / other).exists()
        return record(request.node.user_properties, command, where, "run elsewhere")
    situation = (*words, SITUATIONS.get((where, command)))
    if situation in DONE:  # another text prints the same
        return record(request.node.user_properties, command, where, "run")
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    cures = prepare(where, command, words)
    result = CliRunner().invoke(cli, words[1:])
    said = f"{shlex.join(words)}\n{result.output}"
    lacks = next((says for word, says in LACKS.items() if word in words), None)
    if lacks and result.exit_code == 2:
        assert lacks in result.output and "Error" in result.output, said
        return record(request.node.user_properties, command, where, "refused: not on this machine")
    assert result.exception is None or isinstance(result.exception, SystemExit), said
    assert result.exit_code in (0, 1), said
    out = written(words)
    if words[1] == "tune" and result.exit_code == 1:
        assert "not written: tuning did not lower the divergence" in result.output, said  # as its text says
        out = None
    if out is not None and words[1] != "check":
        assert out.exists(), said
        assert Checkpoint.open(out).tensors or Checkpoint.open(out).gguf, said
    if words[1] in ("quantize", "tune") and out is not None and not list(out.glob("*.gguf")):
        assert Checkpoint.open(out).value("config.json")["quantization_config"], said
    if words[1] == "fix" and out is not None:
        assert cures not in {f.code for f in check(out).findings}, said
    if words[1] == "fix" and "--in-place" in words:
        assert cures not in {f.code for f in check("model").findings}, said
    if words[1] == "undo":
        assert "C106" in {f.code for f in check("model").findings}, said
    if words[1] in ("explain", "compare") or "--recipes" in words:
        assert result.exit_code == 0, said
    for form in (w for w in words if ":" in w and w.split(":")[0] in ("html", "json", "sarif", "markdown")):
        assert Path(form.partition(":")[2]).stat().st_size > 100, said
    DONE.add(situation)
    record(request.node.user_properties, command, where, "run")
