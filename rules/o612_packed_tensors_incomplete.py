"""O612 packed-tensors-incomplete: a packed linear lacks one of its tensors, or their sizes disagree.

Why: qweight without scales cannot be decoded. And where the number of groups in scales does not follow from
in_features and group_size, the config names a group size or a width in bits that the tensors were not made
with: the file loads or decodes wrongly.

Seen as:
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.weight_scale'`
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.scales'`

Do: copy the missing tensors' shard again; set bits and group_size to what the shapes say.

False alarms: formats with other tensor names are not judged.

Fix safety: safe where the files determine it: the zero points of a symmetric GPTQ file are one word, and a group size
that the scales of every linear show goes into the config. With `--from` tensors are taken from another copy, unsafe.
Else no fix.

Sources: ModelCloud/GPTQModel nn_modules/qlinear/__init__.py; casper-hansen/AutoAWQ
awq/modules/linear/gemm.py.
"""

from doctor.lint.rule import EqualZeros, Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny_gptq


@rule("O612", "error")
def packed_tensors_incomplete(checkpoint, quantization, layout, tensors, base):
    shown, form = _group_size(quantization, layout, tensors), quantization.format
    for linear in layout.linears:
        at = Place("", tensor=f"{linear.name}.{form.words}")
        absent = [tail for tail in quantization.needed if f"{linear.name}.{tail}" not in tensors]
        if absent:
            yield finding(
                f"{linear.name} is packed but has no {' and no '.join(absent)}",
                at=at,
                evidence={"absent": absent},
                fix=_absent(quantization, linear, tensors, absent, base),
                advice="copy the shard again from where it came from",
            )
            continue
        scales = tensors[f"{linear.name}.{form.scales}"].shape
        group = linear.in_features if quantization.group_size == -1 else quantization.group_size
        expected = form.scale_shape(linear.in_features, linear.out_features, group)
        if tuple(scales) != expected and quantization.readable:
            yield finding(
                f"{linear.name} has scales {list(scales)}, and {quantization.bits_of(linear.name)} bits in groups of {group} make {list(expected)}",
                at=at,
                evidence={"scales": list(scales), "expected": list(expected)},
                fix=shown,
                advice="set bits and group_size to what the tensors were made with",
            )


def _absent(quantization, linear, tensors, absent, base):
    """Equal zero points for a symmetric file; else what --from has under these names."""
    form, bits = quantization.format, quantization.bits_of(linear.name)
    scales, word = tensors.get(f"{linear.name}.{form.scales}"), form.zero_word(bits)
    if absent == [form.zeros] and quantization.sym and word is not None and scales is not None:
        groups, height = scales.shape
        edit = EqualZeros(f"{linear.name}.{form.zeros}", (groups, height * bits // 32), word)
        return Fix("write the zero points of a symmetric file", (edit,))
    donor = base.checkpoint.tensors if base is not None else {}
    names = [f"{linear.name}.{tail}" for tail in absent]
    offers = [base.offer(n, donor[n].dtype.name, donor[n].shape) for n in names if n in donor]
    return (
        Fix(f"take {' and '.join(absent)} from {base.text}", tuple(offers), "unsafe")
        if len(offers) == len(names) and None not in offers
        else None
    )


def _group_size(quantization, layout, tensors):
    """Fix that states the one group size which the scales of every linear show; None where they show several or another
    defect.
    """
    found = set()
    for linear in layout.linears:
        scales = tensors.get(f"{linear.name}.{quantization.format.scales}")
        if scales is None or len(scales.shape) != 2 or not quantization.readable:
            return None
        groups, height = scales.shape
        found.add(
            linear.in_features // groups
            if height == linear.out_features and groups and not linear.in_features % groups
            else None
        )
    key = next((k for k in ("group_size", "q_group_size") if k in quantization.raw), None)
    if len(found) != 1 or None in found or key is None:
        return None
    size = found.pop()
    edit = SetJson(quantization.file, f"{quantization.pointer}/{key}", size, quantization.raw[key])
    return Fix(f"set {key} to {size}, which all scales show", (edit,))


def bad():
    case = tiny_gptq()
    name = case.packed("down")
    del case.tensors[f"{name}.scales"]
    return case, f"{name} is packed but has no scales"


def good():
    return tiny_gptq()


def more():
    """Cases whose cures the example above does not show."""
    case = tiny_gptq()
    del case.tensors[f"{case.packed('down')}.qzeros"]
    yield case
    case = tiny_gptq()
    case.config["quantization_config"]["group_size"] = 64
    yield case
