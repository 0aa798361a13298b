"""O612 packed-tensors-incomplete: packed linear lacks a tensor, or its scales have the wrong shape.

Why: qweight without scales cannot be decoded. Where the number of groups in scales does not follow from in_features and
group_size, the config states a group size or a number of bits that the tensors were not made with: the file does not
load, or decodes wrongly.

Do: copy the shard of the missing tensors again; set bits and group_size to the values that the shapes show.

False alarms: formats with other tensor names are not judged.

Fix safety: safe where the files determine it: the zero points of a symmetric GPTQ file are one word, and a group size
that the scales of every linear show is written to the config. With `--from` tensors are taken from another copy,
unsafe. Else no fix.

Sources: ModelCloud/GPTQModel nn_modules/qlinear/__init__.py; casper-hansen/AutoAWQ
awq/modules/linear/gemm.py.
"""

from doctor.lint.rule import EqualZeros, Fix, Place, SetJson, _, finding, listed, plural, rule
from doctor.lint.testing import tiny_gptq


@rule("O612", "error")
def packed_tensors_incomplete(checkpoint, quantization, layout, tensors, spec, base):
    shown, form = _group_size(quantization, layout, tensors), quantization.format
    other = _other_bits(quantization, layout, tensors, spec)
    yield from _wrong_bits(quantization, layout, other)
    for linear in layout.linears:
        at = Place("", tensor=f"{linear.name}.{form.words}")
        absent = [tail for tail in quantization.needed if f"{linear.name}.{tail}" not in tensors]
        if absent:
            yield finding(
                _("{linear} is packed, but has no {absent}", linear=linear.name, absent=listed(absent)),
                at=at,
                evidence={"absent": absent},
                fix=_absent(quantization, linear, tensors, absent, base),
                advice=_("copy the shard again from its source"),
            )
            continue
        if linear.name in other:
            continue  # a group size that fits the wrong bits would be wrong too
        scales = tensors[f"{linear.name}.{form.scales}"].shape
        group = linear.in_features if quantization.group_size == -1 else quantization.group_size
        expected = form.scale_shape(linear.in_features, linear.out_features, group)
        if tuple(scales) != expected and quantization.readable:
            yield finding(
                _(
                    "{linear} has scales {scales}; {bits} bits in groups of {group} need {expected}",
                    linear=linear.name,
                    scales=list(scales),
                    bits=quantization.bits_of(linear.name),
                    group=group,
                    expected=list(expected),
                ),
                at=at,
                evidence={"scales": list(scales), "expected": list(expected)},
                fix=shown,
                advice=_("set bits and group_size to the values that the tensors were made with"),
            )
            continue
        yield from _zeros(quantization, linear, tensors, expected, at)


def _zeros(quantization, linear, tensors, scales, at):
    """Zero points in words beside the scales."""
    form, scheme = quantization.format, quantization.scheme_of(linear.name)
    info = tensors.get(f"{linear.name}.{form.zeros}")
    if info is None or not quantization.readable:
        return
    parts = form.parts(linear.in_features, linear.out_features, scheme)
    expected = next((part.shape for part in parts if part.name == form.zeros), None)
    if expected is not None and tuple(info.shape) != expected:
        yield finding(
            _(
                "{linear} has zero points {zeros}; scales {scales} need {expected}",
                linear=linear.name,
                zeros=list(info.shape),
                scales=list(scales),
                expected=list(expected),
            ),
            at=at,
            evidence={"zeros": list(info.shape), "expected": list(expected)},
            advice=_("quantize this linear again"),
        )


def _other_bits(quantization, layout, tensors, spec):
    """Name -> bits of linears whose words have the sizes of config.json in other bits than those that are stated. Empty
    where a linear has them in no bits: then config.json is what is wrong.
    """
    form, found = quantization.format, {}
    for linear in layout.linears:
        sizes, words = spec.linear_shape(linear.name), tensors.get(f"{linear.name}.{form.words}")
        if words is None or sizes is None or sizes == (linear.out_features, linear.in_features):
            continue
        fitting = [b for b in form.bits if form.size(words.shape, b, quantization.version) == sizes[::-1]]
        if not fitting and quantization.readable:
            return {}
        if len(fitting) == 1:
            found[linear.name] = fitting[0]
    return found


def _wrong_bits(quantization, layout, other):
    for stated, bits in sorted({(quantization.bits_of(name), bits) for name, bits in other.items()}):
        names = [n for n, b in other.items() if (quantization.bits_of(n), b) == (stated, bits)]
        place = _place_of_bits(quantization.raw) if len(names) == len(layout.linears) else None
        edits = (SetJson(quantization.file, quantization.pointer + place, bits, stated),) if place else ()
        yield finding(
            plural(
                "{n:,} linear has words of {bits} bits by the sizes in config.json; quantization_config says {stated} "
                "({first})",
                "{n:,} linears have words of {bits} bits by the sizes in config.json; quantization_config says {stated} "
                "(first {first})",
                len(names),
                bits=bits,
                stated=stated,
                first=names[0],
            ),
            at=Place(quantization.file, pointer=quantization.pointer + (place or "")),
            evidence={"linears": len(names), "of": len(layout.linears), "bits": bits, "stated": stated},
            fix=Fix(_("set the bits to {bits}", bits=bits), edits) if edits else None,
            advice=_("set bits and group_size to the values that the tensors were made with"),
        )


def _place_of_bits(raw):
    """Where a quantization_config states the bits of all linears; None where it states them more than once."""
    key = next((key for key in ("bits", "w_bit") if key in raw), None)
    groups = raw.get("config_groups")
    if key is None and isinstance(groups, dict) and len(groups) == 1:
        return f"/config_groups/{next(iter(groups))}/weights/num_bits"
    return key and f"/{key}"


def _absent(quantization, linear, tensors, absent, base):
    """Equal zero points for a symmetric file; else what --from has under these names."""
    form, bits = quantization.format, quantization.bits_of(linear.name)
    scales, word = tensors.get(f"{linear.name}.{form.scales}"), form.zero_word(bits)
    if absent == [form.zeros] and quantization.sym and word is not None and scales is not None:
        groups, height = scales.shape
        edit = EqualZeros(f"{linear.name}.{form.zeros}", (groups, height * bits // 32), word)
        return Fix(_("write the zero points of a symmetric file"), (edit,))
    donor = base.checkpoint.tensors if base is not None else {}
    names = [f"{linear.name}.{tail}" for tail in absent]
    offers = [base.offer(n, donor[n].dtype.name, donor[n].shape) for n in names if n in donor]
    return (
        Fix(_("take {name} from {base}", name=listed(absent), base=base.text), tuple(offers), "unsafe")
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
    return Fix(_("set {key} to {value}, which all scales show", key=key, value=size), (edit,))


def bad():
    case = tiny_gptq()
    name = case.packed("down")
    del case.tensors[f"{name}.scales"]
    return case, f"{name} is packed, but has no scales"


def good():
    return tiny_gptq()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gptq()
    del case.tensors[f"{case.packed('down')}.qzeros"]
    yield case
    case = tiny_gptq()
    case.config["quantization_config"]["group_size"] = 64
    yield case
