"""Real engines open our checkpoints: each test starts vLLM or transformers in its own environment and asks it.

`make test-clients` builds the environments; without them the tests skip. Where vLLM has no 4-bit kernel for this CPU
(it wants AVX-512), its loader still judges the checkpoint and ask_vllm.py multiplies; the answer then says "reference".
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from healthy_models import save
from load_proofs import prove

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import encode, tiny
from doctor.model.spec import build_spec
from doctor.quant.dequantize import as_float
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.quantize import quantize

pytestmark = [pytest.mark.real, pytest.mark.clients]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {"transformers": "venv-hf", "vllm": "venv-vllm"}
PROMPT = "The capital of France is"
# Formats are a matter of packing, so rounding to nearest does for all but the method's own: 40 s of CPU instead of
# minutes.
GROUPS = ("--group-size", "64")
QUANTIZED = {
    "gptq": (*GROUPS, "--method", "gptq", "--rows", "32", "--max-seq-length", "512"),
    "awq": (*GROUPS, "--method", "awq", "--rows", "16", "--max-seq-length", "512"),
    "gptq_v2": (*GROUPS, "--method", "rtn"),
    "compressed-tensors": (*GROUPS, "--method", "rtn"),
    "float-quantized": ("--scheme", "FP8_DYNAMIC"),
    "int-quantized": ("--scheme", "INT8"),
}
STATED = {
    ("vllm", "gptq"): {"gptq", "auto_gptq", "gptq_marlin"},
    ("vllm", "compressed-tensors"): {"compressed-tensors"},
    ("vllm", "awq"): {"awq", "awq_marlin"},
    ("transformers", "awq"): {"awq"},
    ("transformers", "gptq"): {"gptq"},
    ("transformers", "gptq_v2"): {"gptq"},
    ("transformers", "compressed-tensors"): {"compressed-tensors"},
    # Of floats and 8-bit integers, vLLM has kernels for a CPU for these two.
    ("vllm", "float-quantized"): {"compressed-tensors"},
    ("vllm", "int-quantized"): {"compressed-tensors"},
}
# In float32 two orders of summation move a logarithm of probability by less; beyond it, not rounding decided.
ROUNDING = 1e-3


def start(
    client: str, model: Path, *options: str, prompts=(PROMPT,), **environment: str
) -> subprocess.CompletedProcess:
    """The client's finished process; skips where its environment is not built."""
    folder = ROOT / ".cache" / ENVIRONMENTS[client]
    if not (folder / "finished").exists():
        pytest.skip(f"{folder.name} is not built: make test-clients")
    script = ROOT / "tests" / "clients" / f"ask_{client}.py"
    command = [folder / "bin" / "python", script, model, *prompts, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | environment)


def ask(client: str, model: Path, *options: str, **more) -> dict:
    """What the client's script prints: {"text", "quantization", "dtype", …}; fails with the end of its log."""
    run = start(client, model, *options, **more)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture
