"""O650 parts-not-as-stated: tensors of quantized linears are not those that quantization_config states.

Why: readers make the parameters of a linear from quantization_config alone: how many scales, of which type, with zero
points or without, with scales of activations or without. A tensor of another shape or type stops them, often by an
assertion that names neither; one for which they made no parameter stops them too, and a parameter for which the file
has no tensor keeps what memory held, without a word.

Seen as:
- vLLM: `assert self.data.shape == loaded_weight.shape or self._is_1d_and_scalar`
- vLLM: `KeyError: 'layers.0.mlp.down_proj.weight_zero_point'`
- vLLM: `KeyError: 'layers.0.mlp.down_proj.input_scale'`
- vLLM: `Attempted to load weight (torch.Size([`
- transformers: `Reinit due to size mismatch`

Do: state what the tensors are, or export the model again with the program that wrote it.

False alarms: a reader that goes by the tensors and not by quantization_config. Sizes are those that config.json gives.

Fix safety: no fix: whether the statement or the tensors are right is not in the files.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization (compressed_tensors/schemes, fp8.py, modelopt.py,
auto_gptq.py, auto_awq.py) and vllm/model_executor/parameter.py; issues 53105, 54126 and pull request 50610;
vllm-project/compressed-tensors src/compressed_tensors/compressors; vllm-project/llm-compressor issue 2255.
"""

from doctor.lint.rule import (
    KNOWN,
    LOST_DATA,
    MUST,
    NEVER,
    Place,
    Unavailable,
    _,
    finding,
    plural,
    rule,
    word_tails,
)
from doctor.lint.testing import np, tiny

NARROW = 8  # bits of a weight that is codes


@rule(
    "O650",
    "error",
    implied_by=(*LOST_DATA, "O612", "O621", "O622", "O619", "O620", "O625", "G331", "C147", "F051", "C143"),
)
def parts_not_as_stated(
    checkpoint, quantization_block, tensors, stored_weights, spec, quantization=None, every_stored_bytes=None
):
    form = quantization_block and next((f for f in KNOWN.values() if f.claims(quantization_block[0])), None)
    if not form:
        raise Unavailable(_("no format that is known states how the weights are stored"))
    raw, file, pointer = quantization_block
    wanted, excluded = form.wanted(raw), form.excluded(raw)
    by_others = () if quantization is None else quantization.needed  # O612, and O622 what is lacking
    lacking = {f"{weight.module}.{part}" for weight in stored_weights.values() for part in weight.lacking}
    found: dict[tuple, list] = {}
    for module, sizes in _quantized(tensors, spec):
        if excluded(module):
            continue
        for part in wanted(module, sizes):
            name = f"{module}.{part.part}"
            key = _defect(part, tensors.get(name), part.part in by_others or name in lacking)
            if key is None and part.values:
                key = _other_values(part, tensors.get(name), (every_stored_bytes or {}).get(name))
            if key is not None:
                kind, is_, must = key
                found.setdefault((part.part, part.says, kind), []).append((name, is_, must))
    for (part, says, kind), tensors_found in sorted(found.items()):
        names, (first, is_, must) = [name for name, _is, _must in tensors_found], tensors_found[0]
        values = {"part": part, "says": says, "first": first, "found": is_, "wanted": must}
        yield finding(
            _message(kind, names, values),
            severity="warning" if kind == "larger" or (kind, is_, must) == ("dtype", "I64", "I32") else "",  # is read
            at=Place(tensors[names[0]].shard if names[0] in tensors else file, tensor=names[0]),
            evidence={"tensors": len(names), "stated": says, "names": names[:100]},
            facts_table=((_("stated at"), f"{file} {pointer}"), (_("says"), says)),
            advice=_("state what the tensors are, or export the model again"),
        )


def _quantized(tensors, spec):
    """(module, its sizes by config.json) of every linear whose weight is codes."""
    tails = word_tails()
    for name, info in tensors.items():
        narrow = info.dtype.bits <= NARROW and info.dtype.name != "BOOL" and len(info.shape) == 2
        if name.endswith(tails) or (
            name.endswith(".weight") and (narrow or f"{name}_scale" in tensors or f"{name}_scale_inv" in tensors)
        ):
            module = name.rpartition(".")[0]
            yield module, spec.linear_shape(module)


def _defect(part, info, judged):
    """(kind, what is, what must be) of a part that is not as it is wanted; None where it is. judged: its absence is by
    another rule.
    """
    if info is None:
        return None if judged or part.presence != MUST else ("absent", "", "")
    if part.presence == NEVER:
        return ("no room", "", "")
    if part.dtypes and info.dtype.name not in part.dtypes:
        return ("dtype", info.dtype.name, part.dtypes[0])
    if part.shapes and info.shape not in part.shapes:
        return ("shape", _size(info.shape), _size(part.shapes[0]))
    return None


def _other_values(part, info, stored):
    """The same where it holds other numbers than it must."""
    if stored is None or info is None or len(stored) != info.nbytes:
        return None
    found = np.frombuffer(stored, "<i8" if info.dtype.bits == 64 else "<i4").tolist()
    if found == list(part.values):
        return None
    larger = len(found) == len(part.values) and all(is_ >= must for is_, must in zip(found, part.values, strict=True))
    # compressed-tensors cuts unpacked codes to these sizes: larger ones cut nothing.
    return ("larger" if larger else "values", str(found), str(list(part.values)))


def _size(shape):
    return str(list(shape))


def _message(kind, names, values):
    n = len(names)
    if kind == "absent":
        return plural(
            "{n:,} linear has no {part} ({first}); {says} asks for it",
            "{n:,} linears have no {part} (first {first}); {says} asks for it",
            n,
            **values,
        )
    if kind == "no room":
        return plural(
            "{n:,} linear has {part} ({first}); by {says} readers have no parameter for it",
            "{n:,} linears have {part} (first {first}); by {says} readers have no parameter for it",
            n,
            **values,
        )
    if kind in ("values", "larger"):
        return plural(
            "{n:,} {part} holds {found} ({first}); the sizes in config.json are {wanted}",
            "{n:,} {part} hold other sizes than config.json, first {first}: {found} for {wanted}",
            n,
            **values,
        )
    return plural(
        "{n:,} tensor {part} is not as stated: {first} is {found}; {says} asks for {wanted}",
        "{n:,} tensors {part} are not as stated: {first} is {found}; {says} asks for {wanted}",
        n,
        **values,
    )


def rows_in_eight_bits(scale_shape):
    """tiny() in FP8 with a scale a row, stored in this shape of n rows."""
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        case.tensors[linear.tensor] = rng.integers(1, 0x78, (n, k), np.uint8)
        case.tensors[f"{linear.tensor}_scale"] = np.full(scale_shape(n), 0.01, np.float32)
        case.dtypes |= {linear.tensor: "F8_E4M3", f"{linear.tensor}_scale": "F32"}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    return case


def bad():
    case = rows_in_eight_bits(lambda n: (n, 1))
    name = f"{case.name('down')}_scale"
    n = case.tensors[name].shape[0]
    case.tensors[name] = case.tensors[name].reshape(-1)
    return case, f"1 tensor weight_scale is not as stated: {name} is [{n}]; strategy channel asks for [{n}, 1]"


def good():
    return rows_in_eight_bits(lambda n: (n, 1))
