"""C158 no-model-type: config.json has no model_type.

Why: transformers chooses its classes by model_type and stops without it.

Seen as:
- transformers: `Should have a `model_type` key in its config.json`
- transformers: `Unrecognized model in`

Do: write the model_type that belongs to the class in architectures.

False alarms: configs of programs other than transformers (Mistral's params.json has another name and is not read here).

Fix safety: safe where architectures names a known class; else manual.

Sources: transformers src/transformers/models/auto/configuration_auto.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, families_of, finding, rule
from doctor.lint.testing import tiny


@rule("C158", "error")
def no_model_type(checkpoint, config, spec):
    if isinstance(config.get("model_type"), str) and config["model_type"]:
        return
    found = families_of(spec.architecture)
    # Some families use another's class (InternLM3 runs as LlamaForCausalLM); the class's own family has its name.
    own = {kind for _class, kind in found if spec.architecture.lower() == f"{kind.replace('_', '')}forcausallm"}
    known = own if len(own) == 1 else {kind for _class, kind in found}
    fix = Fix(_("write the model_type of the base model"), (), "manual")
    if len(known) == 1:
        kind = known.pop()
        fix = Fix(
            _('set "{key}": "{value}"', key="model_type", value=kind),
            (SetJson("config.json", "/model_type", kind, config.get("model_type", MISSING)),),
        )
    yield finding(
        _("config.json has no model_type"),
        at=Place("config.json", pointer="/model_type"),
        evidence={"architecture": spec.architecture},
        fix=fix,
    )


def bad():
    case = tiny()
    del case.config["model_type"]
    return case, "config.json has no model_type"


def good():
    return tiny()
