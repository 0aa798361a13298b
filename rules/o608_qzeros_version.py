"""O608 qzeros-version: GPTQ zero points do not match checkpoint_format (v1 or v2).

Why: GPTQ files of version 1 store zero points minus one (7 for symmetric 4-bit), those of version 2 unchanged (8). A
file that names one version and holds the other shifts every weight by one step: it loads without an error and generates
nonsense. Marlin kernels ignore zero points of symmetric files, so the same file works there and fails elsewhere.

Seen as:
- vLLM: `!!!!!!!!!!!!!!!!`

Do: set checkpoint_format to the version that the words have. A config without that key comes from a tool older than
version 2, whose readers do not know the key either: there the words are converted to version 1, which every reader
accepts.

False alarms: none for symmetric files, whose zero points are known.

Fix safety: safe: one word of the config; or, where only some linears have the other version or the key is absent, their
zero points are converted (8 becomes 7 at 4 bits), which is the same model. A zero point that cannot be is refused.

Sources: vllm-project/vllm PR 26092 and 38966; AutoGPTQ/AutoGPTQ PR 640; turboderp/exllamav2
exllamav2/ext.py (0x11111111).
"""

from doctor.lint.rule import (
    KNOWN,
    MISSING,
    Fix,
    Place,
    SetJson,
    ShiftZeros,
    _,
    finding,
    listed,
    plural,
    quantization_blocks,
    rule,
)
from doctor.lint.testing import tiny_gptq


@rule("O608", "error")
def qzeros_version(checkpoint, quantization, packed_words):
    form = quantization.format
    if not form.twin or not quantization.sym:
        return
    twin, tail = KNOWN[form.twin], f".{form.zeros}"
    bits = {n: quantization.bits_of(n.removesuffix(tail)) for n in packed_words if n.endswith(tail)}
    wrong = [
        n
        for n, b in bits.items()
        if (word := twin.zero_word(b)) is not None and packed_words[n].kinds == {word: packed_words[n].count}
    ]
    if not wrong:
        return
    key, value = quantization.reader.version_key(quantization.raw), quantization.reader.spelled(twin)
    pointer = f"{quantization.pointer}/{key}"
    if len(wrong) < len(bits) or (not twin.zero_offset and key not in quantization.raw):
        shift = twin.zero_offset - form.zero_offset
        fix = Fix(
            _("store the zero points minus one, as version 1 does")
            if shift < 0
            else _("store the zero points unchanged, as version 2 does"),
            tuple(ShiftZeros(n, bits[n], shift) for n in wrong),
        )
    else:
        fix = Fix(
            _("set {key} to {value}", key=key, value=value),
            tuple(_renamed(checkpoint, quantization, key, value)),
        )
    words = sorted({f"0x{twin.zero_word(bits[n]):08x}" for n in wrong})
    yield finding(
        plural(
            "{n:,} qzeros tensor holds only {words}, which is {found}; {key} says {stated}",
            "{n:,} qzeros tensors hold only {words}, which is {found}; {key} says {stated}",
            len(wrong),
            words=listed(words),
            found=twin.name,
            key=key,
            stated=form.name,
        ),
        at=Place(quantization.file, pointer=pointer),
        evidence={"word": " or ".join(words), "tensors": len(wrong), "first": wrong[0]},
        fix=fix,
        advice=_("set it to the version that the words have"),
    )


def _renamed(checkpoint, quantization, key, value):
    """Edits that state the version wherever it stands: under both keys, and in every copy of quantization_config."""
    reader = quantization.reader
    stated = (quantization.format.name, reader.spelled(quantization.format))
    if key not in quantization.raw:
        yield SetJson(quantization.file, f"{quantization.pointer}/{key}", value, expect=MISSING)
    for raw, file, pointer in quantization_blocks(checkpoint):
        for name in dict.fromkeys((key, "checkpoint_format", "format")):
            if reader.claims(raw) and raw.get(name) in stated:
                yield SetJson(file, f"{pointer}/{name}", value, expect=raw[name])


def bad():
    case = tiny_gptq(version="gptq_v2")
    case.config["quantization_config"]["checkpoint_format"] = "gptq"
    return case, "14 qzeros tensors hold only 0x88888888, which is gptq_v2; checkpoint_format says gptq"


def good():
    return tiny_gptq(version="gptq_v2")
