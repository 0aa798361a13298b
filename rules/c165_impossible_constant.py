"""C165 impossible-constant: an epsilon, rope base, factor or length has no possible value.

Why: a norm divides by sqrt(mean(x * x) + eps): with 0 a row of zeros becomes NaN, with a negative number every small
row does. RoPE divides positions by powers of its base: with 0 or less, angles are infinite or NaN, and
attention is lost. Gemma divides scores by the root of query_pre_attn_scalar, Granite and Cohere multiply by factors: 0
makes them infinite or all equal. An epsilon as large as the squares that it is added to takes the norm's place:
published models have 1e-3 at most. RoPE turns at most all of a head, so a partial_rotary_factor is not above 1. A
length of 0 positions leaves a server no token to read.

Seen as:
- huggingface_hub: `StrictDataclassFieldValidationError`
- vLLM: `User-specified max_model_len`
- vLLM: `partial_rotary_factor=1.5 must be between 0.0 and 1.0`
- transformers: `TypeError: unsupported operand type(s) for +: 'Tensor' and 'str'`

Do: write what the model was trained with. Usual are 1e-5 or 1e-6 for an epsilon and 10000 to 10000000 for a rope base.

False alarms: classes of transformers that turn whole heads, such as Llama, do not read partial_rotary_factor; vLLM
refuses one above 1 for all. An epsilon is judged from 0.1 on. Lengths of models without RoPE are not judged: some
state 0 or -1 for "no limit".

Fix safety: safe where a number is written as text ("1e-6"). Unsafe with `--from`: the donor's value. Else manual: the
value that the model was trained with is not in the files.

Sources: transformers src/transformers/models/llama/modeling_llama.py, LlamaRMSNorm and LlamaRotaryEmbedding;
vllm-project/vllm vllm/model_executor/layers/rotary_embedding/__init__.py (get_rope). The largest epsilon among the
defaults of transformers 5.24's configurations is 1e-3.
"""

import math

from doctor.lint.rule import Fix, Place, SetJson, _, finding, is_finite, rule, value_from_base
from doctor.lint.testing import never_in, tiny

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "norm_epsilon")
BASES = ("rope_theta", "rotary_emb_base", "rope_local_base_freq", "global_rope_theta", "local_rope_theta")
POSITIONS = "max_position_embeddings"
SHARES = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")  # of a head that RoPE turns
LARGE_EPSILON = 0.1
# Factors and divisors of activations and logits: Gemma's, Granite's, Cohere's.
FACTORS = (
    "query_pre_attn_scalar",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "logit_scale",
)


@rule("C165", "error", implied_by=("C144", "C156"))
def impossible_constant(checkpoint, spec, base):
    config = spec.config
    stated = [(key, config[key], 0) for key in EPSILONS if config.get(key) is not None]
    stated += [(key, config[key], 0) for key in FACTORS if isinstance(config.get(key), (int, float))]
    stated += [(key, config[key], 1) for key in BASES if config.get(key) is not None]
    for key in ("rope_parameters", "rope_scaling"):
        block = config.get(key)
        for path, part in _objects(block, key) if isinstance(block, dict) else ():
            if part.get("rope_theta") is not None:
                stated.append((f"{path}/rope_theta", part["rope_theta"], 1))
    rotates = any(config.get(key) for key in (*BASES, "rope_parameters", "rope_scaling", "rms_norm_eps"))
    if rotates and isinstance(config.get(POSITIONS), int):
        stated.append((POSITIONS, config[POSITIONS], 0))
    for path, value, floor in stated:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_finite(value) and value > floor:
            continue
        yield finding(
            _(
                "{key} is {value!r} in config.json; it must be a number above {floor}",
                key=path.replace("/", "."),
                value=value if isinstance(value, float) or is_finite(value) else str(value)[:40],
                floor=floor,
            ),
            at=Place("config.json", pointer=spec.at(path)),
            evidence={"value": str(value)[:40]},
            fix=_fix(spec, path, value, floor, base),
            severity="warning" if number and value == floor == 0 and path in EPSILONS else "",
        )
    yield from _too_large(spec, base)


def _too_large(spec, base):
    """Numbers above what is possible (a share) or what any norm was trained with (an epsilon)."""
    stated = [(key, spec.config.get(key)) for key in (*EPSILONS, *SHARES)]
    for key in ("rope_parameters", "rope_scaling"):
        block = spec.config.get(key)
        for path, part in _objects(block, key) if isinstance(block, dict) else ():
            stated += [(f"{path}/{share}", part.get(share)) for share in SHARES]
    for path, value in stated:
        if not is_finite(value):
            continue  # what is no number is named above, or absent
        message = None
        if path in EPSILONS and value >= LARGE_EPSILON:
            message = _("{key} is {value!r} in config.json; published models have 0.001 at most", key=path, value=value)
        elif path not in EPSILONS and value > 1:
            key = path.replace("/", ".")
            message = _("{key} is {value!r} in config.json; it must be at most 1", key=key, value=value)
        if message:
            manual = _("write the value that the model was trained with")
            yield finding(
                message,
                at=Place("config.json", pointer=spec.at(path)),
                evidence={"value": value},
                fix=value_from_base(base, "config.json", spec.at(path), value, manual),
                severity="warning" if path in EPSILONS else "",
            )


def _objects(block, key):
    """(path, object) of each object of RoPE parameters: one for all layers, or one for each kind of layer."""
    nested = {name: part for name, part in block.items() if isinstance(part, dict)}
    return [(f"{key}/{name}", part) for name, part in nested.items()] or [(key, block)]


def _fix(spec, path, value, floor, base):
    try:
        meant = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        meant = math.nan
    if meant > floor and math.isfinite(meant):
        key = path.rpartition("/")[2]
        edit = SetJson("config.json", spec.at(path), meant, value)
        return Fix(_('set "{key}": {value}', key=key, value=meant), (edit,))
    manual = _("write the value that the model was trained with")
    return value_from_base(base, "config.json", spec.at(path), value, manual)


def bad():
    never_in("opt", why="it has neither RoPE nor an epsilon in config.json")
    case = tiny()
    key = next(k for k in EPSILONS if k in case.config)
    case.config[key] = 0
    return case, f"{key} is 0 in config.json; it must be a number above 0"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    never_in("opt", why="it has neither RoPE nor an epsilon in config.json")
    case = tiny()
    case.config[next(k for k in EPSILONS if k in case.config)] = "1e-6"
    yield case
