"""F061 missing-prefix: tensor names lack the class's prefix, or have another.

Why: readers look for the names of the class that config.json states. A checkpoint saved from the inner model lacks
`model.`. transformers adds a base model's prefix by itself; vLLM and SGLang take names as they are and stop, and so do
converters of llama.cpp. Of a prefix too many (`language_model.`, `base_model.model.`) transformers finds no weight
either, and initializes the model with random numbers.

Seen as:
- llama.cpp: `Can not map tensor 'embed_tokens.weight'`
- llama.cpp: `Can not map tensor 'layers.`
- vLLM: `There is no module or parameter named 'layers'`
- vLLM: `There is no module or parameter named 'embed_tokens'`
- vLLM: `There is no module or parameter named 'language_model'`
- vLLM: `There is no module or parameter named 'base_model'`
- SGLang: `KeyError: 'layers.0`

Do: rename the tensors. Or save the model with its head (`model.save_pretrained`, not `model.model.save_pretrained`).

False alarms: none known. A class that is the bare model (`LlamaModel`), an embedding model and custom code are not
judged, nor are multimodal classes of which no table has the prefixes. GPT-2, BLOOM and OPT are read in both forms.

Fix safety: safe: only names change, no value does. Manual where two tensors would get one name, and where config.json
names a multimodal class for a text model: the class is wrong then, and the names are right.

Sources: transformers src/transformers/core_model_loading.py, `rename_source_key` (base_model_prefix); vllm-project/vllm
vllm/model_executor/models/utils.py, `AutoWeightsLoader`, and adapters.py (pooling models take both forms);
ggml-org/llama.cpp gguf-py/gguf/tensor_mapping.py and issue 9211.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, RenameTensor, _, finding, rule, wrong_prefix
from doctor.lint.testing import never_in, tiny

# Files of a sentence-transformers model: its readers build the bare model, whatever class config.json states.
EMBEDDER = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


@rule("F061", "error", implied_by=("F057", "F058"))
def missing_prefix(checkpoint, spec, tensors, config, recipe, files=None):
    found = wrong_prefix(spec, tensors, config)
    if found is None or (found.missing and any(name in (files or ()) for name in EMBEDDER)):
        return
    first = min(found.names)
    values = {
        "count": len(found.names),
        "total": len(tensors),
        "architecture": spec.architecture,
        "want": found.want,
        "first": first,
    }
    if found.missing and not found.added:
        text = _(
            "{count:,} of {total:,} tensor names lack the prefix {want!r} of {architecture}; the first is {first}",
            **values,
        )
    elif found.missing:
        text = _(
            "{count:,} of {total:,} tensor names lack the prefix {want!r} of {architecture}, which transformers adds "
            "by itself and vLLM and SGLang do not; the first is {first}",
            **values,
        )
    elif found.extra:
        text = _(
            "{count:,} of {total:,} tensor names have the prefix {extra!r}, which {architecture} does not take; "
            "the first is {first}",
            extra=found.extra,
            **values,
        )
    else:
        text = _(
            "{count:,} of {total:,} tensor names have the prefix {have!r} in place of {want!r} of {architecture}; "
            "the first is {first}",
            have=found.have,
            **values,
        )
    forgiven = found.added and (
        found.missing or found.extra == found.want
    )  # transformers adds it, and drops a second one
    yield finding(
        text,
        at=Place(tensors[first].shard, tensor=first),
        severity="info" if forgiven and recipe.runtime == "transformers" else "",
        evidence={"tensors": len(found.names), "have": found.have, "want": found.want},
        fix=_rename(found, tensors, checkpoint.index),
    )


def _rename(found, tensors, index):
    """The right name for each tensor, unless two would get the same one, or the class is wrong rather than the names."""
    if found.towerless:
        title = _("name the text model's class and model_type in config.json: no tensor of another part is here")
        return Fix(title, (), "manual")
    others = tensors.keys() - found.names.keys()
    if len(set(found.names.values())) < len(found.names) or not others.isdisjoint(found.names.values()):
        return Fix(_("save the model with its head: after a renaming two tensors would have one name"), (), "manual")
    edits = tuple(RenameTensor(old, new) for old, new in found.names.items())
    title = _("rename the tensors to the names of the class")
    return Fix(title, (*edits, RebuildIndex()) if index is not None else edits)


def bad():
    never_in("opt", why="its readers take both forms")
    case = tiny()
    total = len(case.tensors)
    names = [n for n in case.tensors if n.startswith("model.")]
    for name in names:
        bare = name.removeprefix("model.")
        case.tensors[bare], case.dtypes[bare] = case.tensors.pop(name), case.dtypes.pop(name)
    first = min(n.removeprefix("model.") for n in names)
    architecture = case.config["architectures"][0]
    return case, (
        f"{len(names)} of {total} tensor names lack the prefix 'model.' of {architecture}, which transformers adds "
        f"by itself and vLLM and SGLang do not; the first is {first}"
    )


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    never_in("opt", why="its readers take both forms")
    for prefix in ("language_model.", "base_model.model.", "model.language_model."):
        case = tiny()
        inner = prefix.startswith("model.")
        old = list(case.tensors)
        for name in old:
            new = name.replace("model.", prefix, 1) if inner else prefix + name
            case.tensors[new], case.dtypes[new] = case.tensors.pop(name), case.dtypes.pop(name)
        yield case
