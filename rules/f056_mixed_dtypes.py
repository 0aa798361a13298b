"""F056 mixed-dtypes: linears of one kind have different dtypes.

Why: most readers cast all of them to one dtype, so part of the model silently loses or gains precision. Readers that do
not cast stop at the first product of two dtypes. A merge or a partial save causes this.

Seen as:
- PyTorch: `expected scalar type Half but found BFloat16`
- PyTorch: `expected mat1 and mat2 to have the same dtype`
- PyTorch: `expected m1 and m2 to have the same dtype`

Do: cast to the dtype that most of them have. Where that is float16, check W205 first: values beyond 65,504 would become
Inf.

False alarms: norms, routers and heads are often kept in float32 on purpose and are not counted; only linears of the
same kind are compared.

Fix safety: safe where the new dtype can hold every value exactly (to float32); else unsafe, because a cast rounds. A
cast that would turn a finite value into Inf is refused with the numbers.

Sources: transformers src/transformers/modeling_utils.py: one dtype per model.
"""

from doctor.lint.rule import CastTensor, Fix, Place, _, finding, rule, widens
from doctor.lint.testing import encode, tiny

CASTS = {"F16", "BF16", "F32"}


@rule(
    "F056",
    "warning",
    implied_by=(
        "C147",
        "O620",
    ),
)
def mixed_dtypes(checkpoint, spec, tensors):
    kinds: dict[str, dict[str, list]] = {}
    for linear in spec.linears:
        info = tensors[linear.tensor]
        if info.dtype.is_float and info.dtype.bits >= 16:
            kinds.setdefault(linear.role, {}).setdefault(info.dtype.name, []).append(info)
    for role, by_dtype in kinds.items():
        if len(by_dtype) < 2 or role == "other":
            continue
        total = sum(map(len, by_dtype.values()))
        main = max(by_dtype, key=lambda d: len(by_dtype[d]))
        for dtype, infos in by_dtype.items():
            for info in infos if dtype != main else ():
                yield finding(
                    _(
                        "{tensor} is {dtype}; {count} of {total} {role} linears are {main}",
                        tensor=info.name,
                        dtype=dtype,
                        count=len(by_dtype[main]),
                        total=total,
                        role=role,
                        main=main,
                    ),
                    at=Place(info.shard, tensor=info.name),
                    evidence={"dtype": dtype, "most": main},
                    fix=_cast(info, main),
                )


def _cast(info, main):
    if not {info.dtype.name, main} <= CASTS:
        return Fix(_("save the model again in one type"), (), "manual")
    return Fix(
        _("cast to {dtype}", dtype=main),
        (CastTensor(info.name, main),),
        "safe" if widens(info.dtype.name, main) else "unsafe",
        needs=("W205",) if main == "F16" else (),
    )


def bad():
    import numpy as np

    case = tiny()
    name = case.name("down", 1)
    case.tensors[name] = encode(np.random.default_rng(3).normal(0, 0.08, case.tensors[name].shape), "F32")
    case.dtypes[name] = "F32"
    total = sum("down_proj" in n or n.endswith("fc2.weight") for n in case.tensors)
    return case, f"{name} is F32; {total - 1} of {total} down linears are BF16"


def good():
    return tiny()
