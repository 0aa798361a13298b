"""F074 gguf-tensor-missing: tensors that the metadata promises are absent or of another size.

Why: llama.cpp asks for every tensor of its architecture by name and shape, and stops at the first that is not there. A
missing output.weight is no defect: the embedding then is the output head.

Seen as:
- llama.cpp: `check_tensor_dims: tensor 'blk.0.ffn_up.weight' not found`
- llama.cpp: `check_tensor_dims: tensor 'token_embd.weight' has wrong shape`

Do: convert the model again, from a checkpoint that `doctor check` finds whole.

False alarms: none known for the architectures that are judged: llama, qwen2, qwen2moe, qwen3, qwen3moe and gemma3.

Fix safety: manual; the tensors are in the original.

Sources: ggml-org/llama.cpp src/llama-model.cpp (load_tensors).
"""

from doctor.lint.rule import Place, _, architecture_in, finding, listed, rule
from doctor.lint.testing import np, tiny_gguf


@rule("F074", "error", implied_by=("F070", "F071", "F072", "F073", "O641"))
def gguf_tensor_missing(checkpoint, gguf_models):
    for model in gguf_models:
        known = architecture_in(model)
        hidden, layers = model.own("embedding_length"), model.own("block_count")
        if known is None or not isinstance(hidden, int) or not isinstance(layers, int) or layers > 1000:
            continue
        names = [*known.layer.values(), *known.experts.values()]
        optional = () if known.heads_normed else ("attn_q_norm", "attn_k_norm")
        needed = [f"blk.{i}.{n}.weight" for i in range(layers) for n in names if n not in optional]
        lost = [n for n in ("token_embd.weight", "output_norm.weight", *needed) if n not in model.tensors]
        place = Place(model.files[0].name)
        if lost:
            yield finding(
                _(
                    "{model}: {n} of {count} tensors of its {layers} layers are missing: {names}",
                    model=model.name,
                    n=len(lost),
                    count=len(needed) + 2,
                    layers=layers,
                    names=listed(lost[:3]),
                ),
                at=place,
                evidence={"missing": lost[:100]},
                advice=_("convert the model again"),
            )
            continue
        for name in ("token_embd.weight", "output_norm.weight"):
            shape = model.tensors[name].shape
            if shape[-1] != hidden:
                yield finding(
                    _(
                        "{model}: {tensor} is {shape}; embedding_length is {hidden}",
                        model=model.name,
                        tensor=name,
                        shape=list(shape),
                        hidden=hidden,
                    ),
                    at=Place(model.files[0].name, tensor=name),
                    evidence={"shape": list(shape), "embedding_length": hidden},
                    advice=_("convert the model again"),
                )


def bad():
    case = tiny_gguf()
    del case.values["blk.0.ffn_up.weight"]
    count = len(case.values) + 1
    return case, f"model.gguf: 1 of {count} tensors of its 1 layers are missing: blk.0.ffn_up.weight"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gguf()
    case.values["output_norm.weight"] = np.zeros(32, "<f4")
    yield case
