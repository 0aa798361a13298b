"""F068 bias-promised-absent: linears have no bias in the files, and config.json gives them one.

Why: transformers makes a bias of zeros for each and reports the tensors as missing; vLLM makes room for them and never
fills it, so that whatever memory held is added to queries, keys and values; a converter to GGUF writes a model without
them. What a reply is depends on the reader.

Seen as:
- transformers: `Some weights of LlamaForCausalLM were not initialized`

Do: take the biases from where the model came from, or set the key to false where it never had any.

False alarms: none known. Linears that are quantized and whose program left biases of zeros out need the key set, too.

Fix safety: unsafe: the key is set to false, which transformers computes alike; biases that were lost stay lost.

Sources: transformers src/transformers/models/llama/modeling_llama.py and modeling_qwen3.py (bias=); vllm-project/vllm
vllm/model_executor/layers/linear.py (bias = Parameter(torch.empty(...))).
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, keyed_linears, plural, rule
from doctor.lint.testing import only_in, tiny


@rule("F068", "error", implied_by=("C142", "F050", "F057", "F062", "G330"))
def bias_promised_absent(checkpoint, tensors, placement, config):
    spec = placement.spec
    for key, linears in keyed_linears(placement, config):
        if not key or spec.config.get(key) is not True:
            continue
        modules = sorted(name.rpartition(".")[0] for name in linears)
        lost = [f"{module}.bias" for module in modules if f"{module}.bias" not in tensors]
        if not lost:
            continue
        edit = SetJson("config.json", spec.at(key), False, True)
        yield finding(
            plural(
                "{n:,} linear has no bias in the files ({first}), which {key} promises",
                "{n:,} linears have no bias in the files (first {first}), which {key} promises",
                len(lost),
                first=lost[0],
                key=key,
            ),
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"biases": len(lost), "linears": len(linears), "names": lost[:100]},
            fix=Fix(_("set {key} to {value}", key=key, value="false"), (edit,), "unsafe")
            if len(lost) == len(linears)
            else None,
            advice=_("take the biases from where the model came from"),
        )


def bad():
    case = tiny(
        only_in(
            "llama", "qwen3_moe", "gemma", "olmoe", why="the example is of a class that has biases where a key says so"
        )
    )
    case.config["attention_bias"] = True
    for name in [n for n in case.tensors if n.endswith(".bias")]:
        del case.tensors[name], case.dtypes[name]
    return case, (
        "8 linears have no bias in the files (first model.layers.0.self_attn.k_proj.bias), which attention_bias promises"
    )


def good():
    return tiny()
