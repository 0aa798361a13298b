"""C161 tokenizer-class: tokenizer_class or extra_special_tokens has a form that older readers lack.

Why: transformers 5 writes the class TokenizersBackend and extra_special_tokens as a list. Readers built on transformers 4 have no
such class, and expect a dictionary there: they stop before the first weight is read. A class that no version has stops them too.

Seen as:
- transformers: `Tokenizer class TokenizersBackend does not exist or is not currently imported`
- transformers: `Tokenizer class TokenizersBackendFast does not exist or is not currently imported`
- transformers: `AttributeError: 'list' object has no attribute 'keys'`

Do: name PreTrainedTokenizerFast, which reads tokenizer.json in every version, and call the list additional_special_tokens.

False alarms: a class of the checkpoint's own code (auto_map) is not judged. Without --runtime the new spelling is a note, because
current readers take it.

Fix safety: safe where tokenizer.json is there: PreTrainedTokenizerFast reads the same file, and both spellings of the list give the
same tokens.

Sources: ModelCloud/GPTQModel issue 2403; unslothai/unsloth issue 8444; transformers
src/transformers/models/auto/tokenization_auto.py; rules/tables/readers.toml.
"""

from doctor.lint.rule import MISSING, Fix, Place, RemoveJson, SetJson, _, finding, old_reader, rule, table
from doctor.lint.testing import tiny

FILE = "tokenizer_config.json"
EVERY_VERSION = "PreTrainedTokenizerFast"
NEW = "TokenizersBackend"


@rule("C161", "warning")
def tokenizer_class(checkpoint, recipe, files):
    config = checkpoint.value(FILE)
    if not isinstance(config, dict) or "auto_map" in config:
        return
    readers = table("readers")
    name = config.get("tokenizer_class")
    old = old_reader(recipe)
    whole = "tokenizer.json" in files
    rename = (
        Fix(_("name {name}, which reads tokenizer.json in every version", name=EVERY_VERSION),
            (SetJson(FILE, "/tokenizer_class", EVERY_VERSION, name),), "safe")
        if whole
        else Fix(_("take the class from the base model's tokenizer_config.json"), (), "manual")
    )  # fmt: skip
    if isinstance(name, str) and name != NEW and name not in readers["tokenizer_classes"].split():
        yield finding(
            _("tokenizer_class {name} is in no version of transformers", name=name),
            at=Place(FILE, pointer="/tokenizer_class"), fix=rename,
        )  # fmt: skip
    elif name == NEW and old is not False:
        yield finding(
            _("tokenizer_class {name} is of transformers 5; {reader} lacks it", name=name, reader=old or _("transformers 4")),
            at=Place(FILE, pointer="/tokenizer_class"), fix=rename, severity="warning" if old else "info",
        )  # fmt: skip
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) and old is not False:
        yield finding(
            _("extra_special_tokens is a list; {reader} expects a dictionary", reader=old or _("transformers 4")),
            at=Place(FILE, pointer="/extra_special_tokens"),
            fix=Fix(_("call the list additional_special_tokens, which every version reads"), _renamed(config, extra), "safe"),
            severity="warning" if old else "info",
        )  # fmt: skip


def _renamed(config, extra):
    stated = config.get("additional_special_tokens", MISSING)
    both = [*(stated if isinstance(stated, list) else ()), *extra]
    merged = [token for i, token in enumerate(both) if token not in both[:i]]
    return (
        SetJson(FILE, "/additional_special_tokens", merged, stated),
        RemoveJson(FILE, "/extra_special_tokens", extra),
    )


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["tokenizer_class"] = "TokenizersBackendFast"
    return case, "tokenizer_class TokenizersBackendFast is in no version of transformers"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.13.0")
    case.json["tokenizer_config.json"] |= {"tokenizer_class": NEW, "extra_special_tokens": ["<a>", "<b>"]}
    yield case
