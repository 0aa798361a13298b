"""O653 fused-scales-differ: linears that engines fuse have different scales for the whole tensor.

Why: engines store q, k and v as one matrix, and gate and up as one. 4-bit floats have one float32 scale for a tensor,
and the fused matrix has one too: the engine keeps the largest and decodes all parts with it. The others are then wrong
by the ratio of the two.

Seen as:
- vLLM: `the weight global scale is different for parallel layers (e.g. q_proj, k_proj, v_proj)`
- vLLM: `the input global scale is different for parallel layers`
- vLLM: `w1_weight_global_scale must match w3_weight_global_scale`
- vLLM: `w1_weight_scale_2 must match w3_weight_scale_2`

Do: export again with a tool that shares these scales among the parts: `doctor quantize`, llm-compressor.

False alarms: a runtime that never fuses (transformers); a ratio near 1 costs little.

Fix safety: no fix: the codes were chosen under the scale that is stored.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/compressed_tensors/schemes/
compressed_tensors_w4a4_nvfp4.py (process_weights_after_loading) and modelopt.py, issue 41045.
"""

from doctor.lint.rule import FUSED, Place, _, finding, listed, plural, rule
from doctor.lint.testing import never_in, np, tiny_packed

PARTS = ("weight_global_scale", "weight_scale_2", "input_global_scale", "input_scale")
FUSING = ("", "vllm", "sglang")
OF_FLOATS = ("weight_global_scale", "weight_scale_2")  # a linear of 4-bit floats has one of these


@rule("O653", "warning", implied_by=("O607", "W201"))
def fused_scales_differ(checkpoint, split, tensors, largest_values, recipe):
    if recipe.runtime not in FUSING:
        return
    seen: dict[tuple, list] = {}
    for linear in split.linears:
        fused = next((group for group in FUSED if linear.role in group), None)
        if fused and any(f"{linear.name}.{part}" in tensors for part in OF_FLOATS):
            seen.setdefault((linear.name.rpartition(".")[0], fused), []).append(linear)
    found: dict[str, list] = {}
    for members in seen.values():
        for part in PARTS:
            names = [f"{linear.name}.{part}" for linear in members]
            values = [largest_values[name] for name in names if name in largest_values]
            if len(values) == len(names) > 1 and min(values) > 0 and max(values) != min(values):
                found.setdefault(part, []).append((max(values) / min(values), names, values))
    for part, differing in found.items():
        ratio, names, values = max(differing, key=lambda one: one[0])
        roles = [name.removesuffix(f".{part}").rpartition(".")[2] for name in names]
        yield finding(
            plural(
                "{part} differs in {n:,} fused matrix, {roles}, by a factor of {ratio:.3g} ({first})",
                "{part} differs in {n:,} fused matrices, most in {roles} by a factor of {ratio:.3g} ({first})",
                len(differing),
                part=part,
                roles=listed(roles),
                ratio=ratio,
                first=names[0],
            ),
            at=Place(tensors[names[0]].shard, tensor=names[0]),
            evidence={"ratio": ratio, "matrices": len(differing)},
            facts_table=((_("linear"), *roles), (part, *(f"{value:.6g}" for value in values))),
            advice=_("export again with one scale for the parts of a fused matrix"),
        )


def bad():
    never_in("phi3", "opt", "qwen2_moe", why="its MLPs are others than the two that the message counts")
    case = tiny_packed("nvfp4-pack-quantized")
    for name in [n for n in case.tensors if n.endswith("up_proj.weight_global_scale")]:
        case.tensors[name] = case.tensors[name] * np.float32(4)
    return case, (
        "weight_global_scale differs in 2 fused matrices, most in gate_proj and up_proj by a factor of 4 "
        "(model.layers.0.mlp.gate_proj.weight_global_scale)"
    )


def good():
    return tiny_packed("nvfp4-pack-quantized")
