"""F071 gguf-truncated: a GGUF file ends before its tensors do.

Why: a download stopped early. llama.cpp maps the file and refuses it; other programs read what lies behind the end as
zeros.

Seen as:
- llama.cpp: `data is not within the file bounds, model is corrupted or incomplete`

Do: download the file again.

False alarms: none known.

Fix safety: manual; the bytes are elsewhere.

Sources: ggml-org/llama.cpp src/llama-model-loader.cpp.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gguf


@rule("F071", "error")
def gguf_truncated(checkpoint, gguf_models):
    for model in gguf_models:
        for file in model.files:
            lost = [d for d in file.defects if d.kind == "past-the-end"]
            if lost:
                yield finding(
                    _(
                        "{file} lacks its last {missing:,} bytes: {n} of {all} tensors end past them, first {tensor}",
                        file=file.name,
                        missing=file.missing_bytes,
                        n=len(lost),
                        all=len(lost) + len(file.tensors),
                        tensor=lost[0].tensor,
                    ),
                    at=Place(file.name, tensor=lost[0].tensor),
                    evidence={"missing_bytes": file.missing_bytes, "tensors": len(lost)},
                    advice=_("download the file again"),
                )


def _cut(folder):
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes()[:-100])


def bad():
    case = tiny_gguf()
    case.damage.append(_cut)
    count, last = len(case.values), list(case.values)[-1]
    lost = 1 if case.values[last].nbytes >= 100 else 2
    first = list(case.values)[-lost]
    return case, f"model.gguf lacks its last 100 bytes: {lost} of {count} tensors end past them, first {first}"


def good():
    return tiny_gguf()
