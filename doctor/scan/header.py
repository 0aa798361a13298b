"""The facts every run has: what the listing, the JSON files, the headers and the scan say, under the names rules ask
for.
"""

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.facts import CHECKPOINT, Store, Unavailable, fact, provide
from doctor.core.machine import Machine  # noqa: F401 - declares the facts of the machine
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.model.lora import ADAPTER, trained_whole
from doctor.model.spec import ModelSpec, build_spec
from doctor.model.tokenizer import Tokenizer, read_tokenizer

provide("recipe", "checkpoint", "listing", "The plan that findings are judged against.")
provide("base", "checkpoint", "listing", "What `--from` gives to take tensors from (base.Base), None without it.")
provide("asked", "checkpoint", "listing", "Codes whose unsafe fixes the user named: some cures are offered only then.")
provide(
    "given_published",
    "checkpoint",
    "listing",
    "Parts that an example has in the place of those of rules/tables/published.toml; {} elsewhere.",
)
provide("stats", "tensor", "values", "Exact counters over every value of a tensor (stats.Stats).")
provide("zero_groups", "linear", "values", "Groups of group_size in_features whose weights are all 0, counted per row.")
provide(
    "zero_groups_fp16",
    "linear",
    "values",
    "The same after a cast to fp16, where tiny weights become 0; zero_groups are among them.",
)
provide("first_zero_group", "linear", "values", "(row, first column) of the first of either, or None.")
provide(
    "one_signed",
    "linear",
    "values",
    "(groups looked at, those of them without a negative or without a positive weight); groups of zeros are not counted.",
)
provide("zero_rows", "linear", "values", "out_features whose weights are all 0.")
provide("zero_columns", "linear", "values", "in_features whose weights are all 0.")
provide(
    "same_bytes",
    "tensor",
    "values",
    "Whether the tensor is, in dtype, shape and bytes, the one that `compared` names beside it.",
)
provide(
    "digests",
    "tensor",
    "values",
    "file -> blake2b (16 bytes, hexadecimal) of the tensor's bytes in it; only of those that `digested` names.",
)


provide("calibration", "checkpoint", "calibration", "What the calibration rows are (records.CalibrationFacts).")
provide("hessian", "linear", "calibration", "What the Hessian of a linear's input says (records.HessianFacts).")
provide("solve", "linear", "run", "How a linear was quantized, and everything that was tried (records.SolveRecord).")
provide("stacked_experts", "checkpoint", "run", "(tensor, why) of 3-D tensors of experts that a run left in 16 bits.")
provide(
    "slower_paths",
    "checkpoint",
    "run",
    "Sentences on what a run did in a slower way than it can, and why; () where nothing.",
)
provide(
    "load_proof", "checkpoint", "output", "What a client's own loading code did with the output (records.LoadProof)."
)
provide("comparison", "checkpoint", "output", "The quantized model against its original (records.Comparison).")


# files


@fact("checkpoint")
def published(checkpoint, given_published):
    """What vendors published and users reported of models and runtimes: the table of that name."""
    return table("published") | given_published


@fact("checkpoint")
def files(checkpoint):
    """name -> Entry of every regular file."""
    return checkpoint.entries


@fact("checkpoint")
def listing_problems(checkpoint):
    """Defects of the listing: links that lead out, special and unreadable files."""
    return checkpoint.problems


@fact("checkpoint")
def json_files(checkpoint):
    """name -> JsonFile of every JSON document."""
    return checkpoint.json


@fact("checkpoint", stage="header")
def tensors(checkpoint):
    """name -> TensorInfo of every tensor that a reader would take."""
    if not checkpoint.tensors:
        raise Unavailable("no safetensors tensor can be read")
    return checkpoint.tensors


@fact("checkpoint", stage="header")
def shards(checkpoint):
    """name -> Shard of every file that belongs to the checkpoint."""
    return checkpoint.shards


