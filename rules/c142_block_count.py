"""C142 block-count: num_hidden_layers does not match the weights.

Why: with fewer decoder layers in the files, the rest starts from random numbers. With more, the surplus is silently
dropped and the model ends too early. Both run, and both generate nonsense.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- llama.cpp: `error loading model: missing tensor 'blk.`

Do: fetch the missing shard; or, if layers were removed or added on purpose, write their number into config.json.

False alarms: layers for multi-token prediction after the last one (DeepSeek V3, GLM) are known and not counted. A model
with several stacks of layers is not judged if its family is unknown.

Fix safety: unsafe: the number in the files is right only if no file is missing.

Sources: transformers src/transformers/modeling_utils.py; deepseek-ai/DeepSeek-V3 README_WEIGHTS.md.
"""

from doctor.lint.rule import LOST_DATA, Fix, Place, SetJson, _, finding, plural, ranges, rule
from doctor.lint.testing import tiny

# Most layers that are searched one by one: no model has more, and a config that states 2**39 must not fill memory.
MOST = 10_000
AHEAD = ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens")


@rule("C142", "error", implied_by=(*LOST_DATA, "F061", "F062", "F063", "C147", "O620"))
def block_count(checkpoint, placement, config):
    spec, blocks = placement.spec, placement.blocks
    if spec.n_layers is None or (spec.family is None and _stacks(spec) > 1):
        return
    lacking = [b for b in range(min(spec.n_layers, MOST)) if b not in blocks]
    ahead = config.get("num_nextn_predict_layers") or spec.config.get("num_nextn_predict_layers")
    extra = [
        b for b in blocks if b >= spec.n_layers and not ahead and not any(tail.startswith(AHEAD) for tail in blocks[b])
    ]
    if not lacking and not extra:
        return
    key = spec.key_for("num_hidden_layers")
    pointer = spec.at(key)
    have = len(blocks) if not lacking else len([b for b in blocks if b < spec.n_layers])
    layers = f"{placement.stem.rstrip('.')}.{ranges(lacking or extra)}"
    whole = sorted(blocks) == list(range(len(blocks)))
    edit = SetJson("config.json", pointer, have, spec.config.get(key))
    yield finding(
        plural(
            "{key} is {stated} in config.json; the files hold {n} decoder layer: {layers} is in no file",
            "{key} is {stated} in config.json; the files hold {n} decoder layers: {layers} is in no file",
            have,
            key=key,
            stated=spec.n_layers,
            layers=layers,
        )
        if lacking
        else plural(
            "{key} is {stated} in config.json; the files hold {n} decoder layer: {layers} would be dropped",
            "{key} is {stated} in config.json; the files hold {n} decoder layers: {layers} would be dropped",
            have,
            key=key,
            stated=spec.n_layers,
            layers=layers,
        ),
        at=Place("config.json", pointer=pointer, note=_("{count} in the files", count=have)),
        evidence={"stated": spec.n_layers, "files": have},
        fix=Fix(_('set "{key}": {value}', key=key, value=have), (edit,), "unsafe")
        if whole and have and key in spec.config
        else Fix(_("fetch the shard that holds the missing decoder layers"), (), "manual"),
    )


def _stacks(spec):
    """Number of stacks of decoder layers that hold linears. If an unknown family has several, nothing shows which stack
    the count in config.json belongs to.
    """
    return len({x.name.partition(f".{x.block}.")[0] for x in spec.linears if x.block is not None})


def bad():
    case = tiny()
    key = next(k for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in case.config)
    case.config[key] = 3
    stem = case.name("down").partition(".0.")[0]
    return case, f"{key} is 3 in config.json; the files hold 2 decoder layers: {stem}.2 is in no file"


def good():
    return tiny()
