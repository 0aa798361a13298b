"""F021 no-weights: no weight file.

Why: there is nothing to quantize. Often only the configuration was fetched, or the weights are one directory deeper.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- vLLM: `Cannot find any model weights with`

Do: fetch the *.safetensors files, or pass the directory that holds them.

False alarms: directories that hold only a configuration on purpose.

Fix safety: unsafe, and only with `--from`: the donor's weights are its own, not those of a fine-tune. Else manual.

Sources: transformers src/transformers/modeling_utils.py; vllm-project/vllm
vllm/model_executor/model_loader/default_loader.py.
"""

from doctor.lint.rule import Fix, Place, _, finding, rule
from doctor.lint.testing import tiny

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
INDEX = "model.safetensors.index.json"


@rule("F021", "error", implied_by=("F010", "F019", "F020", "F024", "G330"))
def no_weights(checkpoint, files, shards, base):
    if any(name.endswith(WEIGHTS) for name in files):
        return
    yield finding(
        _("none of {count} files holds weights", count=len(files)),
        at=Place("model.safetensors"),
        evidence={"files": len(files)},
        fix=_from_base(base),
    )


def _from_base(base):
    """All weight files of the donor and their index."""
    names = [*base.checkpoint.shards, INDEX] if base is not None else []
    offers = [offer for offer in map(base.offer_file, names) if offer is not None] if names else []
    if not names or len(offers) < len(base.checkpoint.shards):
        return Fix(_("fetch the model's *.safetensors files"), (), "manual")
    return Fix(_("take the weights from {base}", base=base.text), tuple(edit for edit, _why in offers), "unsafe")


def bad():
    case = tiny()
    case.damage.append(lambda folder: (folder / "model.safetensors").unlink())
    return case, "none of 4 files holds weights"


def good():
    return tiny()