def quantized(smollm2):
    """format -> SmolLM2 quantized into it, kept in .cache/clients; an interrupted run goes on where it
    was.
    """

    def build(format: str) -> Path:
        folder = ROOT / ".cache" / "clients" / f"{format}-g64"
        if not folder.exists():
            command = [
                sys.executable,
                "-m",
                "doctor",
                "quantize",
                smollm2,
                "-o",
                folder,
                "--format",
                format,
                "--resume",
            ]
            run = subprocess.run([*command, *QUANTIZED[format]], cwd=ROOT, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
        return folder

    return build


@pytest.mark.parametrize("client", ENVIRONMENTS)
def test_client_opens_the_unquantized_model(client, smollm2):
    answer = ask(client, smollm2)
    assert "Paris" in answer["text"]
    assert answer["quantization"] is None


@pytest.mark.parametrize("client, format", STATED)
def test_client_opens_our_quantized_model_and_finds_paris(client, format, quantized, request):
    prove(quantized(format), request.node.user_properties)
    answer = ask(client, quantized(format), "--tokens", "12")
    assert "Paris" in answer["text"]
    assert answer["quantization"] in STATED[client, format]
    if client == "vllm":
        print("4-bit kernel:", answer["int4_kernel"])
        assert answer["int4_kernel"] in ("vllm", "reference")


# experts that lie in one tensor and are written as linears


def taken_apart(family: str, format: str, folder: Path) -> Path:
    """A tiny random mixture, rounded to nearest into the format; symmetric, which is all that the clients' stand-ins
    compute.
    """
    save(family, folder / "m", num_experts_per_tok=1 if family == "llama4_text" else 2)
    done = api.quantize(
        folder / "m", folder / "o", Recipe(method="rtn", group_size=32, sym=format != "awq", format=format)
    )
    assert done.output and not [n for n, i in Checkpoint.open(done.output).tensors.items() if len(i.shape) == 3]
    return done.output


def agreement(folder: Path, prompts: list[str], answers: list[list[int]]) -> float:
    """Share of the client's tokens that the file's own numbers put first too, or within bfloat16's rounding of the
    first.
    """
    import torch
    from transformers import AutoTokenizer

    read = as_float(Checkpoint.open(folder))
    built, tokenizer = (
        Skeleton(read, build_spec(read.value("config.json"), read.tensors)),
        AutoTokenizer.from_pretrained(folder),
    )
    built.load_whole()
    found = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] + tokens])
        with torch.no_grad():
            logits = built.model(ids, use_cache=False).logits[0, -len(tokens) - 1 : -1]
        found += (logits.amax(-1) - logits[range(len(tokens)), tokens] < 0.06).tolist()
    return sum(found) / len(found)


EXPERT_PROMPTS = ["abcdefgh", "xyzXYZ12", "ABab", "MNOPmnop", "98765"]


@pytest.mark.parametrize(
    "family, format",
    [
        ("granitemoe", "gptq"),
        ("granitemoe", "awq"),
        ("granitemoe", "compressed-tensors"),
        ("qwen3_moe", "compressed-tensors"),
        ("llama4_text", "compressed-tensors"),
    ],
)
def test_vllm_serves_experts_that_were_taken_apart(family, format, tmp_path, request):
    folder = taken_apart(family, format, tmp_path)
    prove(
        folder,
        request.node.user_properties,
        left_out=".experts." if family == "granitemoe" or format != "compressed-tensors" else "",
    )
    answer = ask("vllm", folder, "--tokens", "6", prompts=EXPERT_PROMPTS)
    assert answer["int4_experts"] in ("vllm", "reference")
    assert agreement(folder, EXPERT_PROMPTS, [[token for token, _ in one] for one in answer["answers"]]) >= 0.8


def test_vllm_misreads_what_g319_finds(tmp_path, request):
    folder = taken_apart("llama4_text", "gptq", tmp_path)
    prove(folder, request.node.user_properties, left_out=".experts.")
    assert "G319" in {f.code for f in api.check(folder).findings}
    answer = ask("vllm", folder, "--tokens", "6", prompts=EXPERT_PROMPTS)
    assert agreement(folder, EXPERT_PROMPTS, [[token for token, _ in one] for one in answer["answers"]]) < 0.8


@pytest.mark.parametrize("family, format", [("gpt_oss", "gptq"), ("gpt_oss", "awq"), ("llama4_text", "gptq")])
def test_gptqmodel_loads_experts_that_were_taken_apart(family, format, tmp_path, request):
    folder = taken_apart(family, format, tmp_path)
    prove(folder, request.node.user_properties, left_out=".experts.")
    answer = ask("transformers", folder, "--gptqmodel", "--tokens", "6", prompts=EXPERT_PROMPTS)
    assert agreement(folder, EXPERT_PROMPTS, answer["answers"]) >= 0.8


