"""F072 gguf-shard-missing: shards of a GGUF model are not there, or disagree.

Why: llama.cpp opens the first shard and looks for the others by their names; it stops where one lacks, or where the
shards state another number of tensors than they hold.

Seen as:
- llama.cpp: `failed to load GGUF split from`

Do: download the missing shards into the same directory, under the names that they were made with.

False alarms: none known.

Fix safety: manual; the shards are elsewhere.

Sources: ggml-org/llama.cpp src/llama-model-loader.cpp (split.no, split.count, split.tensors.count).
"""

from doctor.lint.rule import Place, _, finding, listed, rule
from doctor.lint.testing import tiny_gguf


@rule("F072", "error")
def gguf_shard_missing(checkpoint, gguf_models):
    for model in gguf_models:
        first = model.files[0]
        if model.missing:
            yield finding(
                _(
                    "{model}: {n} of {count} shards are missing: {names}",
                    model=model.name,
                    n=len(model.missing),
                    count=len(model.missing) + len(model.files),
                    names=listed(model.missing[:5]),
                ),
                at=Place(first.name),
                evidence={"missing": list(model.missing[:100])},
                advice=_("download them into the same directory"),
            )
            continue
        stated, held = model.metadata.get("split.tensors.count"), sum(len(f.tensors) for f in model.files)
        if len(model.files) > 1 and model.whole and stated is not None and stated != held:
            yield finding(
                _(
                    "{model}: states {stated} tensors, its shards hold {held}",
                    model=model.name,
                    stated=stated,
                    held=held,
                ),
                at=Place(first.name),
                evidence={"stated": stated, "held": held},
                advice=_("download the shards again, all from one conversion"),
            )


def bad():
    case = tiny_gguf()
    case.name = "model-00001-of-00002.gguf"
    return case, "model-of-00002.gguf: 1 of 2 shards are missing: model-00002-of-00002.gguf"


def good():
    return tiny_gguf()
