"""F065 unsought-file-name: no weight file has a name that transformers looks for.

Why: transformers opens model.safetensors, or the files of model.safetensors.index.json, and nothing else; llama.cpp's
converter takes files that begin with "model". vLLM and SGLang open every .safetensors file. So one program loads the
directory and another says that it holds no weights.

Seen as:
- transformers: `no file named model.safetensors, or pytorch_model.bin`
- transformers: `does not appear to have a file named`

Do: rename the file to model.safetensors. `doctor quantize` reads it as it is, and writes the usual names.

False alarms: directories that only vLLM or SGLang reads. Mistral's consolidated.safetensors has readers of its own and is
not counted.

Fix safety: safe for one file: it is renamed. Several files need an index: manual.

Sources: transformers src/transformers/modeling_utils.py, `_get_resolved_checkpoint_files`; ggml-org/llama.cpp
convert_hf_to_gguf.py, `get_model_part_names`.
"""

from doctor.lint.rule import Fix, Place, RenameFile, _, finding, listed, rule
from doctor.lint.testing import tiny

WANTED = "model.safetensors"
SOUGHT = (
    WANTED,
    f"{WANTED}.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OWN = (
    "consolidated",
    "adapter_",
    "diffusion_pytorch_model",
    "model-00001-of-",
)  # names that other readers or rules know


@rule("F065", "warning", implied_by=("F010", "F015", "F018", "F021", "F022", "F028", "G330"))
def unsought_file_name(checkpoint, files, shards):
    if checkpoint.only or any(name in files for name in SOUGHT):
        return
    held = sorted(name for name, shard in shards.items() if shard.tensors)
    if not held or any(name.startswith(OWN) for name in held):
        return
    yield finding(
        _("the weights are in {files}; transformers looks for {wanted}", files=listed(held[:4]), wanted=WANTED),
        at=Place(held[0]),
        evidence={"files": len(held)},
        fix=Fix(_("rename it to {wanted}", wanted=WANTED), (RenameFile(held[0], WANTED),))
        if len(held) == 1
        else Fix(_("save them with an index, as save_pretrained does"), (), "manual"),
    )


def bad():
    case = tiny()
    case.damage.append(lambda folder: (folder / WANTED).rename(folder / "weights.safetensors"))
    return case, "the weights are in weights.safetensors; transformers looks for model.safetensors"


def good():
    return tiny()
