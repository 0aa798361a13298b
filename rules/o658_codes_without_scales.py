"""O658 codes-without-scales: 16-bit weights are FP8 codes without their scales.

Why: 8-bit floats end at 448, and every scale is chosen so that the largest weight of its block comes to just that. A
conversion that casts such weights to 16 bits and drops the scales leaves weights in the hundreds where trained ones are
below 1. The file loads without an error, and the reply is noise or NaN.

Do: convert again with a tool that multiplies by the scales, such as `doctor convert` on the FP8 checkpoint.

False alarms: a trained weight whose largest value is exactly 448.

Fix safety: no fix: the scales are not in the files.

Sources: the OCP 8-bit floating point specification 1.0; deepseek-ai/DeepSeek-V3 inference/fp8_cast_bf16.py.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import encode, np, tiny

END = 448.0  # the largest E4M3
WIDE = ("F16", "BF16", "F32")


@rule("O658", "warning", certainty="likely", implied_by=("O650", "O622", "O611"))
def codes_without_scales(tensor, absmax, numel):
    matrix = tensor.name.endswith(".weight") and len(tensor.shape) == 2
    if absmax == END and matrix and tensor.dtype.name in WIDE:
        yield finding(
            _(
                "the largest of {numel:,} weights in {tensor} is exactly 448, where 8-bit floats end: a scale is missing",
                numel=numel,
                tensor=tensor.name,
            ),
            evidence={"absmax": absmax, "numel": numel},
            advice=_("convert the FP8 checkpoint again, with its scales"),
        )


def bad():
    case = tiny()
    name = case.name("down")
    shape = case.tensors[name].shape
    values = np.random.default_rng(3).uniform(-448, 448, shape)
    values[0, 0] = 448
    case.tensors[name] = encode(values, case.dtypes.get(name, "BF16"))
    return case, (
        f"the largest of {values.size:,} weights in {name} is exactly 448, where 8-bit floats end: a scale is missing"
    )


def good():
    return tiny()
