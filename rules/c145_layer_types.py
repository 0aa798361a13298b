"""C145 layer-types: the list of block kinds, or the sliding window, contradicts the rest of config.json.

Why: transformers stops on a list of the wrong length; other readers count from the front and give blocks the wrong
attention. A window that is switched on without a width, or for no block, is not what the model was trained with.

Seen as:
- transformers: `must be equal to the number of layer types`
- vLLM: `AssertionError: Interleaved attention`

Do: after cutting or adding blocks, cut or extend layer_types with them.

False alarms: sliding_window values under use_sliding_window false are leftovers that nobody reads; they are not
counted.

Fix safety: unsafe: a list that is too long is cut at its end, which is right only if the last blocks were cut; one that
is too short goes on as it repeats. A window is taken from the base model (`--from`). Else manual.

Sources: transformers src/transformers/configuration_utils.py, `layer_type_validation`; turboderp/exllamav2 issue 621.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule, value_from_base
from doctor.lint.testing import tiny


@rule("C145", "error", implied_by=("C142",))
def layer_types(checkpoint, spec, base):
    kinds, n = spec.config.get("layer_types"), spec.n_layers
    if isinstance(kinds, list) and n is not None and len(kinds) != n:
        wanted = kinds[:n] if len(kinds) > n else _continued(kinds, n)
        fix = Fix("write one kind for each block", (), "manual")
        if wanted:
            title = (
                f"cut layer_types to its first {n}" if len(kinds) > n else f"continue layer_types to {n} as it repeats"
            )
            fix = Fix(title, (SetJson("config.json", spec.at("layer_types"), wanted, kinds),), "unsafe")
        yield finding(
            f"layer_types lists {len(kinds)} blocks; {spec.key_for('num_hidden_layers')} is {n}",
            at=Place("config.json", pointer=spec.at("layer_types"), note=f"{n} blocks"),
            evidence={"listed": len(kinds), "blocks": n},
            fix=fix,
        )
    window = spec.config.get("sliding_window")
    slides = (isinstance(kinds, list) and "sliding_attention" in kinds) or (
        kinds is None and spec.config.get("use_sliding_window") is True
    )
    if slides and "sliding_window" in spec.config and not (isinstance(window, int) and window > 0):
        yield finding(
            f"blocks use a sliding window, and sliding_window is {window}",
            at=Place("config.json", pointer=spec.at("sliding_window")),
            fix=value_from_base(
                base,
                "config.json",
                spec.at("sliding_window"),
                window,
                "write the window's width from the base model's config.json",
            ),
        )


def _continued(kinds, n):
    """The list made longer by its own period, [] where it has none that stands in it twice."""
    period = next(
        (p for p in range(1, len(kinds) // 2 + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds)))), None
    )
    return [kinds[i % period] for i in range(n)] if period else []


def bad():
    case = tiny()
    case.config["layer_types"] = ["full_attention"] * 3
    key = next(k for k in ("num_hidden_layers", "n_layer") if k in case.config)
    return case, f"layer_types lists 3 blocks; {key} is 2"


def good():
    case = tiny()
    case.config["layer_types"] = ["sliding_attention", "full_attention"]
    case.config["sliding_window"] = 64
    return case
