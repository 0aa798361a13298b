"""F066 bias-not-read: linear has a bias that the model's class does not have.

Why: config.json says whether these linears have biases (attention_bias, mlp_bias), and without a word they have none.
transformers then reports the tensor as unexpected, vLLM skips every bias that it does not expect, and both compute
without it: the model that runs is not the one that was trained.

Seen as:
- transformers: `Some weights of the model checkpoint at`

Do: set the key that config.json lacks, or name the class that has these biases.

False alarms: biases of zeros, as packers of old wrote them, change nothing and are not reported.

Fix safety: unsafe: the key is set where it exists and every linear of the kind has its bias; the reply changes. No fix
else.

Sources: transformers src/transformers/models/llama/modeling_llama.py and modeling_qwen3.py (bias=); vllm-project/vllm
vllm/model_executor/models/utils.py (AutoWeightsLoader.load_weights: "Ignore unexpected biases").
"""

from doctor.lint.rule import ATTENTION, MISSING, Fix, Place, SetJson, _, finding, keyed_linears, plural, rule
from doctor.lint.testing import np, only_in, tiny

OTHER_KEYS = ("bias", "qkv_bias", "use_bias")  # of classes of the same tensor names, which some readers go by


@rule("F066", "warning", implied_by=("C142", "F062", "G330"))
def bias_not_read(checkpoint, tensors, placement, config, largest_values):
    spec = placement.spec
    for key, linears in keyed_linears(placement, config):
        if any(spec.config.get(word) for word in (key, *OTHER_KEYS)):
            continue
        held = sorted(name for weight in linears if (name := weight.removesuffix("weight") + "bias") in tensors)
        lost = [name for name in held if largest_values.get(name, 0.0) != 0]
        if not lost:
            continue
        edit = SetJson("config.json", spec.at(key), True, spec.config.get(key, MISSING))
        yield finding(
            plural(
                "{n:,} linear has a bias that {architecture} does not read ({first}), with values up to {most:.3g}",
                "{n:,} linears have biases that {architecture} does not read (first {first}), "
                "with values up to {most:.3g}",
                len(lost),
                architecture=spec.architecture,
                first=lost[0],
                most=max(largest_values[name] for name in lost),
            ),
            at=Place(tensors[lost[0]].shard, tensor=lost[0]),
            evidence={"biases": len(lost), "linears": len(linears), "names": sorted(lost)[:100]},
            fix=Fix(_("set {key} to {value}", key=key, value="true"), (edit,), "unsafe")
            if key and len(held) == len(linears)
            else None,
            advice=_("make sure that config.json names the class of these weights"),
        )


def bad():
    case = tiny(
        only_in("llama", "mistral", "qwen3", why="the example is of a class whose linears of attention have no biases")
    )
    case.config.pop("attention_bias", None)
    for linear in case.spec.linears:
        if linear.role in ATTENTION:
            name = f"{linear.name}.bias"
            case.tensors[name] = np.full(case.tensors[linear.tensor].shape[0], 0x3F00, np.uint16)
            case.dtypes[name] = "BF16"
    return case, (
        f"8 linears have biases that {case.spec.architecture} does not read (first model.layers.0.self_attn.k_proj.bias), "
        "with values up to 0.5"
    )


def good():
    case = bad()[0]
    for name in case.tensors:
        if name.endswith(".bias"):
            case.tensors[name] = case.tensors[name] * 0
    return case
