"""C144 rope-schema: the description of the rotary positions is incomplete or contradicts itself.

Why: readers stop on a missing field, or fall back to plain rotation, with which a long text is read wrongly and
calibration runs on other activations than serving.

Seen as:
- transformers: ``rope_scaling` must be a dictionary with two fields`
- transformers: `Missing required keys in `rope_scaling` for 'rope_type'=`
- vLLM: `Unknown RoPE scaling type`

Do: take the block from the base model's config.json, whole.

False alarms: kinds of scaling newer than this version are not judged. `type` in place of `rope_type` is the older
spelling and fine.

Fix safety: unsafe, and only with `--from`: the block is taken from the base model, whole. Else manual; the numbers
belong to the training.

Sources: transformers src/transformers/modeling_rope_utils.py; meta-llama/llama3 issue 299; ml-explore/mlx-lm issue 5.
"""

import math

from doctor.lint.rule import Place, finding, rule, value_from_base
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
            yield _say(spec, base, key, key, f"{key} is {str(block)[:60]!r}; it must be an object or null")
            continue
        nested = {k: v for k, v in block.items() if isinstance(v, dict)}
        for name, part in (nested or {"": block}).items():
            for problem in _problems(part, key):
                yield _say(
                    spec, base, key, f"{key}/{name}" if name else key, f"{key}{'.' + name if name else ''} {problem}"
                )


def _problems(block, key):
    kind, old = block.get("rope_type"), block.get("type")
    if kind is not None and old is not None and kind != old and {kind, old} != {"longrope", "su"} and old != "mrope":
        yield f"says rope_type {kind!r} and type {old!r}"
    kind = kind if kind is not None else old
    if kind is None:
        if key == "rope_scaling" and "factor" in block:
            yield "has a factor but no rope_type"
        return
    absent = [name for name in REQUIRED.get(kind, ()) if block.get(name) is None]
    if absent:
        yield f"of type {kind!r} has no {' and no '.join(absent)}"
    factor = block.get("factor")
    if factor is not None and kind in REQUIRED:
        if (
            isinstance(factor, bool)
            or not isinstance(factor, (int, float))
            or not math.isfinite(factor)
            or not factor >= 1
        ):
            yield f"has factor {factor!r}; it must be a number of 1 or more"
    short, long = block.get("short_factor"), block.get("long_factor")
    if isinstance(short, list) and isinstance(long, list) and len(short) != len(long):
        yield f"has {len(short)} short_factor values and {len(long)} long_factor values"
    low, high = block.get("low_freq_factor"), block.get("high_freq_factor")
    if kind == "llama3" and isinstance(low, (int, float)) and isinstance(high, (int, float)) and not low < high:
        yield f"has low_freq_factor {low} and high_freq_factor {high}; the first must be smaller"


def _say(spec, base, key, path, message):
    whole = value_from_base(
        base, "config.json", spec.at(key), spec.config[key], "take the block from the base model's config.json"
    )
    return finding(message, at=Place("config.json", pointer=spec.at(path)), fix=whole)


def bad():
    case = tiny()
    case.config["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    return case, "rope_scaling of type 'llama3' has no low_freq_factor and no high_freq_factor"


def good():
    case = tiny()
    case.config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return case
