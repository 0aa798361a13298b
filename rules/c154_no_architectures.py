"""C154 no-architectures: config.json has no architectures.

Why: servers and converters choose their code by this name; transformers uses model_type and does not need it.

Seen as:
- vLLM: `ValueError: No model architectures are specified`
- llama.cpp: `KeyError: 'architectures'`

Do: write the model's class; for a text model, the one that ends in ForCausalLM.

False alarms: directories that only transformers reads.

Fix safety: safe for a known family: the class follows from model_type.

Sources: vllm-project/vllm vllm/model_executor/models/registry.py; ggml-org/llama.cpp convert_hf_to_gguf.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, family_table, finding, rule
from doctor.lint.testing import tiny


@rule("C154", "warning")
def no_architectures(checkpoint, config, spec, files):
    stated = config.get("architectures")
    if isinstance(stated, list) and stated and all(isinstance(a, str) for a in stated):
        return
    fix = Fix(_("write the model's class into architectures"), (), "manual")
    if spec.family is not None and spec.text_key is None:
        value = [family_table(spec.family)["architecture"]]
        fix = Fix(
            _('set "{key}": {value}', key="architectures", value=value),
            (SetJson("config.json", "/architectures", value, config.get("architectures", MISSING)),),
        )
    yield finding(
        _("config.json has no architectures; it must be a list with the model's class")
        if "architectures" not in config
        else _(
            "config.json has architectures {value}; it must be a list with the model's class", value=str(stated)[:40]
        ),
        at=Place("config.json", pointer="/architectures"),
        fix=fix,
    )


def bad():
    case = tiny()
    del case.config["architectures"]
    return case, "config.json has no architectures; it must be a list with the model's class"


def good():
    return tiny()
