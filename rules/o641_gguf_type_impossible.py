"""O641 gguf-type-impossible: a tensor's type does not allow its width, or is not known.

Why: a row is a whole number of blocks, of 32 or 256 elements by type. llama.cpp refuses a file in which it is not; and a
type that it does not know it cannot read.

Seen as:
- llama.cpp: `elements per row, not a multiple of block size`
- llama.cpp: `has invalid ggml type`

Do: quantize again; where 256 does not divide in_features, only types of 32 elements fit.

False alarms: a type newer than this version of doctor; llama.cpp's own version decides.

Fix safety: manual; the values must be quantized again.

Sources: ggml-org/llama.cpp ggml/src/gguf.cpp (gguf_init_from_reader).
"""

import struct

from doctor.lint.rule import Place, _, architecture_in, finding, plural, rule
from doctor.lint.testing import tiny_gguf


@rule("O641", "error")
def gguf_type_impossible(checkpoint, gguf_models):
    for model in gguf_models:
        for file in model.files:
            found = [d for d in file.defects if d.kind in ("indivisible", "unknown-type")]
            if found:
                yield finding(
                    _(
                        "{file}: {what}" if len(found) == 1 else "{file}: {what}, and {more} tensors more",
                        file=file.name,
                        what=found[0].detail,
                        more=len(found) - 1,
                    ),
                    at=Place(file.name, tensor=found[0].tensor),
                    evidence={"tensors": [d.tensor for d in found[:100]]},
                    advice=_("quantize again with a type whose blocks fit"),
                )
        if architecture_in(model) is None:
            continue
        vectors = [t for t in model.tensors.values() if len(t.shape) == 1 and t.type and t.type.name != "F32"]
        if vectors:
            yield finding(
                plural(
                    "{model}: {tensor} is {type}; llama.cpp computes norms and biases in F32 alone",
                    "{model}: {n:,} norms and biases are not F32, first {tensor} ({type}); llama.cpp computes with F32 alone",
                    len(vectors),
                    model=model.name,
                    tensor=vectors[0].name,
                    type=vectors[0].type.name,
                ),
                at=Place(vectors[0].file, tensor=vectors[0].name),
                evidence={"tensors": [t.name for t in vectors[:100]]},
                advice=_("convert the model again"),
            )


def _as_q4_k(folder):
    path = folder / "model.gguf"
    raw = path.read_bytes()
    at = raw.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 16
    path.write_bytes(raw[:at] + struct.pack("<I", 12) + raw[at + 4 :])


def bad():
    case = tiny_gguf()
    case.damage.append(_as_q4_k)
    return case, (
        "model.gguf: tensor blk.0.ffn_down.weight [64, 128] is Q4_K: in_features 128 is not a multiple of 256"
    )


def good():
    return tiny_gguf()
