"""F060 cut-width: MLP is narrower than the published model: columns were cut off.

Why: a width that groups or GPUs cannot divide is fixed by zero-padding, which changes no output. Cutting columns to the
next smaller multiple removes hidden units from every decoder layer. The files are consistent, load and quantize, but
the model generates nonsense.

Do: take the original weights and pad them: `doctor fix` offers this with G302 (29568 becomes 29696 for 2 to 8 GPUs at
group size 128).

False alarms: a model whose MLP was pruned by less than 3 per cent on purpose and then trained further. A wider MLP is
never reported: it is padding.

Fix safety: unsafe, with `--from`: where every MLP here is bit-identical to the first part of the donor's, the donor's
are used. Else manual: what was cut off is not in these files.

Sources: QwenLM/Qwen3-VL issue 231 (29568 cut to 29440); rules/tables/published.toml.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, plural, rule, size_key
from doctor.lint.testing import NotHere, np, tiny

# smallest share of the published width that counts as a cut; below it, it is another model, or one pruned on purpose
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
        plural(
            "the MLP width is {width}; published models of hidden size {hidden} and {layers} decoder layers have {whole}: "
            "{n} column is missing",
            "the MLP width is {width}; published models of hidden size {hidden} and {layers} decoder layers have {whole}: "
            "{n} columns are missing",
            whole - width,
            width=width,
            hidden=spec.hidden,
            layers=spec.n_layers,
            whole=whole,
        ),
        at=Place("config.json", pointer=spec.at(key) if key else None),
        evidence={"width": width, "published": whole},
        fix=(key and base and _from_base(base, tensors, spec.at(key), width, whole))
        or Fix(_("take the original weights; pad, never cut"), (), "manual"),
    )


def _from_base(base, tensors, pointer, width, whole):
    """Fix that takes the donor's wider tensors if those here are their first part; None where one is not."""
    edits = []
    for name, info in tensors.items():
        theirs = base.checkpoint.tensors.get(name)
        if theirs is None:
            return None
        if theirs.shape == info.shape:
            continue
        axis = next((i for i, (a, b) in enumerate(zip(info.shape, theirs.shape, strict=False)) if a != b), 0)
        blocks = next((n for n in (1, 2) if (info.shape[axis], theirs.shape[axis]) == (n * width, n * whole)), 0)
        edit = base.offer(name, info.dtype.name, theirs.shape) if blocks and base.begins(info, axis, blocks) else None
        if edit is None:
            return None
        edits.append(edit)
    if not edits:
        return None
    title = plural(
        "take the {n} tensor from {base}: what is here is the first {width} of its {whole} columns, bit by bit",
        "take the {n} tensors from {base}: what is here is the first {width} of their {whole} columns, bit by bit",
        len(edits),
        base=base.text,
        width=width,
        whole=whole,
    )
    return Fix(title, (*edits, SetJson("config.json", pointer, whole, width)), "unsafe")


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
    return case, (
        "the MLP width is 320; published models of hidden size 64 and 2 decoder layers have 328: 8 columns are missing"
    )


def good():
    return tiny(mlp=352)


def donor():
    """The checkpoint of --from that has the full width."""
    return tiny(mlp=352)


def more():
    """Cases whose fixes the example above does not show."""
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
