"""O610 group-index: g_idx does not match desc_act or the scales.

Why: g_idx gives the group of each column. Kernels skip it when desc_act is false, so a scattered g_idx is then decoded
with wrong scales; an entry beyond the last group reads outside the table of scales.

Seen as:
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.g_idx'`

Do: set desc_act to true where g_idx is scattered.

False alarms: none; the entries were counted.

Fix safety: safe for the flag: the tensors do not change. No fix where the runtime refuses desc_act true (O651). Safe
for a missing g_idx beside others where desc_act is false: groups of consecutive columns are the only possible meaning.
Unsafe for entries beyond the last group, and only where desc_act is false.

Sources: AutoGPTQ/AutoGPTQ commit c0f8edb; vllm-project/vllm
vllm/model_executor/layers/quantization/utils/gptq_utils.py.
"""

from doctor.lint.rule import MISSING, Fix, GroupsInOrder, Place, SetJson, _, finding, plural, rule, version_before
from doctor.lint.testing import np, tiny_gptq


@rule("O610", "error")
def group_index(checkpoint, quantization, packed_words, tensors, recipe):
    form = quantization.format
    if not form.order_key:
        return
    tail, packed = f".{form.index}", f".{form.words}"
    scattered = []
    for name, words in packed_words.items():
        scales = tensors.get(f"{name.removesuffix(tail)}.{form.scales}") if name.endswith(tail) else None
        codes = tensors.get(f"{name.removesuffix(tail)}{packed}")
        if scales is None or codes is None or len(scales.shape) != 2 or not words.count:
            continue
        groups = scales.shape[0]
        columns, found = _columns(name, tensors, quantization), tensors[name].shape
        if tuple(found) != (columns,):
            yield finding(
                _(
                    "{tensor} has the shape {found}; the linear has {n:,} inputs",
                    tensor=name,
                    found=list(found),
                    n=columns,
                ),
                at=Place(tensors[name].shard, tensor=name),
                advice=_("quantize this linear again"),
                evidence={"shape": list(found), "inputs": columns},
            )
        elif words.smallest < 0 or words.largest >= groups:
            fix = Fix(
                _("write g_idx as groups of consecutive columns"), (_in_order(name, tensors, quantization),), "unsafe"
            )
            yield finding(
                _(
                    "{tensor} has entries from {smallest} to {largest}; there are {groups} groups",
                    tensor=name,
                    smallest=words.smallest,
                    largest=words.largest,
                    groups=groups,
                ),
                at=Place(tensors[name].shard, tensor=name),
                advice=_("quantize this linear again"),
                fix=None if quantization.desc_act else fix,
                evidence={"smallest": words.smallest, "largest": words.largest, "groups": groups},
            )
        elif not words.rising and not quantization.desc_act:
            scattered.append(name)
    if scattered:
        pointer, refused = f"{quantization.pointer}/desc_act", _refused(quantization, recipe)
        fix = Fix(
            _("set desc_act to true"),
            (SetJson(quantization.file, pointer, True, expect=quantization.raw.get("desc_act", MISSING)),),
        )
        yield finding(
            plural(
                "g_idx is scattered in {n:,} linear ({first}), but desc_act is not true",
                "g_idx is scattered in {n:,} linears (first {first}), but desc_act is not true",
                len(scattered),
                first=scattered[0],
            ),
            at=Place(quantization.file, pointer=pointer),
            evidence={"linears": len(scattered)},
            fix=fix if quantization.reader.order_key and not refused else None,
            advice=_("quantize this linear again") if refused else _("set desc_act to true"),
        )

    indexed = {n.removesuffix(tail) for n in tensors if n.endswith(tail)}
    absent = sorted(m for n in tensors if n.endswith(packed) and (m := n.removesuffix(packed)) not in indexed)
    if indexed and absent and not quantization.desc_act:
        edits = tuple(_in_order(module + tail, tensors, quantization) for module in absent)
        yield finding(
            plural(
                "{n:,} linear has no g_idx ({first}); {present:,} have one",
                "{n:,} linears have no g_idx (first {first}); {present:,} have one",
                len(absent),
                first=absent[0],
                present=len(indexed),
            ),
            at=Place("", tensor=absent[0] + packed),
            evidence={"absent": len(absent), "present": len(indexed)},
            # transformers' reader (gptqmodel 7.7) allocates it, and indexes with what memory held
            severity="error" if recipe.runtime == "transformers" else "warning",
            fix=Fix(_("add g_idx as groups of consecutive columns"), edits),
        )


def _refused(quantization, recipe):
    """Whether the runtime of the plan stops at desc_act true (O651)."""
    stated = {**quantization.raw, "desc_act": True}
    since = [
        r.since for r in quantization.reader.refused(stated) if (r.pointer, r.reader) == ("/desc_act", recipe.runtime)
    ]
    version = recipe.runtime_version
    return any(not (version and first and version_before(version, first)) for first in since)


def _columns(name, tensors, quantization):
    """Inputs of the linear, by its words."""
    form, module = quantization.format, name.rpartition(".")[0]
    width, _height = form.size(tensors[f"{module}.{form.words}"].shape, quantization.bits_of(module))
    return width


def _in_order(name, tensors, quantization):
    return GroupsInOrder(name, _columns(name, tensors, quantization), quantization.group_size)


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".g_idx"
    case.tensors[name] = np.ascontiguousarray(case.tensors[name][::-1])
    return case, f"g_idx is scattered in 1 linear ({name}), but desc_act is not true"


def good():
    return tiny_gptq()
