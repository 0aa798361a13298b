"""F064 fused-linears: one tensor holds several linears that the class stores apart.

Why: training programs and other families keep query, key and value, or gate and up, as one matrix. Readers of this class
look for each by its own name, find none, and start them from random numbers or stop.

Seen as:
- transformers: `were not initialized from the model checkpoint`
- vLLM: `There is no module or parameter named`

Do: convert the model with the program that saved it, or name the class that stores them so. Rows alone do not say their
order: some programs keep the rows of each key/value head together, query first.

False alarms: none known. Classes whose own names are the fused ones, and custom code, are not judged.

Fix safety: manual: in which order the rows stand is not in the file.

Sources: NVIDIA/Megatron-LM linear_qkv (rows by key/value group); transformers
src/transformers/models/phi3/modeling_phi3.py (qkv_proj: all query rows first).
"""

import re

from doctor.lint.rule import Fix, Place, _, finding, listed, plural, rule
from doctor.lint.testing import never_in, tiny

FUSED = re.compile(
    r"(^|[._])(qkv|qkv_proj|query_key_value|W_pack|Wqkv|c_attn|gate_up_proj|gate_up|linear_qkv|wqkv)\.weight$"
)
ROLES = (("q", "k", "v"), ("gate", "up"))


@rule("F064", "error", implied_by=("F057", "F058", "F061", "F063", "C147", "O620"))
def fused_linears(checkpoint, placement, config):
    spec = placement.spec
    if spec.family is None or config.get("auto_map") or placement.words:
        return
    apart = {t.role: t for t in spec.templates if "{i}" in t.tensor and "{e}" not in t.tensor and len(t.shape) == 2}
    found: dict[tuple[str, ...], list] = {}
    for block in placement.counted:
        own = placement.blocks[block]
        for tail, info in own.items():
            if not FUSED.search(tail) or placement.template_of(info.name) is not None or len(info.shape) != 2:
                continue
            for roles in ROLES:
                if not all(r in apart for r in roles):
                    continue
                parts = [placement.name(block, apart[r].tensor.partition("{i}.")[2]) for r in roles]
                shapes = [spec.expected_shape(n) for n in parts]
                absent = not any(n.removeprefix(placement.stem).partition(".")[2] in own for n in parts)
                if absent and all(shapes) and info.shape == (sum(s[0] for s in shapes), shapes[0][1]):
                    found.setdefault(roles, []).append((info, parts))
    for held in found.values():
        info, parts = held[0]
        yield finding(
            plural(
                "{n:,} tensor holds what {architecture} stores apart, {first} {shape}: {parts}",
                "{n:,} tensors hold what {architecture} stores apart, such as {first} {shape}: {parts}",
                len(held),
                first=info.name,
                shape=list(info.shape),
                architecture=spec.architecture,
                parts=listed(parts),
            ),
            at=Place(info.shard, tensor=info.name),
            evidence={"tensors": len(held)},
            fix=Fix(_("convert it with the program that saved it: rows alone do not say their order"), (), "manual"),
        )


def bad():
    never_in("phi3", "opt", "gpt2", "bloom", "falcon", why="it has no query, key and value apart under these names")
    import numpy as np

    case = tiny()
    spec, first = case.spec, ""
    for layer in (0, 1):
        names = [case.name(role, layer) for role in ("q", "k", "v")]
        fused = names[0].replace("q_proj", "qkv_proj")
        case.tensors[fused] = np.concatenate([case.tensors.pop(n) for n in names])
        case.dtypes[fused] = case.dtypes[names[0]]
        for name in names:
            del case.dtypes[name]
        first = first or f"{fused} {list(case.tensors[fused].shape)}: {names[0]}, {names[1]} and {names[2]}"
    return case, f"2 tensors hold what {spec.architecture} stores apart, such as {first}"


def good():
    return tiny()
