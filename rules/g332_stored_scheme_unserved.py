"""G332 stored-scheme-unserved: the runtime has no kernel for this kind of weights and activations.

Why: compressed-tensors describes more combinations of weights and activations than an engine computes with: weights in
FP8 with a scale a group, 8-bit integers that are not symmetric, 4-bit integers with FP8 activations in groups of 32.
The engine looks for a scheme when it builds the first linear, and stops.

Seen as:
- vLLM: `No compressed-tensors compatible scheme was found`
- vLLM: `For NVFP4 weights, input quantization must also be NVFP4 format`
- vLLM: `W4A8 kernels require group quantization with group size 128`

Do: quantize again with a scheme from the table, or serve it with transformers, which unpacks the weights.

False alarms: a runtime with a plugin. Whether the card computes with a scheme is for G334 to say: the table
says which compute capability each asks for.

Fix safety: no fix: the files are correct.

Sources: rules/tables/served.toml.
"""

from doctor.lint.rule import (
    KNOWN,
    Place,
    Unavailable,
    _,
    capability_of,
    finding,
    groups_of,
    newest,
    rule,
    schemes,
    serves,
    stated,
)
from doctor.lint.testing import np, tiny, tiny_gptq


@rule("G332", "error", implied_by=("G331", "O620"))
def stored_scheme_unserved(checkpoint, quantization_block, goal, recipe):
    if quantization_block is None or goal != "serve":
        return
    raw, file, pointer = quantization_block
    form = next((f for f in KNOWN.values() if f.claims(raw)), None)
    if form is None or not form.groups_of_modules or not isinstance(raw.get("config_groups"), dict):
        return
    if not recipe.runtime:
        raise Unavailable(_("no runtime was named: --runtime asks for one"))
    rows = schemes(recipe.runtime, recipe.runtime_version)
    if rows is None:
        raise Unavailable(
            _(
                "no list of the formats that {runtime} reads",
                runtime=" ".join(filter(None, (recipe.runtime, recipe.runtime_version))),
            )
        )
    for name, group, layout in groups_of(raw):
        weights, inputs = stated(group["weights"]) or {}, stated(group.get("input_activations"))
        if group.get("output_activations") or any(serves(row, weights, inputs, layout) for row in rows):
            continue
        yield finding(
            _(
                "{runtime} {version} computes with no {weights} weights and {inputs} activations as {format}",
                runtime=recipe.runtime,
                version=recipe.runtime_version or newest(recipe.runtime),
                weights=_words(weights),
                inputs=_words(inputs) if inputs else _("16-bit"),
                format=layout,
            ),
            at=Place(file, pointer=f"{pointer}/config_groups/{name}"),
            evidence={"weights": group["weights"], "input_activations": group.get("input_activations")},
            facts_table=(
                (_("scheme"), _("compute capability")),
                *((row["name"], _capability(row, recipe.runtime_version)) for row in rows),
            ),
            advice=_("quantize again with a scheme that {runtime} has", runtime=recipe.runtime),
        )


def _words(args):
    """`8-bit float, a scale a group of 32`."""
    size = args.get("group_size")
    unit = _("{strategy} of {size}", strategy=args["strategy"], size=size) if size else args["strategy"]
    named = {"bits": args["num_bits"], "kind": args["type"], "unit": unit}
    return (
        _("{bits}-bit {kind} ({unit})", **named)
        if args["symmetric"]
        else _("asymmetric {bits}-bit {kind} ({unit})", **named)
    )


def _capability(row, version):
    least = capability_of(row, version)
    lowest = f"{least / 10:.1f}" if least else "-"
    return lowest if row.get("exact") or not least else _("{lowest} and up", lowest=lowest)


def in_eight_bits(symmetric):
    """tiny() in 8-bit integers with a scale a row."""
    case = tiny()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "vllm")
    rng = np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        case.tensors[linear.tensor] = rng.integers(-127, 128, (n, k), np.int8)
        case.tensors[f"{linear.tensor}_scale"] = np.full((n, 1), 0.01, np.float32)
        case.dtypes |= {linear.tensor: "I8", f"{linear.tensor}_scale": "F32"}
        if not symmetric:
            case.tensors[f"{linear.tensor}_zero_point"] = np.ones((n, 1), np.int8)
            case.dtypes[f"{linear.tensor}_zero_point"] = "I8"
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": symmetric}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    return case


def bad():
    return in_eight_bits(symmetric=False), (
        "vllm 0.32.0 computes with no asymmetric 8-bit int (channel) weights and 8-bit int (token) activations "
        "as int-quantized"
    )


def good():
    case = tiny_gptq()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "vllm")
    return case
