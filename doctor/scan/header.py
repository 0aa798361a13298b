"""The facts that every run has before it reads a tensor's bytes: the listing, the JSON files, the headers."""

from typing import Any

import doctor.core.records
import doctor.model.stored_weights  # noqa: F401 - declares the facts of quantized weights under their own names
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint, Entry, JsonFile
from doctor.checkpoint.safetensors import Defect, Shard, TensorInfo
from doctor.core.collection import uncollected
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import CHECKPOINT, FactKey, Unavailable, fact, key_of, provide
from doctor.core.machine import GIVEN_MACHINE
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.rehearsal import GIVEN_REHEARSAL
from doctor.core.store import Store
from doctor.core.tables import table
from doctor.model.lora import ADAPTER, trained_whole
from doctor.model.spec import ModelSpec, build_spec
from doctor.model.tokenizer import Tokenizer, read_tokenizer

RECIPE: FactKey[Recipe] = provide(
    "recipe", "checkpoint", "listing", "The recipe that findings are judged against (recipe.Recipe)."
)
BASE: FactKey[Any] = provide(
    "base",
    "checkpoint",
    "listing",
    "The checkpoint of --from, to take tensors and files from (donor.Donor); None without.",
)
DECODED: FactKey[Any] = provide(
    "decoded",
    "checkpoint",
    "listing",
    "How the weights are stored that are read here as plain numbers (decoding.Decoding); None where they are plain.",
)
ASKED: FactKey[frozenset[str]] = provide(
    "asked", "checkpoint", "listing", "Codes that the user named with --unsafe-fixes: some fixes are offered only then."
)
GIVEN_PUBLISHED: FactKey[dict[str, Any]] = provide(
    "given_published",
    "checkpoint",
    "listing",
    "Entries that replace those of rules/tables/published.toml in a rule's example; {} elsewhere.",
)


@fact("checkpoint")
def published(checkpoint, given_published) -> dict[str, Any]:
    """What vendors published and users reported about models and runtimes: rules/tables/published.toml."""
    return table("published") | given_published


@fact("checkpoint")
def files(checkpoint) -> dict[str, Entry]:
    """File name -> Entry of every regular file."""
    _require_files(checkpoint)
    return checkpoint.entries


@fact("checkpoint")
def listing_problems(checkpoint) -> list[Defect]:
    """Defects of the listing: links that lead out of the directory, special and unreadable files."""
    _require_files(checkpoint)
    return checkpoint.problems


@fact("checkpoint")
def json_files(checkpoint) -> dict[str, JsonFile]:
    """File name -> JsonFile of every JSON document."""
    _require_files(checkpoint)
    return checkpoint.json


