"""C163 promised-mtp-layer: config.json counts a multi-token-prediction layer that no file holds.

Why: transformers drops this layer when it loads and saves a model, and the key in config.json stays. The model itself is whole.
A converter counts the layer in and writes a file that does not load; a server with speculative decoding starts with a random
layer or stops.

Seen as:
- llama.cpp: `missing tensor 'blk.46.attn_norm.weight'`
- vLLM: `Following weights were not initialized from checkpoint: {'model.layers.16.eh_proj.weight'`

Do: set the key to 0, or copy the layer from the base model.

False alarms: none known: without the layer nothing can read it.

Fix safety: safe: the key then matches the files, and no other part of the model uses it.

Sources: ggml-org/llama.cpp issue 19733; vllm-project/vllm vllm/model_executor/models/deepseek_mtp.py; transformers
src/transformers/models/deepseek_v3/modeling_deepseek_v3.py (_keys_to_ignore_on_load_unexpected).
"""

import re

from doctor.lint.rule import Fix, Place, SetJson, _, finding, plural, rule
from doctor.lint.testing import tiny

KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
MTP = re.compile(r"(?:^|\.)(?:mtp|nextn|mtp_layers|nextn_predict_layers)(?:\.|$)")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@rule("C163", "warning", implied_by=("F001", "F010", "F021"))
def promised_mtp_layer(checkpoint, spec, tensors):
    for key in KEYS:
        promised = spec.config.get(key)
        if type(promised) is not int or promised < 1 or not spec.n_layers or not spec.linears:
            continue
        if any(MTP.search(name) or _number(name) >= spec.n_layers for name in tensors):
            continue
        yield finding(
            plural(
                "{key} promises layer {first}, which is in no file",
                "{key} promises {n} layers from layer {first} on, which are in no file",
                promised, key=key, first=spec.n_layers,
            ),
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"promised": promised, "layers": spec.n_layers},
            fix=Fix(_('set "{key}" to 0', key=key), (SetJson("config.json", spec.at(key), 0, promised),), "safe"),
            advice=_("or copy the layer from the base model"),
        )  # fmt: skip


def _number(name):
    match = LAYER.search(name)
    return int(match[1]) if match else -1


def bad():
    case = tiny()
    case.config["num_nextn_predict_layers"] = 1
    return case, f"num_nextn_predict_layers promises layer {case.config['num_hidden_layers']}, which is in no file"


def good():
    case = tiny()
    case.config["num_nextn_predict_layers"] = 0
    return case
