"""F075 malformed-quantization-config: quantization_config names no method.

Why: transformers asks the entry for its quant_method before anything else. Where the entry is no object, or its method
is absent or no text, loading ends there, whatever the weights are.

Seen as:
- transformers: `The model's quantization config from the arguments has no `quant_method` attribute`
- transformers: `TypeError: unhashable type: 'list'`
- transformers: `AttributeError: 'list' object has no attribute 'to_dict'`

Do: remove quantization_config from a model whose weights are plain; else copy config.json again from the source.

False alarms: none known. MLX's own entry, and one of bitsandbytes with load_in_4bit or load_in_8bit, need no quant_method.

Fix safety: safe where no weight is quantized: the entry then describes nothing. Manual elsewhere: what packed the
weights is not known.

Sources: transformers src/transformers/quantizers/auto.py, `AutoHfQuantizer.supports_quant_method`.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, rule, shows_packing
from doctor.lint.testing import tiny

WHERE = "/quantization_config"


@rule("F075", "error")
def malformed_quantization_config(checkpoint, tensors, config, kind):
    block = config.get("quantization_config")
    if block is None or kind == "mlx":
        return
    if isinstance(block, dict):
        method = block.get("quant_method")
        if isinstance(method, (str, int, float)) or block.get("load_in_4bit") or block.get("load_in_8bit"):
            return
        message = (
            _("quantization_config has no quant_method; must name the method")
            if method is None
            else _("quant_method is {found}; must be a text", found=str(method)[:60])
        )
    else:
        message = _("quantization_config is {found}; must be an object", found=str(block)[:60])
    plain = not any(map(shows_packing, tensors)) and all(info.dtype.bits >= 16 for info in tensors.values())
    yield finding(
        message,
        at=Place("config.json", pointer=WHERE),
        fix=Fix(_("remove quantization_config"), (RemoveJson("config.json", WHERE, block),))
        if plain
        else Fix(_("copy config.json again from the source of the weights"), (), "manual"),
    )


def bad():
    case = tiny()
    case.config["quantization_config"] = {"bits": 4, "group_size": 32}
    return case, "quantization_config has no quant_method; must name the method"


def good():
    case = tiny()
    case.config["quantization_config"] = None
    return case