@fact("checkpoint", cost="header")
def tensors(checkpoint) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo that a reader would take."""
    if not checkpoint.tensors:
        raise Unavailable(_("no safetensors tensor can be read"))
    return checkpoint.tensors


@fact("checkpoint", cost="header")
def shards(checkpoint) -> dict[str, Shard]:
    """File name -> Shard of every weight file of the checkpoint."""
    _require_files(checkpoint)
    return checkpoint.shards


@fact("checkpoint", cost="header")
def copies(checkpoint, shards) -> dict[str, list[TensorInfo]]:
    """Tensor name -> its TensorInfo in each file, for tensors that are in more than one file."""
    if sum(len(shard.tensors) for shard in shards.values()) == len(checkpoint.tensors):
        return {}
    held: dict[str, list[TensorInfo]] = {}
    for shard in shards.values():
        for info in shard.tensors:
            held.setdefault(info.name, []).append(info)
    return {name: infos for name, infos in held.items() if len(infos) > 1}


@fact("checkpoint")
def weight_map(checkpoint) -> dict[str, str] | None:
    """Tensor name -> file, as the index says; None without an index."""
    _require_files(checkpoint)
    return checkpoint.weight_map if INDEX_NAME in checkpoint.json else None


@fact("checkpoint")
def missing_shards(checkpoint) -> list[str]:
    """Files that the index names and the directory lacks."""
    _require_files(checkpoint)
    return checkpoint.missing_shards


@fact("checkpoint")
def config(checkpoint) -> dict[str, Any]:
    """config.json as a dict."""
    return _document(checkpoint, "config.json")


@fact("checkpoint")
def generation_config(checkpoint) -> dict[str, Any] | None:
    """generation_config.json as a dict, None where it is absent or broken."""
    _require_files(checkpoint, "generation_config.json")
    return checkpoint.value("generation_config.json")


@fact("checkpoint")
def tokenizer_config(checkpoint) -> dict[str, Any] | None:
    """tokenizer_config.json as a dict, None where it is absent or broken."""
    _require_files(checkpoint, "tokenizer_config.json")
    return checkpoint.value("tokenizer_config.json")


def _document(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    value = checkpoint.value(name)
    if value is None:
        raise Unavailable(checkpoint.no_files or _("{file} is absent or cannot be read", file=name))
    return value


def _require_files(checkpoint: Checkpoint, document: str = "") -> None:
    """Raise Unavailable for a model in memory, unless the program gave this document with it."""
    if checkpoint.no_files and document not in checkpoint.json:
        raise Unavailable(checkpoint.no_files)


@fact("checkpoint", cost="header")
def spec(checkpoint, config, logical_tensors=None) -> ModelSpec:
    """The model that config.json describes (spec.ModelSpec)."""
    return build_spec(config, checkpoint.tensors if logical_tensors is None else logical_tensors)


@fact("checkpoint", cost="header")
def digested(checkpoint, files, copies, tensors, spec=None) -> set[str]:
    """Names of the tensors whose bytes are compared with others by a digest: those in two files, and those that an
    adapter trained whole.
    """
    return set(copies) | (trained_whole(tensors) if ADAPTER in files else set())


@fact("checkpoint", cost="header")
def compared(checkpoint, tensors, spec=None) -> dict[str, str]:
    """Tensor name -> the one that its bytes are compared with while they are read: the head with the embedding."""
    head, embed = (spec.head_tensor or "", spec.embed_tensor or "") if spec else ("", "")
    return {head: embed} if head != embed and head in tensors and embed in tensors else {}


@fact("checkpoint")
def chat_template(checkpoint, tokenizer_config) -> str | None:
    """The text of the chat template, from chat_template.jinja or tokenizer_config.json; None where there is none."""
    _require_files(checkpoint)
    if "chat_template.jinja" in checkpoint.entries:
        try:
            return checkpoint.read_file("chat_template.jinja", 4 << 20).decode("utf-8", "replace")
        except BadCheckpoint as error:
            raise Unavailable(error.message) from None
    template = (tokenizer_config or {}).get("chat_template")
    if isinstance(template, list):
        named: dict[Any, Any] = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


@fact("checkpoint")
def other_chat_templates(checkpoint, tokenizer_config) -> dict[str, tuple[str, str]]:
    """Name of each further chat template (for tools, for retrieval) -> (its text, the file that holds it)."""
    template = (tokenizer_config or {}).get("chat_template")
    named = template if isinstance(template, list) else []
    found = {
        str(t.get("name")): (t["template"], "tokenizer_config.json")
        for t in named
        if isinstance(t, dict) and isinstance(t.get("template"), str) and t.get("name") != "default"
    }
    for file in sorted(checkpoint.entries):
        if file.startswith("additional_chat_templates/") and file.endswith(".jinja"):
            text = checkpoint.read_file(file, 4 << 20).decode("utf-8", "replace")
            found[file.rpartition("/")[2].removesuffix(".jinja")] = (text, file)
    return found


@fact("checkpoint", cost="tokenizer")
def tokenizer(checkpoint) -> Tokenizer:
    """tokenizer.json, read as data (tokenizer.Tokenizer)."""
    return read_tokenizer(_document(checkpoint, "tokenizer.json"))


SPEC = key_of(spec)
TENSORS = key_of(tensors)
DIGESTED = key_of(digested)
COMPARED = key_of(compared)
TOKENIZER = key_of(tokenizer)


@uncollected()
def header_facts(checkpoint: Checkpoint, recipe: Recipe) -> Store:
    """A store with everything that is known before a tensor's bytes are read, and with all subjects declared."""
    store = Store()
    store.add_subject("checkpoint", CHECKPOINT, checkpoint)
    store.put(RECIPE, recipe)
    store.put(BASE, None)
    store.put(GIVEN_MACHINE, None)
    store.put(GIVEN_REHEARSAL, None)
    store.put(GIVEN_PUBLISHED, {})
    store.put(DECODED, None)
    store.put(ASKED, frozenset())
    for name, shard in () if checkpoint.no_files else checkpoint.shards.items():
        store.add_subject("shard", f"shard:{name}", shard)
    for name, info in checkpoint.tensors.items():
        store.add_subject("tensor", f"tensor:{name}", info)
    model = store.find(SPEC)
    for linear in model.linears if model is not None else ():
        store.add_subject("linear", f"linear:{linear.name}", linear, f"tensor:{linear.tensor}")
    for cost, reason in (
        ("values", _("the weights were not read")),
        ("calibration", _("no calibration in this run: doctor quantize measures it")),
        ("run", _("nothing was quantized in this run")),
        ("output", _("no quantized output was compared: doctor verify does it")),
    ):
        store.say_missing(cost, reason)
    return store
