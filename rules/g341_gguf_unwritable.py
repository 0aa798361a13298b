"""G341 gguf-unwritable: the model cannot be written as GGUF here.

Why: GGUF has names, an order of rows and metadata of its own for every architecture. Written for one that is not known,
a file loads nowhere, or loads and computes nonsense.

Do: convert it with llama.cpp's own converter, or choose another format.

False alarms: an architecture that llama.cpp reads and that is not in the table yet.

Fix safety: manual; the format must be chosen anew.

Sources: rules/tables/gguf.toml.
"""

from doctor.lint.rule import Place, Unavailable, _, finding, format_of, rule, unwritable
from doctor.lint.testing import Recipe, only_in, tiny


@rule("G341", "error")
def gguf_unwritable(checkpoint, config, recipe, goal):
    if goal != "quantize" or not format_of(recipe).in_blocks:
        raise Unavailable(_("the recipe writes no GGUF"))
    reason = unwritable(config)
    if reason:
        yield finding(
            _("config.json: {reason}", reason=reason),
            at=Place("config.json", "/architectures"),
            advice=_("choose another format, or convert it with llama.cpp's own converter"),
        )


def _planned(family):
    case = tiny(family)
    case.recipe = Recipe(format="gguf", bits=8, group_size=32, sym=False, goal="quantize")
    return case


def bad():
    family = only_in("opt", "phi3", "gemma", why="it is written as GGUF")
    case = _planned(family)
    name = case.config["architectures"][0]
    return case, (
        f"config.json: {name} is not written as GGUF here; LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM and Gemma3ForCausalLM are"
    )


def good():
    return _planned("llama")