@pytest.mark.parametrize(
    "format, bits, sym",
    [(form, bits, sym) for form in ("gptq", "gptq_v2") for bits in (2, 3) for sym in (True, False)]
    + [("compressed-tensors", bits, True) for bits in (2, 3)],
)
def test_transformers_multiplies_by_scales_of_either_sign(format, bits, sym, tmp_path, request):
    """vLLM's kernels for GPTQ of 2 and 3 bits multiply by the scale as well (csrc/quantization/gptq/q_gemm.cu); on a
    CPU it has none for so few bits.
    """
    save("llama", tmp_path / "m")
    recipe = Recipe(method="rtn", bits=bits, group_size=32, sym=sym, format=format)
    folder = api.quantize(tmp_path / "m", tmp_path / "o", recipe).output
    prove(folder, request.node.user_properties)
    checkpoint = Checkpoint.open(folder)
    tail = "weight_scale" if format == "compressed-tensors" else "scales"
    scales = np.concatenate(
        [checkpoint.load(name).view(np.float16).ravel() for name in checkpoint.tensors if name.endswith(tail)]
    )
    assert 0.3 < (scales < 0).mean() < 0.7 if sym else (scales > 0).all()
    answer = ask("transformers", folder, "--tokens", "8", prompts=EXPERT_PROMPTS)
    assert answer["quantization"] == format.removesuffix("_v2")
    assert agreement(folder, EXPERT_PROMPTS, answer["answers"]) == 1


# two GPUs, played by two cores

TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
PROMPTS = ("The", "with", "class", "import", "return", "Python", "def", "if", "while", "object", "a", "exception")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A small trained Llama of 4 heads whose MLP of 96 = 3 x 32 two GPUs cannot share in groups of 32. Heads are of 32:
    vLLM has no smaller.
    """
    from demo import train

    case = tiny("llama", mlp=96)
    case.config["head_dim"] = 32
    draw = np.random.default_rng(5)
    for block in (0, 1):
        for role, shape in (("q", (128, 64)), ("k", (64, 64)), ("v", (64, 64)), ("o", (64, 128))):
            case.tensors[case.name(role, block)] = encode(draw.normal(0, 0.08, shape), "BF16")
    return train(case.write(tmp_path_factory.mktemp("narrow") / "m"))


@pytest.fixture(scope="module")
def cured(narrow) -> Path:
    """The same model padded for two GPUs by `doctor fix`."""
    result = api.fix(narrow, narrow.parent / "cured", Recipe(group_size=32, tp=2), unsafe_fixes=["G302"])
    assert result.report.ok and Checkpoint.open(result.output).value("config.json")["intermediate_size"] == 128
    return result.output


def test_two_gpus_refuse_what_g302_finds_and_serve_what_it_cures(narrow, cured, tmp_path, request):
    recipe = Recipe(method="rtn", group_size=32)
    found = api.check(narrow, Recipe(group_size=32, tp=2)).findings
    assert [f.code for f in found] == ["G302"]
    for source, name in ((narrow, "q-narrow"), (cured, "q-cured")):
        assert api.quantize(source, tmp_path / name, recipe).output is not None
        prove(tmp_path / name, request.node.user_properties)
    refused = start("vllm", tmp_path / "q-narrow", "--tp", "2", **TWO)
    # Workers write to stdout. 48 of the 96 inputs are one and a half groups; the served one has 64.
    assert refused.returncode != 0 and "Input size (48) not supported" in refused.stdout, (
        refused.stdout + refused.stderr
    )[-3000:]
    served = ask("vllm", tmp_path / "q-cured", "--tp", "2", "--tokens", "12", prompts=PROMPTS, **TWO)
    assert len(served["answers"]) == 12 and served["quantization"] in STATED["vllm", "gptq"]


def test_the_cured_model_on_two_gpus_says_what_the_original_says_on_one(narrow, cured):
    options = ("--tokens", "16", "--dtype", "float32")
    original = ask("vllm", narrow, *options, prompts=PROMPTS)["answers"]
    padded = ask("vllm", cured, "--tp", "2", *options, prompts=PROMPTS, **TWO)["answers"]
    equal = 0
    for prompt, want, got in zip(PROMPTS, original, padded, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a[0] != b[0]), None)
        equal += at is None
        assert at is None or want[at][1] < ROUNDING, (
            f"{prompt!r}: token {at} differs, with a lead of {want[at][1]:.4f} in the original"
        )
    print(f"{equal} of {len(PROMPTS)} replies are equal")
    assert equal >= len(PROMPTS) // 2


def test_vllm_takes_as_packed_what_is_packed_and_nothing_else(tmp_path, request):
    """Its own functions are asked about every linear of each class: towers, projectors and heads too."""
    from tiny_classes import CLASSES, save_class

    from doctor.core.records import LoadProof
    from doctor.evaluate.clients import transformers_child
    from doctor.quant.client import Client, Linears

    def linears_of(folder: Path, modules: Iterable[str]) -> Linears:
        found = transformers_child.linears(folder, list(modules))["linears"]
        return {name: tuple(sources) for name, sources in found.items()}

    environment = ROOT / ".cache" / ENVIRONMENTS["vllm"]
    if not (environment / "finished").exists():
        pytest.skip(f"{environment.name} is not built: make test-clients")
    client = Client(linears_of, lambda folder: LoadProof("vllm", reason="not loaded here"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [1, *range(3 + n, 60 + n)]}) for n in range(8)))
    written: dict[Path, list[str]] = {}  # a quantized checkpoint -> linears of its source, by the files' names
    for name in ("Qwen3", "Qwen2.5-VL", "Qwen3-VL", "Mistral3"):
        source = save_class(CLASSES[name], tmp_path / name)
        modules = [n.removesuffix(".weight") for n in Checkpoint.open(source).tensors if n.endswith(".weight")]
        linears = sorted({n for found in linears_of(source, modules).values() for n in found})
        assert len(linears) > 20
        forms = ["compressed-tensors", "gptq", "awq"]
        with_tower = [(form, True) for form in forms[:2] if name == "Qwen3-VL"]
        for form, vision in [*((form, False) for form in forms), *with_tower]:
            method = "awq" if form == "awq" else "rtn"
            recipe = Recipe(
                method=method, group_size=32, format=form, keep=("layers.1.mlp",), vision=vision, runtime="vllm"
            )
            place = tmp_path / f"{name}-{form}{'-vision' if vision else ''}"
            done = quantize(source, place, recipe, calibration=rows, client=client)
            assert done.output
            prove(done.output, request.node.user_properties, left_out=".visual." if vision and form == "gptq" else "")
            written[done.output] = linears
    names = tmp_path / "names.json"
    names.write_text(json.dumps(list(written.values())))
    command = [environment / "bin" / "python", ROOT / "tests" / "clients" / "ask_vllm_config.py", names, *written]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    answers = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(written), run.stderr[-2000:]
    for (folder, linears), taken in zip(written.items(), answers, strict=True):
        packed = {n.rpartition(".")[0] for n in Checkpoint.open(folder).tensors if n.endswith((".qweight", "_packed"))}
        assert set(taken) == packed & set(linears) and len(packed) >= 20, folder.name


def test_vllm_takes_the_schemes_of_the_table_and_no_others():
    """The table `served` against vLLM's own choice, for 1,440 combinations of weights, activations and formats."""
    from doctor.plan.serving import schemes, serves, stated

    strategies = [
        ("tensor", None),
        ("channel", None),
        ("group", 32),
        ("group", 128),
        ("tensor_group", 16),
        ("block", None),
    ]
    activations = [
        None,
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
    ]
    forms = ["pack", "int", "float", "nvfp4-pack", "mxfp4-pack"]
    groups = []
    for kind, bits, (strategy, size), sym, inputs, form in itertools.product(
        ["int", "float"], [4, 8], strategies, [True, False], activations, forms
    ):
        weights = {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": sym, "group_size": size}
        weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
        weights |= {"scale_dtype": "torch.uint8"} if (kind, bits, size) == ("float", 8, 32) else {}
        groups.append([weights, inputs, f"{form}-quantized"])
    environment = ROOT / ".cache" / ENVIRONMENTS["vllm"]
    if not (environment / "finished").exists():
        pytest.skip(f"{environment.name} is not built: make test-clients")
    command = [str(environment / "bin" / "python"), str(ROOT / "tests" / "clients" / "ask_vllm_schemes.py")]
    done = subprocess.run(command, input=json.dumps(groups), capture_output=True, text=True, check=True)
    theirs = [answer is not None for answer in json.loads(done.stdout)]
    rows = schemes("vllm", "")
    ours = [any(serves(row, stated(w), stated(i), form) for row in rows) for w, i, form in groups]
    assert [g for g, a, b in zip(groups, ours, theirs, strict=True) if a != b] == []
    assert 200 < sum(ours) < 400
