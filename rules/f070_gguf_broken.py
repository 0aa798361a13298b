"""F070 gguf-broken: llama.cpp refuses the header of a GGUF file.

Why: llama.cpp reads the header before anything else and stops at the first thing that is not as the format demands: a
count that the file cannot hold, a name that stands twice, an offset that leaves a gap, an alignment that is no power of 2.

Seen as:
- llama.cpp: `failed to read key-value pairs`
- llama.cpp: `failed to read tensor info`
- llama.cpp: `invalid magic characters`

Do: download the file again, or convert the model again; a file of version 1 or of a big-endian machine must be converted.

False alarms: none known; what is listed is what llama.cpp's reader checks.

Fix safety: manual; nothing in the file says what it should be.

Sources: ggml-org/llama.cpp ggml/src/gguf.cpp (gguf_init_from_reader).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gguf, w

OF_OTHERS = ("past-the-end", "indivisible", "unknown-type")  # F071, O641


@rule("F070", "error")
def gguf_broken(checkpoint, gguf_models):
    for model in gguf_models:
        for file in model.files:
            for defect in file.defects:
                if defect.kind not in OF_OTHERS:
                    yield finding(
                        _("{file}: {what}", file=file.name, what=defect.detail),
                        at=Place(file.name, tensor=defect.tensor),
                        evidence={"kind": defect.kind},
                        advice=_("download the file again, or convert the model again"),
                    )


def bad():
    case = tiny_gguf()
    case.keys["general.alignment"] = w.u32(24)
    return case, "model.gguf: general.alignment is 24; must be a power of 2"


def good():
    return tiny_gguf()
