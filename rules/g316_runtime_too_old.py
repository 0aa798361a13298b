"""G316 runtime-too-old: runtime version is too old for this model type.

Why: runtimes add model types one by one. An older version refuses the checkpoint when it loads it, after hours of
quantizing.

Seen as:
- transformers: `Unrecognized configuration class`
- transformers: `does not recognize this architecture`
- transformers: `does not recognize this architecture. This could be because of an issue with the checkpoint, or because your version of Transformers is out of date.`
- vLLM: `are not supported for now. Supported architectures:`
- transformers: `KeyError: 'qwen3'`
- transformers: `KeyError: 'qwen2'`

Do: install the version that the message names, or a newer one.

False alarms: a runtime with code from a plugin. Where config.json refers to code of its own (auto_map), transformers is
not judged; nor are model types that the table lacks.

Fix safety: no fix: the files are correct.

Sources: rules/tables/published.toml; huggingface/transformers src/transformers/models/auto/configuration_auto.py.
"""

from doctor.lint.rule import Place, Unavailable, _, finding, rule, version_before
from doctor.lint.testing import only_in, tiny


@rule("G316", "error")
def runtime_too_old(checkpoint, spec, config, recipe, published):
    if not recipe.runtime_version:
        raise Unavailable(_("no runtime version was given: use --runtime NAME==VERSION"))
    types = [spec.model_type, str(config.get("model_type") or "")]
    first = next((v for t in types if (v := published["since"].get(recipe.runtime, {}).get(t))), None)
    if (
        first is None
        or not version_before(recipe.runtime_version, first)
        or (recipe.runtime == "transformers" and config.get("auto_map"))
    ):
        return
    yield finding(
        _(
            "{runtime} {version} does not know {model_type} models; {first} is the first version that does",
            runtime=recipe.runtime,
            version=recipe.runtime_version,
            model_type=spec.model_type,
            first=first,
        ),
        at=Place("config.json", pointer="/model_type"),
        advice=_("install {runtime} {version} or newer", runtime=recipe.runtime, version=first),
        evidence={"runtime": recipe.runtime, "version": recipe.runtime_version, "first": first},
    )


def bad():
    family = only_in(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma2",
        "phi3",
        "mixtral",
        "olmo2",
        why="the table has no first version for it",
    )
    case = tiny(family)
    case.recipe = case.recipe.with_field("runtime", "transformers").with_field("runtime_version", "4.27.0")
    first = {
        "llama": "4.28.0",
        "qwen2": "4.37.0",
        "qwen3": "4.51.0",
        "mistral": "4.34.0",
        "gemma2": "4.42.0",
        "phi3": "4.41.0",
        "mixtral": "4.36.0",
        "olmo2": "4.47.0",
    }[family]
    return case, f"transformers 4.27.0 does not know {family} models; {first} is the first version that does"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "transformers").with_field("runtime_version", "5.0.0")
    return case
