"""C166 unknown-class: model_type or architectures is unknown, or they name two families.

Why: transformers builds the model by model_type, vLLM, SGLang and llama.cpp by architectures. A name that a reader does
not know stops it. Where the two name different families, two readers run two models from one directory.

Seen as:
- transformers: `but Transformers does not recognize this architecture`
- vLLM: `are not supported for now`

Do: write both as the base model's config.json has them.

False alarms: a model that is newer than this version, or one of another library. Custom code (auto_map) is not judged.
A class that only a server has (a draft model's) is a note where model_type is known.

Fix safety: safe where one of the two names is known and the other differs from its partner by a letter or two. Else
manual.

Sources: transformers src/transformers/models/auto/modeling_auto.py; vllm-project/vllm
vllm/model_executor/models/registry.py; the table was read from transformers 5.24.
"""

from difflib import get_close_matches

from doctor.lint.rule import Fix, Place, SetJson, _, families_of, family_names, family_table, finding, rule, table
from doctor.lint.testing import tiny

# model_types and classes of servers, converters and older releases that transformers does not have.
ELSEWHERE = frozenset(
    ["eagle", "medusa", "mlp_speculator", "speculators", "eagle3", "timm_wrapper", "clip_vision_model"]
)
ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
ALIKE = 0.9  # share of equal letters above which a name is taken for a misspelling of another


@rule("C166", "warning", certainty="likely", implied_by=("C154", "C158"))
def unknown_class(checkpoint, config, spec):
    kind, stated = config.get("model_type"), config.get("architectures")
    if config.get("auto_map") or not isinstance(kind, str) or not kind or kind in ELSEWHERE or not spec.architecture:
        return
    if any(family_table(n)["architecture"] == spec.architecture for n in (kind, f"{kind}_text") if n in family_names()):
        return
    known = table("classes")
    modules, version = known["modules"], known["transformers"]
    name = ALIASES.get(spec.architecture, spec.architecture)
    types = {family_table(f)["model_type"]: f for f in family_names()}
    types |= {t: m for m, (own, _classes) in modules.items() for t in own}
    homes = {m for m, (_types, classes) in modules.items() if name in classes} | {f for f, _t in families_of(name)}
    home = types.get(kind)
    if home is None:
        partners = sorted(t for t, m in types.items() if m in homes)
        yield finding(
            _("transformers {version} knows no model_type {kind!r}", version=version, kind=kind[:60]),
            at=Place("config.json", pointer="/model_type"),
            evidence={"model_type": kind[:60]},
            fix=_spelled("model_type", "/model_type", kind, partners),
            advice=_("write the model_type of the base model"),
        )
    elif not homes:
        classes = modules.get(home, ((), ()))[1]
        fix = _spelled("architectures", "/architectures/0", name, classes)
        yield finding(
            _("transformers {version} has no class {name}", version=version, name=name[:60]),
            at=Place("config.json", pointer="/architectures/0"),
            evidence={"architecture": name[:60]},
            fix=fix,
            severity="" if fix.edits else "info",
        )
    elif home not in homes:
        yield finding(
            _(
                "model_type {kind} and architectures {name} are of two families: transformers builds the first, vLLM "
                "and llama.cpp the second",
                kind=kind,
                name=name,
            ),
            at=Place("config.json", pointer="/architectures/0"),
            evidence={"model_type": kind, "architectures": str(stated)[:80]},
            fix=Fix(_("write model_type and architectures as the base model has them"), (), "manual"),
        )
    elif spec.head_tensor and name.endswith("Model"):
        own = family_table(spec.family).get("architecture", "")
        edit = SetJson("config.json", "/architectures", [own], stated)
        yield finding(
            _(
                "architectures names {name}, the model without its head, and {tensor} is stored: vLLM serves it as an "
                "embedding model",
                name=name,
                tensor=spec.head_tensor,
            ),
            at=Place("config.json", pointer="/architectures/0"),
            evidence={"architecture": name},
            fix=Fix(_('set "{key}": {value}', key="architectures", value=[own]), (edit,), "unsafe")
            if own.endswith("ForCausalLM")
            else Fix(_("write model_type and architectures as the base model has them"), (), "manual"),
        )


def _spelled(key, pointer, stated, partners):
    """The one name that this is a misspelling of, else by hand."""
    near = [p for p in partners if not (stated.startswith(p) or p.startswith(stated))]
    near = get_close_matches(stated.lower(), [p.lower() for p in near], n=2, cutoff=ALIKE if len(stated) > 8 else 0.75)
    right = next((p for p in partners if near and p.lower() == near[0]), None)
    if right is None:
        return Fix(_("write model_type and architectures as the base model has them"), (), "manual")
    title = _('set "{key}": "{value}"', key=key, value=right)
    return Fix(title, (SetJson("config.json", pointer, right, stated),))


def bad():
    case = tiny()
    case.config["model_type"] = "frobnicator"
    version = table("classes")["transformers"]
    return case, f"transformers {version} knows no model_type 'frobnicator'"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    name = case.config["architectures"][0]
    case.config["architectures"] = [name.replace("Causal", "Casual") if "Causal" in name else name[:-1]]
    yield case
    case = tiny()
    case.config["architectures"] = [name.partition("For")[0] + "Model"]
    yield case
