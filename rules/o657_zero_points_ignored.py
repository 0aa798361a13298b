"""O657 zero-points-ignored: a file that is called symmetric holds zero points of its own.

Why: where quantization_config says symmetric (sym true, zero_point false), vLLM's kernels take the middle of the codes
for every zero point and read none: Marlin for GPTQ, the CPU kernel and the kernels of experts for AWQ. Weights under
another zero point are shifted by whole steps, and the reply is nonsense. Readers that do read the zero points answer
well, so the file passes elsewhere. vLLM on a GPU is one of them for AWQ's linears, so an AWQ file without experts of
this kind is told as an info.

Seen as:
- vLLM: `!!!!!!!!!!!!!!!!`

Do: state what the file holds, or quantize again symmetrically where the reader has no kernel for zero points: vLLM 0.32
refuses GPTQ with sym false.

False alarms: a reader whose kernels read zero points whatever the configuration says.

Fix safety: safe: one word of quantization_config, which says what the tensors are. No fix where version 1 of GPTQ
stores a zero point as 15: readers that take it disagree about it (O609).

Sources: run with vLLM 0.32 on a CPU (other logits with zero_point false); vllm-project/vllm
vllm/model_executor/layers/quantization/auto_awq.py, auto_gptq.py and
vllm/model_executor/kernels/linear/mixed_precision/cpu.py.
"""

from doctor.lint.rule import KNOWN, Fix, Place, SetJson, _, finding, plural, quantization_blocks, rule
from doctor.lint.testing import np, tiny_gptq

EXPERTS = ".experts."
SAYS = (("zero_point", False), ("sym", True))  # how a file is called symmetric


@rule("O657", "warning", certainty="likely", implied_by=("O608", "O609", "O612"))
def zero_points_ignored(checkpoint, quantization, packed_words):
    form, tail = quantization.format, f".{quantization.format.zeros}"
    if not quantization.sym or not form.zeros:
        return
    found, wraps = [], False
    for name, words in packed_words.items():
        bits = quantization.bits_of(name.removesuffix(tail))
        usual = {f.zero_word(bits) or f.middle_word(bits) for f in (form, KNOWN[form.twin] if form.twin else form)}
        if name.endswith(tail) and None not in usual and (words.kinds is None or not words.kinds.keys() <= usual):
            found.append(name)
            wraps |= bool(form.zero_offset and bits == 4 and words.full_fields)
    said = [
        SetJson(file, f"{pointer}/{key}", not value, expect=value)
        for raw, file, pointer in quantization_blocks(checkpoint)
        for key, value in SAYS
        if raw.get(key) is value
    ]
    if not found or not said:
        return
    # vLLM takes Marlin for uint4 with zero_point true alone; without it a GPU runs AWQ's own kernel, which reads them.
    read = form.stores_zeros and not any(EXPERTS in name for name in found)
    key = said[0].pointer.rpartition("/")[2]
    yield finding(
        plural(
            "{n:,} {part} tensor holds zero points of its own ({first}), and {key} {value} states none: "
            "kernels that go by it ignore them",
            "{n:,} {part} tensors hold zero points of their own (first {first}), and {key} {value} states none: "
            "kernels that go by it ignore them",
            len(found),
            first=sorted(found)[0],
            part=form.zeros,
            key=key,
            value=str(dict(SAYS)[key]).lower(),
        ),
        at=Place(said[0].file, pointer=said[0].pointer),
        evidence={"tensors": len(found), "names": sorted(found)[:100]},
        fix=None if wraps else Fix(_("set {key} to {value}", key=key, value=str(said[0].value).lower()), tuple(said)),
        advice=_("quantize again: version 1 stores some as 15, which wraps")
        if wraps
        else _("state what the file holds")
        if form.stores_zeros
        else _("state what the file holds, for readers of zero points; vLLM then refuses it: quantize again for it"),
        severity="info" if read else "",
    )


def bad():
    case = tiny_gptq()
    name = f"{case.packed('down')}.qzeros"
    shape = case.tensors[name].shape
    fields = np.random.default_rng(3).integers(1, 7, (*shape, 8), np.int32)
    case.tensors[name] = (fields << np.arange(0, 32, 4, dtype=np.int32)).sum(-1, dtype=np.int32)
    return case, (
        f"1 qzeros tensor holds zero points of its own ({name}), and sym true states none: "
        "kernels that go by it ignore them"
    )


def good():
    return tiny_gptq()
