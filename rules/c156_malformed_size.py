"""C156 malformed-size: size in config.json is not a positive integer.

Why: sizes are lengths of axes and numbers of layers. A string, a fraction, zero or a negative number stops the reader,
or builds a model of another shape.

Seen as:
- PyTorch: `TypeError: empty() received an invalid combination of arguments`
- Python: `TypeError: 'float' object cannot be interpreted as an integer`
- huggingface_hub: `StrictDataclassFieldValidationError`

Do: write the integer.

False alarms: null means the class's default and is not counted, nor are lists of one size per layer.

Fix safety: safe where the number is unambiguous ("4096", 4096.0); else manual.

Sources: transformers src/transformers/configuration_utils.py.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny

SIZES = (
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "moe_intermediate_size",
    "num_local_experts",
    "num_experts",
)
# Zero means that the model has none.
MAY_BE_ZERO = ("moe_intermediate_size", "num_local_experts", "num_experts", "max_position_embeddings")


@rule("C156", "error")
def malformed_size(checkpoint, spec):
    for key in SIZES:
        value = spec.config.get(key)
        if value is None or isinstance(value, (list, dict)):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and (value > 0 or (value == 0 and key in MAY_BE_ZERO) or key == "max_position_embeddings"):
            continue
        right = _number(value)
        fix = Fix(_("write the size that the weights have"), (), "manual")
        if right is not None:
            fix = Fix(
                _('set "{key}": {value}', key=key, value=right), (SetJson("config.json", spec.at(key), right, value),)
            )
        yield finding(
            _("{key} is {value} in config.json; it must be a positive whole number", key=key, value=repr(value)),
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"value": str(value)},
            fix=fix,
        )


def _number(value):
    if isinstance(value, str) and value.isascii() and value.isdigit() and int(value) > 0:
        return int(value)
    if isinstance(value, float) and value.is_integer() and value > 0:
        return int(value)
    return None


def bad():
    case = tiny()
    case.config["max_position_embeddings"] = "256"
    return case, "max_position_embeddings is '256' in config.json; it must be a positive whole number"


def good():
    return tiny()
