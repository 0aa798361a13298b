"""Runs the part of another quantizer that fails in the field, in its own code, on a checkpoint; prints one line of
JSON.

Run it with .cache/venv-hf/bin/python. The peers' packages lie unpacked in .cache/peers and are never installed: they
want CUDA when they are imported. So each file is imported under its own name with stand-ins for its neighbours that
only a GPU needs; what is under test, the arithmetic and its errors, is the peer's.

    ask_peer.py {exllamav2,auto-gptq,autoawq-0.2.5,autoawq-0.2.9} MODEL LINEAR [--damp 0.01] [--tokens 256]

LINEAR (a module's name) gets the inputs that the float model gives it. "error" is the peer's exception, null where it
had none.
"""

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

PEERS = Path(__file__).resolve().parents[2] / ".cache" / "peers"


class Enough(Exception):
    """The input is there; the rest of the forward pass is of no use."""


def package(name: str, folder: Path) -> None:
    """A package whose files can be imported one by one, because its __init__ never runs."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def stand_in(name: str, **members) -> None:
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def inputs_of(model, name: str, tokens: int, vocabulary: int) -> torch.Tensor:
    """[1, tokens, in_features]: what the linear gets for random tokens; rows where an earlier defect spreads are
    kept.
    """
    seen = []

    def take(module, args):
        seen.append(args[0])
        raise Enough

    hook = model.get_submodule(name).register_forward_pre_hook(take)
    ids = torch.randint(3, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), contextlib.suppress(Enough):
        model(ids)
    hook.remove()
    return seen[0]


def exllamav2(model, name: str, x: torch.Tensor, damp: float) -> None:
    package("exllamav2", PEERS / "exllamav2" / "exllamav2")
    package("exllamav2.conversion", PEERS / "exllamav2" / "exllamav2" / "conversion")
    stand_in("exllamav2.ext", exllamav2_ext=None, none_tensor=None)
    stand_in("exllamav2.util", list_live_tensors=None)
    quantizer = importlib.import_module("exllamav2.conversion.adaptivegptq").AdaptiveGPTQ(model.get_submodule(name))
    # add_batch names "cuda:0"; the sum that it makes is this one
    x = x.reshape(-1, x.shape[-1]).float()
    quantizer.hessian, quantizer.num_batches, quantizer.hessian_device = x.T @ x, 1, "cpu"
    quantizer.prepare()


def auto_gptq_code():
    """The class GPTQ of AutoGPTQ."""
    package("auto_gptq", PEERS / "auto_gptq" / "auto_gptq")
    package("auto_gptq.quantization", PEERS / "auto_gptq" / "auto_gptq" / "quantization")
    torch.cuda.synchronize = lambda: None  # it waits for the card before it prints its seconds
    return importlib.import_module("auto_gptq.quantization.gptq").GPTQ


def auto_gptq(model, name: str, x: torch.Tensor, damp: float) -> None:
    quantizer = auto_gptq_code()(model.get_submodule(name))
    quantizer.quantizer.configure(4, perchannel=True, sym=True, mse=False)
    quantizer.add_batch(x.float(), None)
    quantizer.fasterquant(percdamp=damp, group_size=32)


def autoawq_code(version: str):
    """AutoAWQ's module of its quantizer."""
    root = PEERS / f"autoawq-{version}" / "awq"
    package("awq", root)
    package("awq.quantize", root / "quantize")
    kernels = ("WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_Marlin", "WQLinear_GEMVFast")
    stand_in("awq.utils.calib_data", get_calib_dataset=None)
    stand_in("awq.utils.utils", clear_memory=lambda *a: None, get_best_device=lambda: "cpu")
    stand_in("awq.modules.linear", **dict.fromkeys(kernels))
    stand_in("awq.quantize.scale", apply_scale=None, apply_clip=None)
    names = ("append_str_prefix", "get_named_linears", "set_op_by_name", "exclude_layers_to_not_quantize")
    stand_in("awq.utils.module", get_op_name=lambda module, op: "", **dict.fromkeys(names))
    return importlib.import_module("awq.quantize.quantizer")


def awq_quantizer(code, group_size: int):
    """One that searches 4-bit scales of linears that it is handed; its constructor wants a whole model."""
    quantizer = code.AwqQuantizer.__new__(code.AwqQuantizer)
    quantizer.__dict__.update(
        w_bit=4,
        group_size=group_size,
        zero_point=True,
        duo_scaling=True,
        max_chunk_memory=1 << 30,
        n_parallel_calib_samples=None,
    )
    return quantizer


def autoawq(version: str, model, name: str, x: torch.Tensor, damp: float) -> None:
    quantizer = awq_quantizer(autoawq_code(version), 32)
    linear = model.get_submodule(name)
    with torch.no_grad():
        quantizer.pseudo_quantize_tensor(linear.weight.data)
        quantizer._search_best_scale(model, SimpleNamespace(), [linear], x.to(linear.weight.dtype), linear)


RUNS = {
    "exllamav2": exllamav2,
    "auto-gptq": auto_gptq,
    "autoawq-0.2.5": lambda *a: autoawq("0.2.5", *a),
    "autoawq-0.2.9": lambda *a: autoawq("0.2.9", *a),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=RUNS)
    parser.add_argument("model")
    parser.add_argument("linear")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        error = ask(options)
    print(json.dumps({"error": error}))


def ask(options) -> str | None:
    from transformers import AutoModelForCausalLM

    # AutoAWQ computes in float16, whatever the checkpoint is stored in.
    dtype = torch.float16 if options.peer.startswith("autoawq") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    x = inputs_of(model, options.linear, options.tokens, model.config.vocab_size)
    try:
        RUNS[options.peer](model, options.linear, x, options.damp)
    except Exception as error:  # whatever it raises is the answer
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    return None


if __name__ == "__main__":
    main()
