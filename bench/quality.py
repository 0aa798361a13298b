"""Perplexity after quantization, ours beside other tools', on the same rows and under the same judge.

    python bench/quality.py table .cache/smollm2 [--tools doctor,gptqmodel,gptqmodel+tune] [--bits 4] [--group-size 64]
        [--calibration-rows 8,32,128]

`doctor` is the command with its defaults, `doctor-plain` without tuning; TOOL+tune is `doctor tune` of what TOOL wrote.
What one run measured stands beside its output (TOOL-….json), and is not measured again while the output is there.
Every tool gets the same calibration rows as token ids (text_rows.py), runs in a process and a virtual
environment of its own (tests/clients/setup.sh hf), and writes a checkpoint. The judge then loads each
checkpoint with transformers in one more process and takes the perplexity on held-out rows:

    exp(mean over all predicted tokens of the negative log-likelihood)

and the mean over the same tokens of KL(16-bit model || quantized model), in nats, ± the standard error of its mean over
rows, with rows of 512 tokens that do not overlap, each seen alone (no earlier context), the first token of a row not
predicted; weights dequantized by the
format's own code, arithmetic and logits in float32, the sum in float64. So a figure says what was lost in the weights,
and nothing about an engine's kernels or 16-bit activations.

The rows follow the Python version (its documentation is the text): compare figures from one run only.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
JUDGE = [str(ROOT / ".cache" / "venv-hf" / "bin" / "python"), str(HERE / "quality.py")]  # this script there
# tool -> (virtual environment, command of this script in it)
PEERS = {
    "gptqmodel": ("venv-hf", "gptqmodel"),
    "llmcompressor": ("venv-llmc", "llmcompressor"),
    "autoawq": ("venv-awq", "autoawq"),
}
CALIBRATION_ROWS = 32
HELDOUT_ROWS = 24
TOKENS = 64  # whose logits are compared at a time


def write_rows(options) -> None:
    """calibration-N.jsonl and heldout.jsonl in `options.out`, one {"input_ids": [...]} a line."""
    from text_rows import calibration_rows, heldout_rows
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        *((f"calibration-{n}", calibration_rows(tokenizer, n)) for n in counts(options)),
        ("heldout", heldout_rows(tokenizer, options.heldout_rows)),
    ):
        lines = [json.dumps({"input_ids": row}) for row in rows]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def counts(options) -> list[int]:
    return [int(n) for n in str(options.calibration_rows).split(",")]


def read_rows(path) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in Path(path).read_text().splitlines()]


def quantize_with_gptqmodel(options) -> None:
    """GPTQModel's defaults but for bits, group size and symmetry; runs in its own environment.

    Calibrates in float32: in bf16 a CPU without bf16 instructions takes hours.
    """
    # On two cores its default is one worker for a pool that then wants two, a ValueError (GPTQModel 7.7.0).
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in read_rows(options.rows)]
    recipe = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=True)
    model = GPTQModel.load(options.model, recipe, dtype=torch.float32, device="cpu")
    model.quantize(rows, tokenizer=AutoTokenizer.from_pretrained(options.model), batch_size=1)
    model.save(options.out)


def quantize_with_llmcompressor(options) -> None:
    """llm-compressor's GPTQ with its defaults but for bits, group size and symmetry; runs in its own environment.

    Its AWQ (0.14) pins activations for an accelerator and ends with a RuntimeError where there is none.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = read_rows(options.rows)
    weights = QuantizationArgs(num_bits=options.bits, group_size=options.group_size, symmetric=True, strategy="group")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)


def quantize_with_autoawq(options) -> None:
    """AutoAWQ's defaults but for bits and group size; runs in its own environment.

    Its search is helped twice, or it would be wrong and endless on a CPU: the weights that it puts back after each
    ratio are copies (its `.cpu()` copies on a GPU only, and it multiplies in place), and the outputs of its clipping
    are matrix products.
    """
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from transformers import AutoTokenizer

    scales, clipping = AwqQuantizer._compute_best_scale, AwqQuantizer._compute_best_clip

    def with_copies(self, x, w_mean, x_mean, module, *more):
        weights = module.state_dict
        module.state_dict = lambda: {name: tensor.clone() for name, tensor in weights().items()}
        try:
            return scales(self, x, w_mean, x_mean, module, *more)
        finally:
            del module.state_dict

    AwqQuantizer._compute_best_scale = with_copies
    AwqQuantizer._compute_best_clip = lambda self, w, inputs: clipping(self, w, _Inputs(inputs))
    rows = read_rows(options.rows)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoAWQForCausalLM.from_pretrained(
        options.model, torch_dtype=torch.float32, device_map="cpu", use_cache=False
    )
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": options.group_size, "w_bit": options.bits, "version": "GEMM"},
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=len(rows[0]),
    )
    model.save_quantized(options.out)
    tokenizer.save_pretrained(options.out)


