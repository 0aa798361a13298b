"""O654 configs-disagree: two places state the quantization, and differently.

Why: readers differ in where they look: transformers and vLLM take quantization_config of config.json first, multimodal
classes that of text_config, TensorRT-LLM and older ModelOpt readers hf_quant_config.json, AutoGPTQ and AutoAWQ their own
file. mlx-lm writes one block under "quantization" and under "quantization_config" and reads the first. One model is then
read in two ways, and one of them is wrong.

Seen as:
- vLLM: `ModelOpt currently only supports`
- AutoGPTQ: `size mismatch for`

Do: make all of them say what the tensors are, or remove the ones that nobody needs.

False alarms: a file of another program that no reader of yours looks at.

Fix safety: no fix: which of them is right is not in the files, unless another finding says so.

Sources: vllm-project/vllm vllm/model_executor/model_loader/weight_utils.py (get_quant_config) and
vllm/transformers_utils/config.py; pull request 10120; NVIDIA/TensorRT-LLM tensorrt_llm/_torch/model_config.py;
ml-explore/mlx-lm 0.31.3 mlx_lm/utils.py (load_model).
"""

from doctor.lint.rule import KNOWN, Place, _, finding, plural, quantization_blocks, rule
from doctor.lint.testing import tiny_gptq


@rule("O654", "warning", implied_by=("F075", "C148"))
def configs_disagree(checkpoint, quantization_block, config):
    if quantization_block is None:
        return
    yield from _of_mlx(config)
    raw, file, pointer = quantization_block
    form = _form(raw)
    for other, other_file, other_pointer in list(quantization_blocks(checkpoint))[1:]:
        second = _form(other)
        if form is None or second is None:
            continue
        places = {"file": _place(file, pointer), "other": _place(other_file, other_pointer)}
        here, there = form.stated_name(raw), second.stated_name(other)
        at = Place(other_file, pointer=other_pointer or None)
        advice = _("make both say what the tensors are: engines differ in which of them they read")
        if here != there and ((form is not second and form.twin != second.name) or form.stored_bits(raw) is not None):
            message = _("{file} says {here}, and {other} says {there}", here=here, there=there, **places)
            yield finding(message, at=at, evidence={"here": here, "there": there}, advice=advice)
            continue
        for key in form.agreed:
            if key in raw and key in other and raw[key] != other[key]:
                shown = {"here": _shown(raw[key]), "there": _shown(other[key])}
                yield finding(
                    _("{key} is {here} in {file} and {there} in {other}", key=key, **shown, **places),
                    at=Place(other_file, pointer=f"{other_pointer}/{key}"),
                    evidence={"key": key, "here": raw[key], "there": other[key]},
                    advice=advice,
                )


def _of_mlx(config):
    """Where the two blocks of an MLX model differ, whole modules (with widths of their own) included."""
    first, second = config.get("quantization"), config.get("quantization_config")
    if not isinstance(first, dict) or not isinstance(second, dict) or "quant_method" in second:
        return
    modules = {key for block in (first, second) for key, value in block.items() if not _is_word(value)}
    differ = [k for k in sorted({*first} & {*second} | modules) if first.get(k) != second.get(k)]
    if differ:
        yield finding(
            plural(
                "{n:,} key differs between quantization and quantization_config ({key}: {here} and {there}): mlx-lm reads "
                "quantization",
                "{n:,} keys differ between quantization and quantization_config (first {key}: {here} and {there}): mlx-lm reads "
                "quantization",
                len(differ),
                key=differ[0],
                here=_shown(first.get(differ[0])),
                there=_shown(second.get(differ[0])),
            ),
            at=Place("config.json", pointer="/quantization_config"),
            evidence={"keys": differ[:100]},
            advice=_("make both say what the tensors are: engines differ in which of them they read"),
        )


def _is_word(value):
    """Whether a value is one of the whole model and not of a module: a number or a text."""
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _form(raw):
    return next((form for form in KNOWN.values() if form.claims(raw)), None)


def _place(file, pointer):
    """The file, and the part of config.json where it is not the usual one."""
    part = pointer.strip("/").rpartition("/")[0]
    return f"{file} ({part})" if part else file


def _shown(value):
    return str(value)[:60]


def bad():
    case = tiny_gptq()
    case.json["quantize_config.json"] = case.config["quantization_config"] | {"group_size": 64}
    return case, "group_size is 32 in config.json and 64 in quantize_config.json"


def good():
    case = tiny_gptq()
    case.json["quantize_config.json"] = dict(case.config["quantization_config"])
    return case
