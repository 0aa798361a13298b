"""O610 group-index: g_idx does not agree with the config or with the scales.

Why: g_idx says which group each column belongs to. Kernels skip it when desc_act is false, so a scattered
g_idx then decodes with wrong scales; an entry beyond the last group reads past the table.

Seen as:
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.g_idx'`

Do: set desc_act to true where g_idx is scattered.

False alarms: none; the entries were counted.

Fix safety: safe for the flag: the tensors stay. Safe for an absent g_idx beside others where desc_act is false: groups
of neighbours are all it can mean. Unsafe for entries beyond the last group, and only where desc_act is false.

Sources: AutoGPTQ/AutoGPTQ commit c0f8edb; vllm-project/vllm
vllm/model_executor/layers/quantization/gptq.py.
"""

from doctor.lint.rule import MISSING, Fix, GroupsInOrder, Place, SetJson, finding, rule
from doctor.lint.testing import np, tiny_gptq


@rule("O610", "error")
def group_index(checkpoint, quantization, packed_words, tensors):
    form = quantization.format
    if not form.order_key:
        return
    tail, packed = f".{form.index}", f".{form.words}"
    scattered = []
    for name, words in packed_words.items():
        scales = tensors.get(f"{name.removesuffix(tail)}.{form.scales}") if name.endswith(tail) else None
        if scales is None or len(scales.shape) != 2 or not words.count:
            continue
        groups = scales.shape[0]
        if words.smallest < 0 or words.largest >= groups:
            fix = Fix("write g_idx as groups of neighbours", (_in_order(name, tensors, quantization),), "unsafe")
            yield finding(
                f"{name} runs from {words.smallest} to {words.largest}, and there are {groups} groups",
                at=Place(tensors[name].shard, tensor=name),
                advice="quantize this linear again",
                fix=None if quantization.desc_act else fix,
                evidence={"smallest": words.smallest, "largest": words.largest, "groups": groups},
            )
        elif not words.rising and not quantization.desc_act:
            scattered.append(name)
    if scattered:
        pointer = f"{quantization.pointer}/desc_act"
        fix = Fix(
            "set desc_act to true",
            (SetJson(quantization.file, pointer, True, expect=quantization.raw.get("desc_act", MISSING)),),
        )
        yield finding(
            f"g_idx is scattered in {len(scattered)} linears (first {scattered[0]}) and desc_act says the groups lie in order",
            at=Place(quantization.file, pointer=pointer),
            evidence={"linears": len(scattered)},
            fix=fix if quantization.reader.order_key else None,
            advice="set desc_act to true",
        )

    indexed = {n.removesuffix(tail) for n in tensors if n.endswith(tail)}
    absent = sorted(m for n in tensors if n.endswith(packed) and (m := n.removesuffix(packed)) not in indexed)
    if indexed and absent and not quantization.desc_act:
        edits = tuple(_in_order(module + tail, tensors, quantization) for module in absent)
        yield finding(
            f"{len(absent)} linears have no g_idx and {len(indexed)} have one, the first without is {absent[0]}",
            at=Place("", tensor=absent[0] + packed),
            evidence={"absent": len(absent), "present": len(indexed)},
            severity="warning",
            fix=Fix("add g_idx as groups of neighbours", edits),
        )


def _in_order(name, tensors, quantization):
    form, module = quantization.format, name.rpartition(".")[0]
    width, _height = form.size(tensors[f"{module}.{form.words}"].shape, quantization.bits_of(module))
    return GroupsInOrder(name, width, quantization.group_size)


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".g_idx"
    case.tensors[name] = np.ascontiguousarray(case.tensors[name][::-1])
    return case, f"g_idx is scattered in 1 linears (first {name}) and desc_act says the groups lie in order"


def good():
    return tiny_gptq()
