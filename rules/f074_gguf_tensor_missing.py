"""F074 gguf-tensor-missing: tensors that the metadata promises are absent, of another size, or not asked for.

Why: llama.cpp asks for every tensor of its architecture by name and shape, and stops at the first that is not there. At
the end it counts them, and refuses a file with more than it asked for: buffers and towers that a converter left in. A
missing output.weight is no defect: the embedding then is the output head.

Seen as:
- llama.cpp: `check_tensor_dims: tensor 'blk.0.ffn_up.weight' not found`
- llama.cpp: `check_tensor_dims: tensor 'token_embd.weight' has wrong shape`
- llama.cpp: `done_getting_tensors: wrong number of tensors; expected`

Do: convert the model again, from a checkpoint that `doctor check` finds whole.

False alarms: none known for the architectures that are judged: llama, qwen2, qwen2moe, qwen3, qwen3moe and gemma3.

Fix safety: manual; the tensors are in the original.

Sources: ggml-org/llama.cpp src/llama-model.cpp (load_tensors).
"""

import re

from doctor.lint.rule import Place, _, architecture_in, finding, listed, plural, rule
from doctor.lint.testing import np, tiny_gguf

BLOCK = re.compile(r"blk\.(\d{1,9})\.")
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
OUTSIDE = ("token_embd.weight", "output_norm.weight", "output.weight", *FACTORS)
HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
BESIDE = ("bias", "scale", "input_scale")  # what a linear may have beside its weight
HEADS = "embedding_length and attention.head_count"


@rule("F074", "error", implied_by=("F070", "F071", "F072", "F073", "O641"))
def gguf_tensor_missing(checkpoint, gguf_models):
    for model in gguf_models:
        known = architecture_in(model)
        hidden, layers = model.own("embedding_length"), model.own("block_count")
        if known is None or not isinstance(hidden, int) or not isinstance(layers, int) or layers > 1000:
            continue
        names = [*known.layer.values(), *known.experts.values()]
        optional = () if known.heads_normed else HEAD_NORMS
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
        yield from _of_layers(model, layers, hidden)
        yield from _not_asked_for(model, known, layers)
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


def _of_layers(model, layers, hidden):
    """Tensors of layers: those past the last one, and those of another shape than the sizes say."""
    past = sorted(n for n in model.tensors if (at := BLOCK.match(n)) and int(at[1]) >= layers)
    if past:
        yield finding(
            plural(
                "{model}: {n} tensor is of a layer past its {layers}, {tensor}; llama.cpp stops at their number",
                "{model}: {n} tensors are of layers past its {layers}, first {tensor}; llama.cpp stops at their number",
                len(past),
                model=model.name,
                layers=layers,
                tensor=past[0],
            ),
            at=Place(model.files[0].name, tensor=past[0]),
            evidence={"tensors": past[:100]},
            advice=_("convert the model again"),
        )
    shapes = _shapes(model, hidden)
    wanted = [
        (f"blk.{i}.{name}.{last}", shape if last == "weight" else shape[:1], said)
        for i in range(layers)
        for name, (shape, said) in shapes.items()
        for last in ("weight", "bias")
    ]
    wanted += [(name, shape, "rope.dimension_count") for name, shape in _rotation(model).items()]
    other = [
        (name, shape, said)
        for name, shape, said in wanted
        if (held := model.tensors.get(name)) is not None and _sizes(held.shape) != shape
    ]
    if other:
        name, shape, said = other[0]
        yield finding(
            plural(
                "{model}: {n} tensor is of another shape than by {said}, {tensor}: {found}, must be {shape}",
                "{model}: {n} tensors are of another shape than by {said}, first {tensor}: {found}, must be {shape}",
                len(other),
                model=model.name,
                tensor=name,
                found=list(model.tensors[name].shape),
                said=said,
                shape=list(shape),
            ),
            at=Place(model.files[0].name, tensor=name),
            evidence={"tensors": [n for n, *_rest in other[:100]]},
            advice=_("convert the model again"),
        )


def _not_asked_for(model, known, layers):
    """Tensors of other names: llama.cpp counts those that it asked for, and refuses a file with more."""
    own = {*known.layer.values(), *known.experts.values()} - ({*HEAD_NORMS} if not known.heads_normed else set())
    extra = []
    for name in sorted(model.tensors):
        at = BLOCK.match(name)
        if at is None:
            if name not in OUTSIDE:
                extra.append(name)
        elif int(at[1]) < layers:
            part, _dot, last = name[at.end() :].rpartition(".")
            linear = part in LINEARS or (part.startswith("ffn_") and not part.endswith("norm"))
            if not (linear if last in BESIDE else last == "weight" and (part in own or linear)):
                extra.append(name)
    if extra:
        yield finding(
            plural(
                "{model}: {tensor} is no tensor of a {architecture}; llama.cpp refuses a file with others",
                "{model}: {n} tensors are no tensors of a {architecture}, first {tensor}; llama.cpp refuses a file with "
                "others",
                len(extra),
                model=model.name,
                tensor=extra[0],
                architecture=model.architecture,
            ),
            at=Place(model.files[0].name, tensor=extra[0]),
            evidence={"tensors": extra[:100]},
            advice=_("convert the model again"),
        )


def _rotation(model):
    """Name -> its shape, of the factors of the rotary frequencies: one for each pair of rotated values."""
    heads, hidden = model.own("attention.head_count"), model.own("embedding_length")
    if type(heads) is not int or heads < 1:
        return {}
    rotated = model.own("rope.dimension_count", model.own("attention.key_length", hidden // heads))
    return dict.fromkeys(FACTORS, (rotated // 2,)) if type(rotated) is int else {}


def _shapes(model, hidden):
    """Name in a layer -> (its shape, the keys that say so), where one number holds for all layers."""
    found: dict[str, tuple[tuple[int, ...], str]] = {
        name: ((hidden,), "embedding_length") for name in ("attn_norm", "ffn_norm")
    }
    heads = model.own("attention.head_count")
    kv_heads, ffn = model.own("attention.head_count_kv", heads), model.own("feed_forward_length")
    own = hidden // heads if type(heads) is int and heads > 0 else 0
    key, value = (model.own(f"attention.{part}_length", own) for part in ("key", "value"))
    if all(type(n) is int and n > 0 for n in (heads, kv_heads, key, value)):
        found |= {
            "attn_q": ((heads * key, hidden), HEADS),
            "attn_k": ((kv_heads * key, hidden), HEADS),
            "attn_v": ((kv_heads * value, hidden), HEADS),
            "attn_output": ((hidden, heads * value), HEADS),
        }
    if type(ffn) is int and ffn > 0:
        for name, shape in (("ffn_gate", (ffn, hidden)), ("ffn_up", (ffn, hidden)), ("ffn_down", (hidden, ffn))):
            found[name] = (shape, "feed_forward_length")
    return found


def _sizes(shape):
    """A shape without axes of one in front: llama.cpp compares four axes, and does not tell [1, 8] from [8]."""
    found = tuple(shape)
    while len(found) > 1 and found[0] == 1:
        found = found[1:]
    return found


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
    case = tiny_gguf()
    case.values["blk.1.attn_norm.weight"] = case.values["blk.0.attn_norm.weight"]
    yield case
    case = tiny_gguf()
    case.values["blk.0.ffn_down.weight"] = case.values["blk.0.ffn_down.weight"].T.copy()
    yield case
    case = tiny_gguf()
    case.values["blk.0.mystery.weight"] = case.values["blk.0.attn_norm.weight"]
    yield case
