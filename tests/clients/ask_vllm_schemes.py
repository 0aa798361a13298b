"""Asks vLLM which scheme it takes for groups of compressed-tensors, without a model: one line of JSON.

    ask_vllm_schemes.py < GROUPS       GROUPS: a list of [weights, input_activations, format]

The answer has, for each, the name of vLLM's class or null where vLLM refuses. Any compute capability is taken as there:
classes that look for a kernel of this machine as soon as they are made are replaced by empty ones of their name.
"""

import contextlib
import json
import os
import sys


def main() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    groups = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        answers = ask(groups)
    print(json.dumps(answers))


def ask(groups):
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as module

    empty = {"__init__": lambda self, *args, **kwargs: None, "get_min_capability": classmethod(lambda cls: 0)}
    for name in [
        n for n in dir(module) if n.startswith("CompressedTensorsW") and ("Fp8" in n or "p4" in n or "p8" in n)
    ]:
        if name != "CompressedTensorsW4A8Fp8":  # this one judges what it is given
            setattr(module, name, type(name, (), empty))
    module.CompressedTensorsConfig._check_scheme_supported = staticmethod(lambda *args, **kwargs: True)
    config = module.CompressedTensorsConfig({}, [], "", {}, [])
    answers = []
    for weights, inputs, form in groups:
        try:
            args = [None if a is None else QuantizationArgs(**a) for a in (weights, inputs)]
            answers.append(type(config._get_scheme_from_parts(*args, format=form, layer_name="l")).__name__)
        except (NotImplementedError, ValueError, AttributeError, AssertionError, KeyError) as error:
            print(f"{weights} {inputs} {form}: {error}", file=sys.stderr)
            answers.append(None)
    return answers


if __name__ == "__main__":
    main()
