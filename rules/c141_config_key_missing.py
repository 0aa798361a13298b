"""C141 config-key-missing: config.json lacks a size that the model class needs.

Why: a reader then uses its class's default, which is another model's size, and the weights do not fit; or it stops.

Seen as:
- transformers: `size mismatch for`
- ExLlamaV2: `ValueError: ## Could not find any variation of key`
- llama.cpp: `KeyError: "could not find any of:`

Do: write the key with the value that every tensor agrees on.

False alarms: defaults of a family that this version does not know. Multimodal configs rely on defaults, so fewer keys
are required there.

Fix safety: safe: all tensors that depend on the key agree on one value.

Sources: turboderp/exllamav2 exllamav2/config.py; transformers configuration classes.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, keys_of, rule, solve
from doctor.lint.testing import tiny

NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
NESTED = ("hidden_size", "num_hidden_layers")


@rule(
    "C141",
    "error",
    implied_by=(
        "C147",
        "O620",
    ),
)
def config_key_missing(checkpoint, placement, config):
    spec = placement.spec
    if spec.family is None:
        return
    for key in NESTED if spec.text_key else NEEDED:
        if spec.lookup(key) is not None or key in spec.config:
            continue
        value = len(placement.blocks) if key == "num_hidden_layers" else _shown(placement, key)
        if value is not None:
            yield finding(
                _("config.json has no {key}; the weights imply {value}", key=key, value=value),
                at=Place("config.json", pointer=spec.at(key)),
                evidence={"value": value},
                fix=Fix(
                    _('set "{key}": {value}', key=key, value=value),
                    (SetJson("config.json", spec.at(key), value, MISSING),),
                ),
            )


def _shown(placement, key):
    """The value on which every tensor whose size needs this key alone, or with keys that are stated, agrees; else
    None.
    """
    spec = placement.spec
    values = set()
    for info, _axis, expressions in placement.sizes():
        for axis, expression in enumerate(expressions[: len(info.shape)]):
            keys = keys_of(expression)
            if key in keys and all(k == key or k in spec.config for k in keys):
                values.add(solve(expression, key, spec, info.shape[axis]))
    return values.pop() if len(values) == 1 else None


def bad():
    case = tiny()
    del case.config["vocab_size"]
    return case, "config.json has no vocab_size; the weights imply 96"


def good():
    return tiny()
