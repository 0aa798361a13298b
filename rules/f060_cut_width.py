"""F060 cut-width: the MLP is a little narrower than the published model of the same sizes: somebody cut the weights to
fit.

Why: a width that groups or GPUs cannot share is cured by padding with zeros, which changes nothing. Cutting columns to
the next smaller multiple takes hidden units away from every block; the files are consistent, load and quantize, and the
model talks nonsense.

Do: take the original weights and pad them up: `doctor fix` offers it with G302 (29568 becomes 29696 for 2 to 8 GPUs at
group size 128).

False alarms: a model whose MLP was pruned by under 3 per cent on purpose and trained on since. Wider is never said:
that is padding.

Fix safety: unsafe, with `--from`: where every MLP here is the first part of the base's, bit by bit, the base's are
taken whole. Else manual: what was cut off is not in these files.

Sources: QwenLM/Qwen3-VL issue 231 (29568 cut to 29440); rules/tables/published.toml.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule, size_key
from doctor.lint.testing import NotHere, np, tiny

# least share of the published width that is still a cut to fit; below, it is another model, or one pruned on purpose
CUT = 0.97


@rule("F060", "warning", certainty="likely", implied_by=("F051",))
def cut_width(checkpoint, spec, published, tensors, base):
    widths = {x.in_features: x for x in spec.linears if x.role == "down" and x.expert is None}
    if len(widths) != 1:
        return
    width, linear = next(iter(widths.items()))
    known = sorted(
        w for row in published["width"] if tuple(row[:3]) == (spec.hidden, spec.n_layers, spec.vocab) for w in row[3:]
    )
    if width in known:
        return
    whole = next((w for w in known if CUT * w <= width < w), None)
    if whole is None:
        return
    key = size_key(spec, linear.name, 1)
    yield finding(
        f"the MLPs are {width} wide; published models of hidden size {spec.hidden} and {spec.n_layers} blocks have {whole}: "
        f"{whole - width} columns are gone",
        at=Place("config.json", pointer=spec.at(key) if key else None),
        evidence={"width": width, "published": whole},
        fix=(key and base and _from_base(base, tensors, spec.at(key), width, whole))
        or Fix("take the original weights; pad, never cut", (), "manual"),
    )


def _from_base(base, tensors, pointer, width, whole):
    """The tensors of the base that are wider, if what is here is their first part; None where one is not."""
    edits = []
    for name, info in tensors.items():
        theirs = base.checkpoint.tensors.get(name)
        if theirs is None:
            return None
        if theirs.shape == info.shape:
            continue
        axis = next((i for i, (a, b) in enumerate(zip(info.shape, theirs.shape)) if a != b), 0)
        blocks = next((n for n in (1, 2) if (info.shape[axis], theirs.shape[axis]) == (n * width, n * whole)), 0)
        edit = base.offer(name, info.dtype.name, theirs.shape) if blocks and base.begins(info, axis, blocks) else None
        if edit is None:
            return None
        edits.append(edit)
    title = f"take the {len(edits)} tensors from {base.text}: what is here is the first {width} of their {whole} columns, bit by bit"
    return Fix(title, (*edits, SetJson("config.json", pointer, whole, width)), "unsafe") if edits else None


def bad():
    case = tiny(mlp=320)
    spec = case.spec
    if {x.in_features for x in spec.linears if x.role == "down" and x.expert is None} != {320} or (
        spec.hidden,
        spec.n_layers,
        spec.vocab,
    ) != (64, 2, 96):
        raise NotHere("the width of this family's MLPs follows from its hidden size, or all of them are experts")
    case.put("checkpoint:", "given_published", {"width": [[64, 2, 96, 328]]})
    return case, "the MLPs are 320 wide; published models of hidden size 64 and 2 blocks have 328: 8 columns are gone"


def good():
    return tiny(mlp=352)


def donor():
    """What the cut is undone with."""
    return tiny(mlp=352)


def more():
    """Cases whose cures the example above does not show."""
    for family in ("llama", "phi3"):
        case = tiny(family, mlp=352)
        for name in [n for n in case.tensors if ".mlp." in n]:
            codes = case.tensors[name]
            case.tensors[name] = np.ascontiguousarray(
                codes[:, :344] if "down" in name else codes.reshape(-1, 352, 64)[:, :344].reshape(-1, 64)
            )
        case.config["intermediate_size"] = 344
        case.put("checkpoint:", "given_published", {"width": [[64, 2, 96, 352]]})
        yield case
