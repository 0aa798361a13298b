"""C144 rope-schema: rope_scaling is incomplete or contradicts itself.

Why: readers stop at a missing field, or fall back to unscaled RoPE. A long text is then read wrongly, and calibration
runs on other activations than serving.

Seen as:
- transformers: ``rope_scaling` must be a dictionary with two fields`
- transformers: `Missing required keys in `rope_scaling` for 'rope_type'=`
- vLLM: `Unknown RoPE scaling type`

Do: copy the whole object from the base model's config.json.

False alarms: kinds of scaling newer than this version are not judged. `type` instead of `rope_type` is the older
spelling and fine.

Fix safety: unsafe, and only with `--from`: the whole object is taken from the donor. Else manual: the numbers depend on
the training.

Sources: transformers src/transformers/modeling_rope_utils.py; meta-llama/llama3 issue 299; ml-explore/mlx-lm issue 5.
"""

from doctor.lint.rule import Place, _, finding, is_finite, listed, rule, value_from_base
from doctor.lint.testing import tiny

REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "su": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@rule("C144", "error")
def rope_schema(checkpoint, spec, base):
    for key in ("rope_scaling", "rope_parameters"):
        block = spec.config.get(key)
        if block is None:
            continue
        if not isinstance(block, dict):
            message = _("{key} is {value!r}; it must be an object or null", key=key, value=str(block)[:60])
            yield _finding(spec, base, key, key, message)
            continue
        nested = {k: v for k, v in block.items() if isinstance(v, dict)}
        for name, part in (nested or {"": block}).items():
            for message in _problems(part, key, f"{key}.{name}" if name else key):
                yield _finding(spec, base, key, f"{key}/{name}" if name else key, message)


def _problems(block, key, path):
    """What is wrong with one object of RoPE parameters. key: where it is in config.json; path: its name in messages."""
    kind, old = block.get("rope_type"), block.get("type")
    if kind is not None and old is not None and kind != old and {kind, old} != {"longrope", "su"} and old != "mrope":
        yield _("{key} has rope_type {kind} and type {old}", key=path, kind=repr(kind), old=repr(old))
    kind = kind if kind is not None else old
    if kind is None:
        if key == "rope_scaling" and "factor" in block:
            yield _("{key} has a factor but no rope_type", key=path)
        return
    absent = [name for name in REQUIRED.get(kind, ()) if block.get(name) is None]
    if absent:
        yield _("{key} of type {kind} lacks {names}", key=path, kind=repr(kind), names=listed(absent))
    factor = block.get("factor")
    if factor is not None and kind in REQUIRED and not (is_finite(factor) and factor >= 1):
        yield _("{key} has factor {factor}; it must be a number of 1 or more", key=path, factor=repr(factor))
    short, long = block.get("short_factor"), block.get("long_factor")
    if isinstance(short, list) and isinstance(long, list) and len(short) != len(long):
        yield _(
            "{key} has {short} short_factor values and {long} long_factor values",
            key=path,
            short=len(short),
            long=len(long),
        )
    low, high = block.get("low_freq_factor"), block.get("high_freq_factor")
    if kind == "llama3" and isinstance(low, (int, float)) and isinstance(high, (int, float)) and not low < high:
        yield _(
            "{key} has low_freq_factor {low} and high_freq_factor {high}; the first must be smaller",
            key=path,
            low=low,
            high=high,
        )


def _finding(spec, base, key, path, message):
    whole = value_from_base(
        base, "config.json", spec.at(key), spec.config[key], _("take this object from the base model's config.json")
    )
    return finding(message, at=Place("config.json", pointer=spec.at(path)), fix=whole)


def bad():
    case = tiny()
    case.config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    return case, "rope_scaling of type 'llama3' lacks low_freq_factor and high_freq_factor"


def good():
    case = tiny()
    case.config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return case
