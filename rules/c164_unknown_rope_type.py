"""C164 unknown-rope-type: rope_type is known to no library.

Why: transformers looks the type up in a table of functions, vLLM in a chain of names; both stop at one that is not
there. Tools that ignore it compute unscaled RoPE, which reads long texts wrongly.

Seen as:
- vLLM: `ValueError: Unknown RoPE scaling type`
- transformers: `Missing validation function in 'RopeParameters' for 'rope_type'=`

Do: take the object from the base model's config.json. "default" means RoPE without scaling.

False alarms: a type that is newer than this version. Custom code (auto_map) may have types of its own and is not judged.

Fix safety: unsafe, and only with `--from`: the whole object is taken from the donor. Else manual.

Sources: transformers src/transformers/modeling_rope_utils.py, ROPE_INIT_FUNCTIONS, and rope_type in its models;
vllm-project/vllm vllm/model_executor/layers/rotary_embedding/__init__.py, `get_rope`.
"""

from doctor.lint.rule import Place, _, finding, rule, value_from_base
from doctor.lint.testing import tiny

KNOWN = frozenset(
    [
        "default",
        "linear",
        "dynamic",
        "yarn",
        "longrope",
        "su",
        "llama3",
        "proportional",
        "mrope",
        "xdrope",
        "ntk",
        "ntk_alpha",
        "axial",
        "deepseek_yarn",
        "deepseek_llama_scaling",
        "mllama4",
        "openpangu",
        "none",
    ]
)


@rule("C164", "warning", certainty="likely", implied_by=("C144",))
def unknown_rope_type(checkpoint, spec, config, base):
    if config.get("auto_map"):
        return
    for key in ("rope_scaling", "rope_parameters"):
        block = spec.config.get(key)
        for path, part in _objects(block, key) if isinstance(block, dict) else ():
            name = "rope_type" if part.get("rope_type") is not None else "type"
            kind = part.get(name)
            if kind is None or (isinstance(kind, str) and kind in KNOWN):
                continue
            yield finding(
                _("{name} is {kind!r} in {path}; no library knows this type", name=name, kind=kind, path=path),
                at=Place("config.json", pointer=spec.at(f"{path.replace('.', '/')}/{name}")),
                evidence={"type": str(kind)[:60]},
                fix=value_from_base(
                    base, "config.json", spec.at(key), block, _("take this object from the base model's config.json")
                ),
            )


def _objects(block, key):
    """(path, object) of each object of RoPE parameters: one for all layers, or one for each kind of layer."""
    nested = {name: part for name, part in block.items() if isinstance(part, dict)}
    return [(f"{key}.{name}", part) for name, part in nested.items()] or [(key, block)]


def bad():
    case = tiny()
    case.config["rope_scaling"] = {"rope_type": "yarnn", "factor": 4.0, "original_max_position_embeddings": 64}
    return case, "rope_type is 'yarnn' in rope_scaling; no library knows this type"


def good():
    case = tiny()
    case.config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return case