class _Inputs:
    """X[1, tokens, groups, g], whose `(X * W).sum(-1)` with W[rows, 1, groups, g] is a matrix product a group."""

    def __init__(self, X):
        self.X, self.shape = X, X.shape

    def view(self, *shape):
        return _Inputs(self.X.view(*shape))

    def reshape(self, *shape):
        return _Inputs(self.X.reshape(*shape))

    def __getitem__(self, part):
        return _Inputs(self.X[part])

    def to(self, device):
        return self

    def __mul__(self, W):
        self.W = W
        return self

    def sum(self, dim):
        import torch

        return torch.einsum("tgk,cgk->ctg", self.X[0], self.W[:, 0])


def perplexity(options) -> None:
    """Print {"perplexity": …, "kl": …, "kl_error": …, "kl_rows": [of each row], "tokens": …} of the checkpoint on the
    rows, which are of one length; the module docstring defines them.
    """
    sys.path.insert(0, str(ROOT / "tests" / "clients"))
    with contextlib.redirect_stdout(sys.stderr):
        from ask_transformers import load

        model = load(options.model, "float32")
        import torch  # after load, which sets how torch is to start

        dequantize_once(model)
        original = model if options.model == options.original else load(options.original, "float32")
        total, divergences, count = 0.0, [], 0
        with torch.inference_mode():
            for row in read_rows(options.rows):
                ids = torch.tensor([row])
                got = model(ids).logits[0, :-1]
                want = got if original is model else original(ids).logits[0, :-1]
                divergence = 0.0
                for at in range(0, len(got), TOKENS):
                    found, wanted = (x[at : at + TOKENS].float().log_softmax(-1) for x in (got, want))
                    total -= found.gather(1, ids[0, 1 + at : 1 + at + TOKENS, None]).double().sum().item()
                    divergence += (wanted.exp() * (wanted - found)).sum(-1).double().sum().item()
                divergences.append(divergence / (len(row) - 1))
                count += len(row) - 1
    error = statistics.stdev(divergences) / math.sqrt(len(divergences)) if len(divergences) > 1 else math.nan
    found = {"perplexity": math.exp(total / count), "kl": statistics.fmean(divergences), "kl_error": error}
    print(json.dumps({**found, "kl_rows": divergences, "tokens": count}))


def dequantize_once(model) -> None:
    """Put a plain float32 linear in the place of each of GPTQModel's, which dequantize anew for every row."""
    import torch

    for name, module in list(model.named_modules()):
        if hasattr(module, "dequantize_weight"):
            W = module.dequantize_weight().float().T.contiguous()
            linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(W, requires_grad=False)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.float(), requires_grad=False)
            model.set_submodule(name, linear)


def command_of(tool: str, options, rows: Path, out: Path) -> list[str]:
    """The command line that quantizes options.model into `out` with `tool`."""
    size = ["--bits", str(options.bits), "--group-size", str(options.group_size)]
    if tool in PEERS:
        python, command = PEERS[tool]
        return [
            str(ROOT / ".cache" / python / "bin" / "python"),
            str(HERE / "quality.py"),
            command,
            options.model,
            str(rows),
            str(out),
            *size,
        ]
    doctor = Path(sys.executable).with_name("doctor")
    if tool.endswith("+tune"):  # of what another tool, or doctor-plain, wrote earlier in this run
        other = out.with_name(out.name.replace(tool, tool.removesuffix("+tune")))
        where = ["--to", options.model, "-o", str(out)]
        return [str(doctor), "tune", str(other), *where, "--calibration", str(rows), "--rows", str(options.tune_rows)]
    tool, _, limit = tool.partition("@")
    method = {"doctor": "gptq", "doctor-plain": "gptq", "doctor-awq": "awq", "doctor-rtn": "rtn"}[tool]
    return [
        str(doctor),
        "quantize",
        options.model,
        "-o",
        str(out),
        "--method",
        method,
        *size,
        "--calibration",
        str(rows),
        "--verify",
        "0",
        *(["--memory", limit] if limit else []),
        *(["--tune", "off"] if tool == "doctor-plain" else []),
    ]


