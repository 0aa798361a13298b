"""C175 unknown-activation: the activation function in config.json is one that no reader has.

Why: readers look the function of the MLP up by its name. transformers stops with the name alone as its message; vLLM
computes the MLP of most families with SiLU alone and stops at every other name, also at one that transformers knows.

Seen as:
- transformers: `KeyError: 'swiglu'`
- vLLM: `Only silu is supported for now.`

Do: write the name of the function that the model was trained with. Papers name an MLP by its gate: what they call
SwiGLU is `silu` here.

False alarms: models with code of their own (auto_map) are not judged. A name newer than transformers 5.24 is named too.

Fix safety: safe where only case differs, for swiglu, which can mean silu alone, and for swish, another name of silu
that vLLM refuses. Unsafe: the donor's name (`--from`). Else manual.

Sources: transformers 5.24 src/transformers/activations.py, ACT2CLS; vllm-project/vllm 0.32
vllm/model_executor/models/llama.py, qwen2.py, mistral.py, internlm2.py, granite.py ("Only silu is supported").
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule, value_from_base
from doctor.lint.testing import only_in, tiny

NAMES = frozenset(
    (
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
        *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu"),
        *("relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
        "swigluoai",  # of classes that compute gates themselves
    )
)
KEYS = ("hidden_activation", "hidden_act", "activation_function", "mlp_hidden_act")  # the first that stands is read
MEANT = {"swiglu": "silu"}
# Families for which vLLM refuses every other name, or, as for Mixtral, computes SiLU under any name.
SILU_ALONE = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "internlm2", "granite")


@rule("C175", "error", implied_by=("C155",))
def unknown_activation(checkpoint, spec, base, config, recipe):
    key = next((key for key in KEYS if spec.config.get(key) is not None), None)
    if key is None or config.get("auto_map") or spec.family is None:
        return
    name = spec.config[key]
    if isinstance(name, str) and name in NAMES:
        if recipe.runtime == "vllm" and spec.family in SILU_ALONE and name != "silu":
            yield finding(
                _(
                    "{key} is {name!r} in config.json; vLLM computes {architecture} with silu alone",
                    key=key,
                    name=name,
                    architecture=spec.architecture,
                ),
                at=Place("config.json", pointer=spec.at(key)),
                evidence={"said": name},
                fix=_written(spec, key, name, "silu") if name == "swish" else None,
                advice=_("serve it with transformers, or take the name that the model was published with"),
            )
        return
    shown = str(name)[:40]
    meant = MEANT.get(shown.lower(), shown.lower())
    yield finding(
        _("{key} is {name!r} in config.json, which no reader knows", key=key, name=shown),
        at=Place("config.json", pointer=spec.at(key)),
        evidence={"said": shown},
        fix=_written(spec, key, name, meant)
        if isinstance(name, str) and meant in NAMES
        else value_from_base(
            base, "config.json", spec.at(key), name, _("write the function that the model was trained with")
        ),
    )


def _written(spec, key, old, new):
    """A name that means the same function."""
    edit = SetJson("config.json", spec.at(key), new, old)
    return Fix(_('set "{key}": "{value}"', key=key, value=new), (edit,))


def bad():
    case = tiny(only_in("llama", "mistral", "qwen2", "qwen3", why="the example is of a class that reads hidden_act"))
    case.config["hidden_act"] = "swiglu"
    return case, "hidden_act is 'swiglu' in config.json, which no reader knows"


def more():
    """Names whose fixes the example above does not show."""
    for name in ("SiLU", "swiglu7"):
        case = bad()[0]
        case.config["hidden_act"] = name
        yield case


def good():
    case = tiny()
    if case.family == "llama":
        case.config["hidden_act"] = "silu"
    return case
