"""O647 exl2-groups-unsound: groups of an EXL2 linear are not in the order that its kernels need.

Why: q_groups says which rows of q_weight have how many bits. ExLlamaV2's loader checks shapes alone, and its kernels take
for granted that wider groups come first, that every group holds whole blocks of 32 input channels (16 with 2 bits) and
that widths are 2, 3, 4, 5, 6 or 8. Where that does not hold they compute wrong numbers without an error.

Do: download the shard again; a file that was made so must be quantized again.

False alarms: none known.

Fix safety: no fix: where the codes of a group begin cannot be told from the codes.

Sources: turboderp/exllamav2 0.3.2 exllamav2/linear.py, exllamav2_ext/ext_qmatrix.cpp (make_group_map),
exllamav2_ext/cuda/q_gemm.cu.
"""

from doctor.lint.rule import _, exl2_defects, finding, rule
from doctor.lint.testing import np, tiny

_PART = ".q_groups"


@rule("O647", "error")
def exl2_groups_unsound(tensor, stored_bytes, tensors):
    module = tensor.name.removesuffix(_PART)
    words = tensors.get(f"{module}.q_weight")
    if not tensor.name.endswith(_PART) or words is None or len(words.shape) != 2:
        return
    defects = list(exl2_defects(stored_bytes, words.shape[0]))
    if defects:
        number, reason = defects[0]
        yield finding(
            _(
                "{linear}: group {number} of {groups} {reason}",
                linear=module,
                number=number,
                groups=len(stored_bytes) // 4,
                reason=reason,
            ),
            evidence={"groups": [n for n, _reason in defects]},
            advice=_("copy the shard again from its source, or quantize the original again"),
        )


def tiny_exl2(groups):
    """A tiny checkpoint whose linears are EXL2 in groups of 32 input channels of 4 bits. groups: (number, bits) of one
    group that says another width.
    """
    case = tiny()
    down = case.name("down")
    rng = np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = linear.out_features, linear.in_features
        del case.tensors[linear.tensor]
        case.dtypes.pop(linear.tensor, None)
        count = k // 32
        pairs = [(4, 4 * at) for at in range(count)]
        if groups and linear.tensor == down:
            pairs[groups[0]] = (groups[1], pairs[groups[0]][1])
        parts: dict[str, tuple[np.ndarray, str]] = {
            "q_weight": (rng.integers(-(1 << 31), 1 << 31, (k // 8, n), np.int64).astype(np.int32), "I32"),
            "q_scale": (rng.integers(0, 1 << 30, (count, n // 8), np.int64).astype(np.int32), "I32"),
            "q_scale_max": (np.full(count, 0.01, np.float16).view(np.uint16), "F16"),
            "q_groups": (np.array(pairs, np.int16).reshape(-1), "I16"),
            "q_invperm": (rng.permutation(k).astype(np.int32), "I32"),
        }
        for part, (values, dtype) in parts.items():
            case.tensors[f"{linear.name}.{part}"], case.dtypes[f"{linear.name}.{part}"] = values, dtype
    case.config["quantization_config"] = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 6}
    return case


def bad():
    case = tiny_exl2((0, 2))
    module = tiny().name("down").removesuffix(".weight")
    return case, f"{module}: group 1 of {_count(case, module)} has 4 bits after one of 2; wider ones come first"


def good():
    return tiny_exl2(())


def _count(case, module):
    return len(case.tensors[f"{module}.q_groups"]) // 2