def table(options) -> None:
    """Quantize with every tool, judge, print a Markdown table and write it as JSON beside the checkpoints."""
    work = Path(options.work).resolve()
    options.model = str(Path(options.model).resolve())
    write_rows(argparse.Namespace(**{**vars(options), "out": work}))
    results = [judged("bf16", Path(options.model), work, options, {})]
    for rows in counts(options):
        for tool in options.tools.split(","):
            out = work / f"{tool}-w{options.bits}g{options.group_size}r{rows}"
            cost = quantize(tool, options, work / f"calibration-{rows}.jsonl", out)
            results.append({**judged(tool, out, work, options, cost), "rows": rows})
            (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"{options.bits}-bit, groups of {options.group_size}, rows of 512 tokens, {options.heldout_rows} of them held "
        f"out, Python {sys.version.split()[0]}\n"
    )
    print(
        "| tool | rows | perplexity | × bf16 | mean KL, nats | ± | MB | seconds | processor s | peak MiB |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in results:
        cost = " | ".join(f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "processor", "peak"))
        ratio = row["perplexity"] / results[0]["perplexity"]
        print(
            f"| {row['tool']} | {row.get('rows', '')} | {row['perplexity']:.3f} | {ratio:.4f} | {row['kl']:.5f} "
            f"| {row['kl_error']:.5f} | {row['bytes'] / 1e6:.0f} | {cost} |"
        )


def quantize(tool: str, options, rows: Path, out: Path) -> dict:
    """Seconds of wall time and of processors, and MiB of peak memory, loading and saving included; {} when the output
    stood already.
    """
    if out.exists():
        print(f"{out}: stands already; remove it to quantize again", file=sys.stderr)
        return {}
    start = time.perf_counter()
    with open(out.with_suffix(".log"), "w") as log:
        # GPTQModel leaves a folder logs/ where it runs.
        child = subprocess.Popen(command_of(tool, options, rows, out), cwd=out.parent, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(
            f"{tool}: quantizing ended with exit code {os.waitstatus_to_exitcode(status)}; see {log.name}."
        )
    return {
        "seconds": time.perf_counter() - start,
        "processor": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss / 1024,
    }


def judged(tool: str, out: Path, work: Path, options, cost: dict) -> dict:
    """What is known of a checkpoint: its cost and its marks, measured now or by an earlier run."""
    known = work / f"{out.name}.json" if tool != "bf16" else work / "bf16.json"
    if known.exists() and not cost:
        return json.loads(known.read_text())
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    found = {"tool": tool, **judge(out, work, options.model), **cost, "bytes": size}
    known.write_text(json.dumps(found) + "\n")
    return found


def judge(model: Path, work: Path, original: str) -> dict:
    command = [*JUDGE, "perplexity", str(model), str(work / "heldout.jsonl"), original]
    with open(work / f"{model.name}.judge.log", "w") as log:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
    if run.returncode:
        raise SystemExit(f"{model}: judging ended with exit code {run.returncode}; see {log.name}.")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name, function, *positional):
        sub = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        for argument in positional:
            sub.add_argument(argument)
        sub.set_defaults(run=function)
        return sub

    sub = command("rows", write_rows, "model", "out")
    whole = command("table", table, "model")
    whole.add_argument("--tools", default="doctor,gptqmodel")
    whole.add_argument("--tune-rows", type=int, default=32, help="of a tool TOOL+tune, which tunes what TOOL wrote")
    whole.add_argument("--work", default=str(ROOT / ".cache" / "quality"))
    for each in (sub, whole):
        each.add_argument("--calibration-rows", default=CALIBRATION_ROWS, help="a number, or several with commas")
        each.add_argument("--heldout-rows", type=int, default=HELDOUT_ROWS)
    command("perplexity", perplexity, "model", "rows", "original")
    for each in (
        whole,
        command("llmcompressor", quantize_with_llmcompressor, "model", "rows", "out"),
        command("gptqmodel", quantize_with_gptqmodel, "model", "rows", "out"),
        command("autoawq", quantize_with_autoawq, "model", "rows", "out"),
    ):
        each.add_argument("--bits", type=int, default=4)
        each.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
