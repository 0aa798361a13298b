"""C160 rope-unread-by-old-readers: rope_theta is only in rope_parameters, which older readers ignore.

Why: transformers 5 writes the rotary base and its scaling into rope_parameters. Readers built on transformers 4 look for
rope_theta and rope_scaling at the top, find none, and take the default of their class: the model answers in fluent nonsense,
without an error. Of one object for each kind of layer, only Gemma 3's have older keys: rope_theta and rope_scaling for
full attention, rope_local_base_freq for the rest.

Seen as:
- mlx-lm: `ModelArgs.__init__() missing 1 required positional argument: 'rope_theta'`
- vLLM: fluent nonsense from a model that transformers 5 saved, with transformers 4 installed

Do: write both spellings. transformers 5 reads rope_parameters first, so nothing changes there.

False alarms: none for a reader of transformers 4. Without --runtime it is a note, because current readers are right.

Fix safety: safe: it adds keys with numbers that the file already states, and changes none.

Sources: vllm-project/vllm issue 42624; transformers src/transformers/modeling_rope_utils.py (standardize_rope_params);
transformers 4.57.6 src/transformers/models/gemma3/configuration_gemma3.py;
rules/tables/readers.toml.
"""

from doctor.lint.rule import (
    MISSING,
    Fix,
    Place,
    SetJson,
    _,
    finding,
    listed,
    old_keys,
    old_reader,
    rope_of_old_readers,
    rule,
    table,
)
from doctor.lint.testing import tiny

LOCAL_DEFAULT = 10000  # of rope_local_base_freq


@rule("C160", "warning")
def rope_unread_by_old_readers(checkpoint, spec, recipe, files):
    block, local = rope_of_old_readers(spec.config)
    if not isinstance(block, dict) or any(isinstance(v, dict) for v in block.values()):
        return  # one object for each layer type has no old spelling
    readers = table("readers")
    theta, kind = block.get("rope_theta"), block.get("rope_type", block.get("type", "default"))
    default = readers["rope_theta"].get(spec.model_type, 10000)
    known = isinstance(theta, (int, float)) and not isinstance(theta, bool) and theta == theta
    lost_base = known and theta != default and "rope_theta" not in spec.config
    lost_scaling = kind not in (None, "default") and spec.config.get("rope_scaling") is None
    lost_local = local not in (None, LOCAL_DEFAULT) and "rope_local_base_freq" not in spec.config
    if not lost_base and not lost_scaling and not lost_local:
        return
    old = old_reader(recipe, json_of_its_own=True)
    if old is False:
        return
    edits = [
        SetJson("config.json", spec.at(key), value, spec.config.get(key, MISSING))
        for key, value in old_keys(spec.config).items()
    ]
    reader = old or _("a reader built on transformers 4")
    if lost_base:
        message = _(
            "rope_theta {theta:g} is stated only in rope_parameters; {reader} takes {default:g}",
            theta=theta, reader=reader, default=default,
        )  # fmt: skip
    elif not lost_scaling:
        message = _(
            "the base {theta} of layers with a sliding window is stated only in rope_parameters; {reader} takes {default:g}",
            theta=local, reader=reader, default=LOCAL_DEFAULT,
        )  # fmt: skip
    else:
        message = _(
            "rope scaling {kind} is stated only in rope_parameters; {reader} takes none", kind=kind, reader=reader
        )
    yield finding(
        message,
        at=Place("config.json", pointer=spec.at("rope_parameters")),
        evidence={"rope_theta": theta if known else str(theta), "read_as": default},
        fix=Fix(
            _("write the keys of transformers 4 too: {keys}", keys=listed(old_keys(spec.config))),
            tuple(edits),
        ),
        severity="warning" if old else "info",
    )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    case.config.pop("rope_theta", None)
    case.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    return case, "rope_theta 500000 is stated only in rope_parameters; exllamav2 takes 10000"


def good():
    case = tiny()
    case.config["rope_theta"] = 500000.0
    case.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    return case
