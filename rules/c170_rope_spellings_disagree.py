"""C170 rope-spellings-disagree: old and new keys of the rotary embedding state different values.

Why: transformers 5 reads the base from rope_parameters and older readers from rope_theta: one directory is two models.
Of two objects of scaling transformers 5 takes rope_scaling and drops rope_parameters, with a base that stands there
alone. Each reader answers in fluent text, one of them in nonsense from the second sentence on.

Seen as:
- vLLM: fluent nonsense with one version of transformers, sense with another

Do: find out what the model was trained with (the base model's config.json says it) and write it under both keys.

False alarms: a value that one of the two objects does not state is not compared.

Fix safety: manual: which of the two is right is not in the files. With `--from` the donor's values, unsafe.

Sources: transformers 5.24 src/transformers/modeling_rope_utils.py (convert_rope_params_to_dict: rope_scaling before
rope_parameters, rope_theta only where neither states it); transformers 4.57 modeling_llama.py.
"""

from doctor.lint.rule import MISSING, Place, _, finding, rule, value_from_base
from doctor.lint.testing import never_in, tiny

SAME = {"su": "longrope", None: "default", "mrope": "default"}  # spellings of one type
KEYS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
    "rope_theta",
)


@rule("C170", "warning", implied_by=("C144", "C165"))
def rope_spellings_disagree(checkpoint, spec, base):
    new, old = spec.config.get("rope_parameters"), spec.config.get("rope_scaling")
    if not isinstance(new, dict) or any(isinstance(value, dict) for value in new.values()):
        return  # one object for each kind of layer has no old spelling
    for key, stated, other, reads in _pairs(spec.config, new, old if isinstance(old, dict) else {}):
        manual = _("write what the model was trained with under both keys")
        yield finding(
            _(
                "{key} is {stated!r} and rope_parameters.{name} is {other!r} in config.json: {reads}",
                key=key,
                stated=_short(stated),
                name=key.rpartition(".")[2],
                other=_short(other),
                reads=reads,
            ),
            at=Place("config.json", pointer=spec.at(key.replace(".", "/"))),
            evidence={"old": str(stated)[:40], "new": str(other)[:40]},
            fix=value_from_base(
                base, "config.json", spec.at(key.partition(".")[0]), spec.config.get(key.partition(".")[0], MISSING), manual
            ),
        )  # fmt: skip


def _pairs(config, new, old):
    """(old key, its value, the value in rope_parameters, who reads which) of each value that differs."""
    theta = config.get("rope_theta")
    if theta is not None and new.get("rope_theta") not in (None, theta):
        yield "rope_theta", theta, new["rope_theta"], _("transformers 5 reads the second, older readers the first")
    if not old:
        return
    reads = _("all readers take rope_scaling")
    kinds = [SAME.get(k, k) for k in (_kind(old), _kind(new))]
    if kinds[0] != kinds[1]:
        yield "rope_scaling.rope_type", kinds[0], kinds[1], reads
        return
    for key in KEYS:
        if old.get(key) is not None and new.get(key) is not None and old[key] != new[key]:
            yield f"rope_scaling.{key}", old[key], new[key], reads


def _kind(block):
    return block.get("rope_type", block.get("type"))


def _short(value):
    return value if isinstance(value, (int, float, str)) and len(str(value)) <= 40 else str(value)[:40]


def bad():
    never_in("opt", why="it has no rotary embedding")
    case = tiny()
    case.config["rope_theta"] = 500000.0
    case.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return case, (
        "rope_theta is 500000.0 and rope_parameters.rope_theta is 10000.0 in config.json: transformers 5 reads the "
        "second, older readers the first"
    )


def good():
    case = tiny()
    case.config["rope_theta"] = 10000.0
    case.config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    case.config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    return case
