"""Everything that is owed on a GPU, in one command and in this order, each step with a time limit of its own:

    python3 bench/gpu.py [--out DIR] [--budget SECONDS] [--wheels DIR] [STEP ...]

    goldens     what the kernels compute from fixed inputs, for fixtures/goldens/cuda.json; the host build must agree
    kernels     rung R4: kernels against the reference, odd shapes, NaN and Inf
    table       copy bandwidth, bf16 rate, each kernel beside them, the column loop in torch, whole layers
    model       a 7B-shaped model with random weights, 128 x 2048 tokens, quantized from directory to directory
    sanitizer   compute-sanitizer memcheck and racecheck over the kernels' tests

It runs under the python3 whose torch sees the GPU, from a checkout, and installs nothing: packages that it lacks
(greenlet, without which the model takes three times the forward work) may lie as wheels in DIR of --wheels, and the
native library is built where there is a C compiler. A failing step does not stop the next. In DIR of --out (default
.cache/gpu): log.txt, table.md for bench/RESULTS.md, cuda.json.

Figures are medians by events after warm-up, on buffers larger than the second-level cache where memory is the bound;
the share is of the copy bandwidth measured in the same run, not of a data sheet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "goldens": 60,
    "kernels": 120,
    "table": 150,
    "model": 200,
    "sanitizer": 180,
}  # most seconds of each, in order of worth: together more than the budget, which cuts the last
SANITIZED = (
    "gpu and (errors_reach or loop_adds or ragged and (129 or 64-256) "
    "or refinement and (asymmetric-40-256-32-3 or asymmetric-33-128-128-4) or fitted_to or minmax-True-48 "
    "or mse-False-128 or mse-True--1 or streams and 333 or words and (3 or 1056) or differences and 33-32 and True "
    "or cached and 512 or scan and 10007)"
)
REPEATS = 20


def places(wheels=None):
    """PYTHONPATH under which `doctor` is whole: a checkout keeps rules/ and cuda/ beside the package, and an
    installation maps them in.

    wheels: a folder of wheels, unpacked beside it.
    """
    site = ROOT / ".cache" / "gpu" / "site" / "doctor"
    shutil.rmtree(site.parent, ignore_errors=True)
    site.mkdir(parents=True)
    for entry in [*(ROOT / "doctor").iterdir(), ROOT / "rules", ROOT / "cuda"]:
        if entry.name != "scan":
            (site / entry.name).symlink_to(entry)
    (site / "scan").mkdir()  # file by file: build_library puts its own library there, and leaves the checkout's alone
    for entry in (ROOT / "doctor" / "scan").iterdir():
        (site / "scan" / entry.name).symlink_to(entry)
    for wheel in sorted(Path(wheels).glob("*.whl")) if wheels else ():
        zipfile.ZipFile(wheel).extractall(site.parent)
    return os.pathsep.join([str(site.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def build_library():
    """The native library into the site of places(), where the checkout has none of its sources and there is a compiler:
    the model is read at its speed.
    """
    site = ROOT / ".cache" / "gpu" / "site"
    library = site / "doctor" / "scan" / "libdoctor_cpu.so"
    if library.exists() and all(
        library.stat().st_mtime >= source.stat().st_mtime for source in (ROOT / "cpu").iterdir()
    ):
        return "there already"
    library.unlink(missing_ok=True)
    made = site.parent / "build"
    shutil.rmtree(made, ignore_errors=True)
    try:
        run = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(made), "--build-temp", str(made)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        shutil.copyfile(made / "doctor" / "scan" / "libdoctor_cpu.so", library)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error if isinstance(error, subprocess.TimeoutExpired) else run.stderr[-300:]
        return f"not built, NumPy reads the model: {why}"
    return "built"


def all_steps(wanted, out, budget, wheels=None):
    """Each step in a process of its own. Returns the exit status: 0 where all passed."""
    environment = {**os.environ, "PYTHONPATH": places(wheels), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    python = [sys.executable, "-P"]
    tests = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_kernels.py", "-k"]
    own = [*python, "bench/gpu.py", "--out", str(out)]
    commands = {
        "goldens": [[*own, "--inside", "goldens"]],
        "kernels": [[*tests, "gpu"]],
        "table": [[*own, "--inside", "table"]],
        "sanitizer": [
            ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *tests, SANITIZED]
            for tool in ("memcheck", "racecheck")
        ],
        "model": [[*own, "--inside", "model"]],
    }
    began, results = time.monotonic(), []
    (out / "log.txt").write_text("")
    print(f"native library: {build_library()}", flush=True)
    for step in wanted:
        for command in commands[step]:
            left = budget - (time.monotonic() - began)
            limit = min(STEPS[step] / len(commands[step]), left)
            name = step + (f"-{command[1].partition('=')[2]}" if step == "sanitizer" else "")
            if limit < 10:
                results.append((name, "not run: no time left", 0.0))
            elif shutil.which(command[0]) is None:
                results.append((name, f"not run: no {command[0]} here", 0.0))
            else:
                results.append((name, *one_step(name, command, limit, environment, out / "log.txt")))
    lines = [
        "| step | result | s |",
        "|---|---|---|",
        *(f"| {name} | {result} | {seconds:.0f} |" for name, result, seconds in results),
    ]
    print("", *lines, sep="\n")
    append(out, "", *lines)
    return int(any(result != "passed" for _, result, _ in results))


def one_step(name, command, limit, environment, log):
    print(f"\n== {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
    began = time.monotonic()
    with open(log, "a") as file:
        file.write(f"\n== {name}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = None
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    print("\n".join(lines[-60:] if status == 0 else lines[-90:]), flush=True)
    result = (
        "passed"
        if status == 0
        else f"ended at its limit of {limit:.0f} s"
        if status is None
        else f"failed with {status}"
    )
    return result, time.monotonic() - began


def append(out, *lines):
    """Lines to the end of table.md, in which everything that bench/RESULTS.md wants stands."""
    with open(out / "table.md", "a") as file:
        file.write("\n".join([*lines, ""]))


# inside a step


def milliseconds(work, repeats=REPEATS, prepare=None):
    """Median of `repeats` runs of work(); prepare() is not timed."""
    import torch

    times = []
    for turn in range(repeats + 2):
        if prepare:
            prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def columns_by_torch(T, U, scale, zero, top):
    """One column at a time with a rank-1 correction of the whole block: how the first implementations do it."""
    import torch

    for begin in range(0, len(T), 128):
        block = T[begin : begin + 128].clone()
        errors = torch.empty_like(block)
        for j in range(len(block)):
            g = (begin + j) // 128
            code = (block[j] / scale[g]).round().add(zero[g]).clamp(0, top)
            errors[j] = (block[j] - (code - zero[g]) * scale[g]) / U[begin + j, begin + j]
            block[j:] -= U[begin + j, begin + j : begin + len(block)][:, None] * errors[j][None]
        T[begin + 128 :] -= U[begin : begin + 128, begin + 128 :].T @ errors


class Bench:
    """Rows of the table: each is measured alone, and one that fails says why and leaves the others."""

    def __init__(
        self, device, side=4096, large=16384, wide=(29568, 8192), copy=1 << 28, tokens=16384, cached=32768 * 1024
    ):
        self.device, self.side, self.large, self.wide = device, side, large, wide
        self.copy, self.tokens, self.cached = copy, tokens, cached
        self.rate, self.shares, self.found = None, {}, {}
        self.lines = ["| what | ms | GB/s | share of copy | TFLOP/s |", "|---|---|---|---|---|"]

    def row(self, what, measure, moved=None, flops=None, bound=False):
        """One line. measure() gives milliseconds. Returns them, or None where it failed. bound: memory is all that
        should hold it up.
        """
        try:
            ms = measure()
        except Exception as error:  # a figure that cannot be had must not cost the others
            self._say(f"| {what} | failed: {type(error).__name__}: {str(error).splitlines()[0][:160]} | | | |")
            return None
        rate = moved / ms / 1e6 if moved else None
        self.rate = self.rate or rate
        self.found[what] = ms
        if bound:
            self.shares[what] = rate / self.rate
        self._say(
            f"| {what} | {ms:.3f} | {f'{rate:.0f}' if rate else ''} | {f'{rate / self.rate:.2f}' if rate else ''} | "
            f"{f'{flops / ms / 1e9:.1f}' if flops else ''} |"
        )
        return ms

    def _say(self, line):
        self.lines.append(line)
        print(line, flush=True)

    def random(self, *shape):
        import torch

        return torch.randn(*shape, device=self.device, generator=torch.Generator(self.device).manual_seed(0))

    def card(self):
        import torch

        first, second = torch.empty(2, self.copy, device=self.device)
        self.row(
            f"copy of {first.nbytes >> 20} MiB", partial(milliseconds, partial(second.copy_, first)), 2 * first.nbytes
        )
        del first, second
        n = 2 * self.side
        A = self.random(n, n).to(torch.bfloat16)
        self.row(f"bf16 product of {n}^3", lambda: milliseconds(lambda: A @ A), None, 2 * n**3)
        F = A[: n // 2, : n // 2].float()
        self.row(
            f"float32 product of {n // 2}^3, no TF32", lambda: milliseconds(lambda: F @ F, 5), None, 2 * (n // 2) ** 3
        )

    def hessian(self, k, tokens):
        """H of correlated rows, and the seconds that its pieces take."""
        import torch

        X = self.random(tokens, k) * torch.linspace(0.2, 3, k, device=self.device)
        X += X.roll(1, 1) / 2
        half = X.to(torch.bfloat16)
        work = 2 * tokens * k * k
        self.row(f"X^T X of {tokens} x {k}, float32", lambda: milliseconds(lambda: X.T @ X, 3), None, work)
        self.row(
            f"X^T X of {tokens} x {k}, bf16 in, float32 out",
            lambda: milliseconds(lambda: torch.mm(half.T, half, out_dtype=torch.float32), 5),
            None,
            work,
        )
        return 2 / tokens * X.T @ X

    def layer(self):
        """A layer of side x side, piece by piece."""
        import torch

        from doctor.quant.solve import cuda, factor, gptq, grid
        from doctor.quant.solve.numerics import exact_products

        n = k = self.side
        with exact_products():
            W, H = self.random(n, k) * 0.02, self.hessian(k, self.tokens)
            damped = H + 0.01 * H.diagonal().mean() * torch.eye(k, device=self.device)
            self.row(
                f"Cholesky of {k} (potrf)",
                lambda: milliseconds(lambda: torch.linalg.cholesky_ex(damped), 5),
                None,
                k**3 / 3,
            )
            self.row(
                f"the factor of {k}, damped, reversed, inverted",
                lambda: milliseconds(lambda: factor.factorise_with_escalation(H, 0.01, 0.1), 5),
            )
            U, _ = factor.factorise_with_escalation(H, 0.01, 0.1)
            cost = U.diagonal() ** -2
            self.row(
                f"grid search of {n} x {k}, groups of 128",
                lambda: milliseconds(lambda: cuda.fit(W, 4, 128, True, mse=True, weight=cost)),
                W.nbytes,
            )
            static = cuda.fit(W, 4, 128, True, mse=True, weight=cost, zero_min=1)
            groups, rule = (
                grid.contiguous_groups(k, 128, self.device),
                grid.GridParams(4, 128, True, True, False, 1, torch.float16),
            )
            T = W.T.contiguous()
            work, small, mine = T.clone(), U[:128, :128].contiguous(), T[:128].contiguous()
            first = grid.Grid(static.scale[:, :1], static.zero[:, :1])
            block = self.row(
                "a block of 128 columns, kernel alone",
                lambda: milliseconds(lambda: cuda.round_columns(mine, small, rule, groups[:128], first)),
                n * 128 * 9,
                n * 128 * 128,
            )
            scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32)
            loop = self.row(
                "the same block in torch, column by column",
                lambda: milliseconds(lambda: columns_by_torch(mine, small, scale, zero, 15), 3),
            )
            if block and loop:
                self.found["loop"] = loop / block
                self._say(f"| the block's kernel is {loop / block:.0f} times the torch loop's speed | | | | |")
            self.row(
                "all columns, kernels and products",
                lambda: milliseconds(
                    lambda: cuda.round_columns(work, U, rule, groups, static), prepare=lambda: work.copy_(T)
                ),
                None,
                n * k * k,
            )
            self.row(
                "all columns, torch column by column",
                lambda: milliseconds(lambda: columns_by_torch(work, U, scale, zero, 15), 1, lambda: work.copy_(T)),
                None,
                n * k * k,
            )
            codes, _ = cuda.round_columns(T.clone(), U, rule, groups, static)
            E = (W - grid.dequantize(codes.T, static)).T.contiguous()
            self.row(
                "one refinement, kernels and products",
                lambda: milliseconds(lambda: cuda.refine(E, damped, codes.clone(), static, groups, rule, 128), 5),
                None,
                3 * n * k * k,
            )
        for refine in (0, 1):
            self.row(
                f"gptq.solve of {n} x {k}, refine {refine}, end to end",
                partial(milliseconds, partial(gptq.solve, W, H, refine=refine), 5),
            )

    def memory_bound(self):
        import torch

        from doctor.core.recipe import Scheme
        from doctor.formats.registry import KNOWN
        from doctor.quant.solve import cuda, grid

        n = k = self.large
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=self.device)
        across = codes.T.contiguous()
        self.row(
            f"pack {n} x {k}, GPTQ order",
            partial(milliseconds, partial(cuda.pack_columns, across, 4)),
            n * k * 1.5,
            bound=True,
        )
        self.row(
            "pack, compressed-tensors order",
            partial(milliseconds, partial(cuda.pack_rows, codes, 4)),
            n * k * 1.5,
            bound=True,
        )
        self.row("pack, AWQ order", partial(milliseconds, partial(cuda.awq_words, across.T)), n * k * 1.5, bound=True)
        found = grid.Grid(
            torch.full((n, k // 128), 0.01, device=self.device).half().float(),
            torch.full((n, k // 128), 8, dtype=torch.int32, device=self.device),
        )
        groups = grid.contiguous_groups(k, 128, self.device)
        for name, back in (
            ("gptq", lambda w: cuda.gptq_dequantize(**w, bits=4)),
            ("awq", lambda w: cuda.awq_dequantize(**w)),
            ("compressed-tensors", lambda w: cuda.compressed_dequantize(**w, bits=4)),
        ):
            words = KNOWN[name].pack(codes, found, groups, Scheme(4, 128))
            self.row(
                f"dequantize, {KNOWN[name].label} order",
                partial(milliseconds, partial(back, words)),
                n * k * 4.5,
                bound=True,
            )
        del codes, across, words
        W, s = self.random(n, k // 2) * 0.02, torch.rand(k // 2, device=self.device) + 0.5
        self.row(
            f"AWQ difference of {n} x {k // 2}",
            partial(milliseconds, partial(cuda.awq_difference, W, s, 4, 128, False)),
            2 * W.nbytes,
            bound=True,
        )
        del W
        x = self.random(self.cached).half()
        for bits in (4, 8):
            moved = x.nbytes + x.numel() * (bits + 0.5) / 8
            self.row(
                f"KV cache store of {x.numel() >> 20} M values, {bits} bits",
                partial(milliseconds, partial(cuda.kv_store, x, bits)),
                moved,
                bound=True,
            )
            kept = cuda.kv_store(x, bits)
            self.row(
                f"KV cache load, {bits} bits",
                partial(milliseconds, partial(cuda.kv_load, *kept, bits)),
                moved,
                bound=True,
            )
        half = self.random(self.copy).to(torch.bfloat16)
        scan = cuda.DeviceScan(self.device)
        self.row(
            f"health scan of {half.nbytes >> 20} MiB bf16",
            lambda: milliseconds(lambda: scan.add(half)),
            half.nbytes,
            bound=True,
        )

    def wanted(self):
        """What was asked for beside what was measured."""
        layer = next(
            (
                ms
                for what, ms in self.found.items()
                if what.startswith(f"gptq.solve of {self.side} x {self.side}, refine 0")
            ),
            None,
        )
        least = min(self.shares, key=self.shares.get, default=None)
        lines = [
            ("the block's kernel against the torch loop, times", 50, self.found.get("loop"), True),
            (f"a layer of {self.side} x {self.side}, ms", 10, layer, False),
            (f"least share of the copy rate where memory is the bound ({least})", 0.7, self.shares.get(least), True),
        ]
        return ["| wanted | bound | measured | met |", "|---|---|---|---|"] + [
            f"| {what} | {'>=' if more else '<='} {bound} | {'failed' if value is None else f'{value:.2f}'} | "
            f"{'yes' if value is not None and (value >= bound if more else value <= bound) else 'no'} |"
            for what, bound, value, more in lines
        ]

    def wide_layer(self):
        from doctor.quant.solve import gptq

        k, n = self.wide
        W, H = self.random(n, k) * 0.02, self.hessian(k, self.tokens)
        for refine in (0, 1):
            self.row(
                f"gptq.solve of {n} x {k}, refine {refine}, end to end",
                partial(milliseconds, partial(gptq.solve, W, H, refine=refine), 1),
            )


def table(device, out, **sizes):
    import torch

    bench = Bench(device, **sizes)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    where = f"{torch.cuda.get_device_name(device)}, {driver()}, {versions}, commit {commit()}"
    print(where, *bench.lines, sep="\n", flush=True)
    for part in (bench.card, bench.layer, bench.memory_bound, bench.wide_layer):
        try:
            part()
        except Exception as error:  # the next part may still run
            bench._say(
                f"| {part.__name__} | failed: {type(error).__name__}: {str(error).splitlines()[0][:160]} | | | |"
            )
        torch.cuda.empty_cache()
        (out / "table.md").write_text("\n".join([where, "", *bench.lines, "", *bench.wanted(), ""]))
    print(*bench.wanted(), sep="\n")
    return any("failed" in line for line in bench.lines)


def driver():
    run = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return f"driver {run.stdout.split()[0]}" if run and run.stdout.split() else "driver unknown"


def commit():
    run = shutil.which("git") and subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown" if run else "unknown"


def goldens(device, out):
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("cuda", "helpers")]
    from test_goldens import record

    (out / "cuda.json").write_text(json.dumps(record(device), indent=1) + "\n")
    print(f"recorded {out / 'cuda.json'}: copy it to fixtures/goldens/cuda.json and commit it")


def write_model(folder, device, layers=32, hidden=4096, inner=11008, heads=32):
    """A Llama checkpoint in bfloat16 with random weights made on the device; everything around the blocks is small."""
    import torch
    from safetensors.torch import save_file

    from doctor.lint.testing import tiny

    case = tiny("llama")
    case.config.update(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
    )
    case.json["tokenizer_config.json"]["model_max_length"] = 4096
    folder.mkdir(parents=True)
    for name, value in case.json.items():
        (folder / name).write_text(json.dumps(value))
    vocabulary = case.config["vocab_size"]
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, hidden),
        "v_proj": (hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    g = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return (torch.randn(*shape, device=device, generator=g) * 0.02).to(torch.bfloat16).cpu()

    ones, index = torch.ones(hidden, dtype=torch.bfloat16), {}
    outer = {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": ones.clone()}
    if not case.config.get("tie_word_embeddings"):
        outer["lm_head.weight"] = random(vocabulary, hidden)
    for i in range(layers + 1):
        shard = (
            outer
            if i == layers
            else {
                f"model.layers.{i}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}.weight": random(*shape)
                for name, shape in shapes.items()
            }
        )
        if i < layers:
            shard |= {
                f"model.layers.{i}.{norm}.weight": ones.clone()
                for norm in ("input_layernorm", "post_attention_layernorm")
            }
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return vocabulary


def model(device, out, rows=128, length=2048, **sizes):
    import random

    from doctor import api
    from doctor.core.recipe import Recipe
    from doctor.quant.forward.suspended import WITHOUT_GREENLET, greenlet

    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as place:
        began = time.monotonic()
        vocabulary = write_model(Path(place) / "m", device, **sizes)
        print(f"written in {time.monotonic() - began:.1f} s to {place}", flush=True)
        rng = random.Random(0)
        text = Path(place) / "rows.jsonl"
        text.write_text(
            "\n".join(
                json.dumps({"input_ids": [1] + [rng.randrange(3, vocabulary) for _ in range(length - 1)]})
                for _ in range(rows)
            )
        )
        if greenlet is None:
            print(WITHOUT_GREENLET)
        began = time.monotonic()
        last = began

        def progress(line):
            nonlocal last
            now = time.monotonic()
            print(f"{now - began:7.1f} s (+{now - last:.1f})  {line}", flush=True)
            last = now

        result = api.quantize(
            Path(place) / "m",
            Path(place) / "o",
            Recipe(),
            calibration=text,
            rows=rows,
            max_seq_length=length,
            device=str(device),
            progress=progress,
        )
        seconds = time.monotonic() - began
        for finding in result.report.findings:
            print(finding.code, finding.message)
        line = (
            f"a model of {sizes or '7B shape'}, {rows} x {length} tokens, from directory to directory: {seconds:.1f} s"
        )
        print(line)
        append(out, line)
        return not result.report.ok


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", default=[], help=f"of {', '.join(STEPS)}; all of them by default")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of packages that this Python lacks")
    parser.add_argument("--inside", choices=("goldens", "table", "model"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.inside:
        sys.path[:0] = places(options.wheels).split(os.pathsep)
    import torch

    from doctor.quant.solve import cuda

    reason = cuda.available("cuda")
    if reason:
        print(f"no GPU here: {reason}. Nothing was run.")
        return 3
    if not options.inside:
        return all_steps(options.steps or list(STEPS), options.out.resolve(), options.budget, options.wheels)
    device = torch.device("cuda", torch.cuda.current_device())
    return int(bool({"goldens": goldens, "table": table, "model": model}[options.inside](device, options.out)))


if __name__ == "__main__":
    sys.exit(main())
