"""Loads a checkpoint with transformers on the CPU, continues a prompt greedily, prints one line of JSON.

Run it with .cache/venv-hf/bin/python. `load` is also what bench/quality.py judges every tool's output with.
The compute dtype is float32 unless told otherwise: a CPU without bf16 instructions takes several times longer
in bfloat16.

    ask_transformers.py MODEL PROMPT... [--tokens 24] [--dtype float32] [--gptqmodel]

"text" continues the first prompt; "answers" has the token ids of every prompt's continuation. With --gptqmodel the
model is loaded by GPTQModel.load, which has linears for the experts of a mixture where transformers has one tensor
(bfloat16: its torch kernel takes no float32).
"""

import argparse
import contextlib
import json
import os
import sys


def load(model: str, dtype: str):
    """The model, ready to run; a quantized one through the code that belongs to its format."""
    # GPTQModel would compile its kernel anew for every linear: minutes for seconds of arithmetic.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig

    declared = quantization_of(AutoConfig.from_pretrained(model))
    extra = {}
    if declared and declared["quant_method"] == "gptq":
        # GPTQModel's plain torch kernel: the only one that runs everywhere and in float32.
        extra["quantization_config"] = GPTQConfig(bits=declared["bits"], backend="torch")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), device_map="cpu", **extra)
    return loaded.eval()


def load_with_gptqmodel(model: str):
    """The model as GPTQModel makes it."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import torch
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(model, device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model.eval()


def quantization_of(config) -> dict | None:
    """quantization_config of a loaded config as a dict, None where there is none."""
    declared = getattr(config, "quantization_config", None)
    return declared if declared is None or isinstance(declared, dict) else declared.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gptqmodel", action="store_true")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # libraries print banners; stdout carries the answer alone
        answer = ask(options)
    print(json.dumps(answer))


def ask(options) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load_with_gptqmodel(options.model) if options.gptqmodel else load(options.model, options.dtype)
    answers = []
    for prompt in options.prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False)[0]
        answers.append(ids[inputs["input_ids"].shape[1] :])
    declared = quantization_of(model.config)
    return {
        "text": tokenizer.decode(answers[0], skip_special_tokens=True),
        "answers": [ids.tolist() for ids in answers],
        "quantization": declared and declared["quant_method"],
        "dtype": str(model.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    main()
