"""C142 block-count: config.json counts other decoder blocks than the weight files hold.

Why: with fewer blocks in the files, the rest starts from random numbers; with more, the surplus is dropped without a
word and the model ends too early. Both run, and both speak nonsense.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- llama.cpp: `error loading model: missing tensor 'blk.`

Do: fetch the absent shard; or, if blocks were cut or added on purpose, write their number into config.json.

False alarms: blocks for multi-token prediction behind the last one (DeepSeek V3, GLM) are known and not counted. A
model of several stacks of blocks is not judged where its family is unknown.

Fix safety: unsafe: the number in the files is right only if no file is missing.

Sources: transformers src/transformers/modeling_utils.py; deepseek-ai/DeepSeek-V3 README_WEIGHTS.md.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, ranges, rule
from doctor.lint.testing import tiny

FILES = ("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F010", "F011", "F018", "F019", "F020", "C147")
# blocks that are looked for one by one: no model has more, and a config that says 2**39 must not fill memory
MOST = 10_000
AHEAD = ("eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens")


@rule("C142", "error", implied_by=FILES)
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
    stem = placement.stem.rstrip(".")
    what = f"{stem}.{ranges(lacking)} is in no file" if lacking else f"{stem}.{ranges(extra)} would be dropped"
    whole = sorted(blocks) == list(range(len(blocks)))
    edit = SetJson("config.json", pointer, have, spec.config.get(key))
    yield finding(
        f"{key} is {spec.n_layers} in config.json; the files hold {have} blocks: {what}",
        at=Place("config.json", pointer=pointer, note=f"{have} in the files"),
        evidence={"stated": spec.n_layers, "files": have},
        fix=Fix(f'set "{key}": {have}', (edit,), "unsafe")
        if whole and have and key in spec.config
        else Fix("fetch the shard that holds the absent blocks", (), "manual"),
    )


def _stacks(spec):
    """Rows of numbered blocks that hold linears. Where a family no table knows has several, no count says which of them
    it is of.
    """
    return len({x.name.partition(f".{x.block}.")[0] for x in spec.linears if x.block is not None})


def bad():
    case = tiny()
    key = next(k for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in case.config)
    case.config[key] = 3
    stem = case.name("down").partition(".0.")[0]
    return case, f"{key} is 3 in config.json; the files hold 2 blocks: {stem}.2 is in no file"


def good():
    return tiny()
