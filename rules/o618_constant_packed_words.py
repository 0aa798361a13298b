"""O618 constant-packed-words: all packed codes of a linear are the same.

Why: packing wrote one code everywhere, so all weights of a group are one number (code 0 of 4 symmetric bits is -8 times
the scale). Scales and zero points look right, the file has its full size and every engine loads it, but the linear
passes nothing on.

Do: quantize again with another version of the tool, or copy the shards again from their source.

False alarms: none; every word was compared. Linears whose weights are all exactly 0 (a pruned expert) are a warning.

Fix safety: unsafe, and only with `--from`: the packed tensor is taken from another copy of the quantized checkpoint.

Sources: ModelCloud/GPTQModel issue 1294 (group_size -1: all qweight words 0, scales and qzeros right).
"""

import re

from doctor.lint.rule import Fix, Place, Unavailable, _, finding, plural, ranges, rule
from doctor.lint.testing import np, tiny_gptq

NUMBER = re.compile(r"\.(\d+)(?=\.)")


@rule("O618", "error", implied_by=("F001", "F002", "F004"))
def constant_packed_words(
    checkpoint, every_repeated_code, tensors, base, quantization=None, packed_words=None, every_n_zero=None
):
    found: dict[tuple, list[str]] = {}
    for name, code in every_repeated_code.items():
        if code is not None and name in tensors and min(tensors[name].shape, default=0) > 1:
            word = f"0x{code:0{tensors[name].dtype.bits // 4}x}"
            zero = _is_zero(tensors[name], code, tensors, quantization, packed_words or {})
            found.setdefault((word, zero), []).append(name)
    if not found and not every_repeated_code:
        raise Unavailable(_("no tensor holds packed codes"))
    for (word, zero), names in sorted(found.items()):
        yield finding(
            plural(
                "{n:,} linear is quantized to 0: every element of {first} is {word}",
                "{n:,} linears are quantized to 0: every element of their packed codes is {word} (first {first})",
                len(names),
                first=names[0],
                word=word,
            )
            if zero
            else plural(
                "{n:,} linear holds one code everywhere: every element of {first} is {word}",
                "{n:,} linears hold one code everywhere: every element of their packed codes is {word} (first {first})",
                len(names),
                first=names[0],
                word=word,
            ),
            at=Place(tensors[names[0]].shard, tensor=names[0]),
            severity="warning" if zero else "",
            evidence={"linears": len(names), "of": len(every_repeated_code), "word": word, "tensors": names[:100]},
            facts_table=_table(names, tensors, every_n_zero or {}),
            fix=_from_base(base, tensors, names),
            advice=_("quantize again, or copy the shards again from their source"),
        )


def _is_zero(info, code, tensors, quantization, words):
    """Whether that code stands for the weight 0 in every group."""
    name = info.name
    if info.dtype.name != "I32":  # bytes: signed integers, or two 4-bit floats of which 0 and 8 are 0 and -0
        return f"{name}.absmax" not in tensors and code in ((0,) if info.dtype.name == "I8" else (0x00, 0x88))
    if quantization is None or not name.endswith(f".{quantization.format.words}"):
        return False
    module, form = name.rpartition(".")[0], quantization.format
    bits = quantization.bits_of(module)
    if bits not in form.bits:
        return False  # no code of such bits stands for anything
    zeros = words.get(f"{module}.{form.zeros}")
    if zeros is None:
        return quantization.sym and code == form.middle_word(bits)
    kinds = list(zeros.kinds or ())
    return len(kinds) == 1 and form.code_word(kinds[0], bits) == code


def _table(names, tensors, zeros):
    """Linears by their place in a decoder layer, the layers, and how many of their biases are 0 too."""
    rows: dict[str, tuple[list[int], list[str]]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        layer = NUMBER.search(name)
        place = module if layer is None else module[layer.end() + 1 :]
        numbers, biases = rows.setdefault(place, ([], []))
        if layer is not None:
            numbers.append(int(layer[1]))
        bias = f"{module}.bias"
        if bias in tensors and zeros.get(bias) == tensors[bias].numel:
            biases.append(bias)
    yield _("linear"), _("decoder layers"), _("biases that are all 0")
    for place, (numbers, biases) in rows.items():
        yield place, ranges(numbers) if numbers else "-", len(biases)


def _from_base(base, tensors, names):
    if base is None:
        return None
    offers = [base.offer(name, tensors[name].dtype.name, tensors[name].shape) for name in names]
    return None if None in offers else Fix(_("take them from {base}", base=base.text), tuple(offers), "unsafe")


def bad():
    case = tiny_gptq()
    name = case.packed("down") + ".qweight"
    case.tensors[name] = np.zeros_like(case.tensors[name])
    return case, f"1 linear holds one code everywhere: every element of {name} is 0x00000000"


def good():
    return tiny_gptq()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gptq()
    name = case.packed("down") + ".qweight"
    case.tensors[name] = np.full_like(case.tensors[name], np.uint32(0x88888888).view(np.int32))
    yield case
