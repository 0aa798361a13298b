"""C145 layer-types: layer_types or sliding_window contradicts the rest of config.json.

Why: transformers stops at a list of the wrong length; other readers count from the front and give decoder layers the
wrong attention. It also stops at a kind that it does not know. A sliding window that is enabled without a width, or for no layer, does not match the training.

Seen as:
- transformers: `must be equal to the number of layer types`
- transformers: `The `layer_types` entries must be in`
- vLLM: `AssertionError: Interleaved attention`

Do: after removing or adding decoder layers, shorten or extend layer_types accordingly.

False alarms: sliding_window values under use_sliding_window false are leftovers that no reader uses; they are not
counted. Kinds of models with code of their own (auto_map) are not judged. A kind newer than transformers 5.24 is named too.

Fix safety: unsafe: a list that is too long is cut at its end, which is right only if the last layers were removed. A
list that is too short is extended by its repeating pattern. A window, and a list with an unknown kind, is taken from the donor (`--from`). Else manual.

Sources: transformers src/transformers/configuration_utils.py, `validate_layer_type`, ALLOWED_ATTN_LAYER_TYPES and
_LEGACY_LAYER_TYPE_REMAP of 5.24; turboderp/exllamav2 issue 621.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, plural, rule, value_from_base
from doctor.lint.testing import tiny

# What transformers 5.24 takes in each list, with the older names that it translates.
KINDS = {
    "layer_types": frozenset(
        (
            *("full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention"),
            *("linear_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"),
            *("reference_sliding_attention", "conv", "moe", "hybrid", "hybrid_sliding", "mamba", "attention"),
            *("deepseek_sparse_attention", "qwen_sparse_attention"),
        )
    ),
    "mlp_layer_types": frozenset(("sparse", "dense", "moe", "hash_moe")),  # DeepSeek V4 has two of its own
}


@rule("C145", "error", implied_by=("C142",))
def layer_types(checkpoint, spec, base, config):
    for key in () if config.get("auto_map") else KINDS:
        yield from _unknown(spec, base, key)
    kinds, n = spec.config.get("layer_types"), spec.n_layers
    if isinstance(kinds, list) and n is not None and len(kinds) != n:
        wanted = kinds[:n] if len(kinds) > n else _continued(kinds, n)
        fix = Fix(_("write one kind for each decoder layer"), (), "manual")
        if wanted:
            title = (
                _("cut layer_types to its first {n}", n=n)
                if len(kinds) > n
                else _("extend layer_types to {n} by repeating its pattern", n=n)
            )
            fix = Fix(title, (SetJson("config.json", spec.at("layer_types"), wanted, kinds),), "unsafe")
        yield finding(
            plural(
                "layer_types has {n} entry; {key} is {layers}",
                "layer_types has {n} entries; {key} is {layers}",
                len(kinds),
                key=spec.key_for("num_hidden_layers"),
                layers=n,
            ),
            at=Place(
                "config.json",
                pointer=spec.at("layer_types"),
                note=plural("{n} decoder layer", "{n} decoder layers", n),
            ),
            evidence={"listed": len(kinds), "blocks": n},
            fix=fix,
        )
    window = spec.config.get("sliding_window")
    slides = (isinstance(kinds, list) and "sliding_attention" in kinds) or (
        kinds is None and spec.config.get("use_sliding_window") is True
    )
    if slides and "sliding_window" in spec.config and not (isinstance(window, int) and window > 0):
        yield finding(
            _("decoder layers use a sliding window, but sliding_window is {window}", window=window),
            at=Place("config.json", pointer=spec.at("sliding_window")),
            fix=value_from_base(
                base,
                "config.json",
                spec.at("sliding_window"),
                window,
                _("write the window's width from the base model's config.json"),
            ),
        )


def _unknown(spec, base, key):
    """The first entry of a list that names no kind of layer, with how many do."""
    kinds = spec.config.get(key)
    strange = [i for i, kind in enumerate(kinds) if str(kind) not in KINDS[key]] if isinstance(kinds, list) else []
    if strange:
        yield finding(
            plural(
                "{n:,} entry of {key} is no kind of layer that transformers knows ({key}[{at}], {kind!r})",
                "{n:,} entries of {key} are no kind of layer that transformers knows (first {key}[{at}], {kind!r})",
                len(strange),
                key=key,
                at=strange[0],
                kind=str(kinds[strange[0]])[:60],
            ),
            at=Place("config.json", pointer=spec.at(f"{key}/{strange[0]}")),
            evidence={"entries": strange[:100]},
            fix=value_from_base(base, "config.json", spec.at(key), kinds, _("write one kind for each decoder layer")),
        )


def _continued(kinds, n):
    """The list extended to n by its own period; [] where no period occurs in it twice."""
    period = next(
        (p for p in range(1, len(kinds) // 2 + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds)))), None
    )
    return [kinds[i % period] for i in range(n)] if period else []


def bad():
    case = tiny()
    case.config["layer_types"] = ["full_attention"] * 3
    key = next(k for k in ("num_hidden_layers", "n_layer") if k in case.config)
    return case, f"layer_types has 3 entries; {key} is 2"


def good():
    case = tiny()
    case.config["layer_types"] = ["sliding_attention", "full_attention"]
    case.config["sliding_window"] = 64
    return case