@fact("checkpoint", stage="header")
def copies(checkpoint, shards):
    """tensor -> its TensorInfo in every file that holds it, of each that stands in more than one."""
    held: dict[str, list] = {}
    for shard in shards.values():
        for info in shard.tensors:
            held.setdefault(info.name, []).append(info)
    return {name: infos for name, infos in held.items() if len(infos) > 1}


@fact("checkpoint")
def weight_map(checkpoint):
    """tensor -> file of the index, None without an index."""
    return checkpoint.weight_map if INDEX_NAME in checkpoint.json else None


@fact("checkpoint")
def missing_shards(checkpoint):
    """Files the index names that are not there."""
    return checkpoint.missing_shards


@fact("checkpoint")
def config(checkpoint):
    """config.json as a dict."""
    return _document(checkpoint, "config.json")


@fact("checkpoint")
def generation_config(checkpoint):
    """generation_config.json as a dict, None where it is absent or broken."""
    return checkpoint.value("generation_config.json")


@fact("checkpoint")
def tokenizer_config(checkpoint):
    """tokenizer_config.json as a dict, None where it is absent or broken."""
    return checkpoint.value("tokenizer_config.json")


def _document(checkpoint: Checkpoint, name: str) -> dict:
    value = checkpoint.value(name)
    if value is None:
        raise Unavailable(f"{name} is absent or cannot be read")
    return value


@fact("checkpoint", stage="header")
def spec(checkpoint, config) -> ModelSpec:
    """What config.json says the model is (spec.ModelSpec)."""
    return build_spec(config, checkpoint.tensors)


@fact("checkpoint", stage="header")
def digested(checkpoint, files, copies, tensors, spec=None):
    """Names of the tensors whose bytes are compared with others' by a digest: what stands in two files, what an adapter
    trained whole.
    """
    return copies.keys() | (trained_whole(tensors) if ADAPTER in files else set())


@fact("checkpoint", stage="header")
def compared(checkpoint, tensors, spec=None) -> dict[str, str]:
    """Tensor -> the one that its bytes are compared with as they are read, up to the first that differs: the head with
    the embedding.
    """
    head, embed = (spec.head_tensor, spec.embed_tensor) if spec else (None, None)
    return {head: embed} if head != embed and head in tensors and embed in tensors else {}


@fact("checkpoint")
def chat_template(checkpoint, tokenizer_config):
    """The chat template's text, from chat_template.jinja or tokenizer_config.json; None where there is none."""
    if "chat_template.jinja" in checkpoint.entries:
        return checkpoint.read_file("chat_template.jinja", 4 << 20).decode("utf-8", "replace")
    template = (tokenizer_config or {}).get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


@fact("checkpoint", stage="tokenizer")
def tokenizer(checkpoint) -> Tokenizer:
    """tokenizer.json, read as data (Tokenizer)."""
    return read_tokenizer(_document(checkpoint, "tokenizer.json"))


def header_facts(checkpoint: Checkpoint, recipe: Recipe) -> Store:
    """A store that holds everything known before a tensor's bytes are read, with its subjects declared."""
    store = Store()
    store.add_subject("checkpoint", CHECKPOINT, checkpoint)
    store.put(CHECKPOINT, "recipe", recipe)
    store.put(CHECKPOINT, "base", None)
    store.put(CHECKPOINT, "given_machine", None)
    store.put(CHECKPOINT, "given_published", {})
    store.put(CHECKPOINT, "asked", frozenset())
    for name, shard in checkpoint.shards.items():
        store.add_subject("shard", f"shard:{name}", shard)
    for name, info in checkpoint.tensors.items():
        store.add_subject("tensor", f"tensor:{name}", info)
    if store.has(CHECKPOINT, "spec"):
        for linear in store.get(CHECKPOINT, "spec").linears:
            store.add_subject("linear", f"linear:{linear.name}", linear, f"tensor:{linear.tensor}")
    for stage, reason in (
        ("values", "the weights were not read"),
        ("calibration", "no calibration in this run: doctor quantize measures it"),
        ("run", "nothing was quantized in this run"),
        ("output", "no quantized output was compared: doctor verify does it"),
    ):
        store.say_missing(stage, reason)
    return store
