"""The facts every run has: what the listing, the JSON files, the headers and the scan say, under the names rules ask
for.
"""

from dataclasses import dataclass, field

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.facts import CHECKPOINT, Store, Unavailable, fact, provide
from doctor.core.machine import Machine  # noqa: F401 - declares the facts of the machine
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.formats.tensor_names import SCALES, WORDS
from doctor.model.lora import ADAPTER, trained_whole
from doctor.model.spec import ModelSpec, build_spec

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


provide("calibration", "checkpoint", "calibration", "What the calibration rows are (Calibration).")
provide("hessian", "linear", "calibration", "What the Hessian of a linear's input says (Hessian).")
provide("solve", "linear", "run", "How a linear was quantized, and everything that was tried (Solve).")
provide("stacked_experts", "checkpoint", "run", "(tensor, why) of 3-D tensors of experts that a run left in 16 bits.")
provide(
    "slower_paths",
    "checkpoint",
    "run",
    "Sentences on what a run did in a slower way than it can, and why; () where nothing.",
)
provide("comparison", "checkpoint", "output", "The quantized model against its original (Comparison).")


@dataclass(frozen=True)
class Calibration:
    """The rows a calibration ran on. Lengths are tokens; shares are between 0 and 1."""

    source: str
    builtin: bool  # doctor's own texts, because none were given
    rows: int
    tokens: int
    shortest: int
    median: int
    longest: int
    distinct_tokens: int
    duplicate_rows: int
    bos_doubled: int  # rows whose first two ids are both the BOS id
    padding: int  # tokens that are padding
    scripts: tuple[
        str, ...
        # of the text's letters, each with a share of its own (text_scripts.py); empty where rows came as ids or text is
        # doctor's own
    ] = ()
    unused_scripts: tuple[str, ...] = ()  # that the vocabulary has many tokens of and the text has none of
    sampled_rows: int = 0  # of the rows, written by the model itself
    not_sampled: str = ""  # why none is, where doctor's own texts are used


@dataclass(frozen=True)
class Hessian:
    """H = 2/n XᵀX of one linear's input X[tokens, in_features], before damping."""

    tokens: int
    in_features: int
    n_nonfinite: int  # NaN and Inf among the entries of X
    first_nonfinite: tuple[int, int] | None  # (token, channel) of the first
    finite: bool  # H itself
    n_dead: int  # channels with diag(H) = 0
    mean_diag: float  # over live channels
    max_eigenvalue: float
    damp_needed: float  # share of mean_diag that float32 factorisation is predicted to need
    condition: float  # estimate for H with the recipe's damping


@dataclass(frozen=True)
class Solve:
    """One linear's outcome. attempts: (damp, precision, what happened), in order. Losses are tr(E H Eᵀ) / tr(W H
    Wᵀ).
    """

    outcome: str  # gptq, awq, rtn, kept, failed
    damp_asked: float
    damp_used: float
    precision: str
    loss: float
    rtn_loss: float
    attempts: tuple[tuple[float, str, str], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Half:
    """The original in 16 bits: how large its activations get in float32, and what rounding every step of it does to its
    predictions.

    Places are written out ("the input of model.layers.3.mlp.down_proj"); sizes are largest |values|; kl is nats a token
    against float32, on `tokens` tokens.
    """

    absmax: float
    place: str
    first: tuple[str, float] | None  # the first (place, size) that float16 cannot hold, in the order of computing
    residual: tuple[float, ...]  # size of the residual stream after each block
    blocks: tuple[tuple[str, float], ...]  # the largest (place, size) of each block
    tokens: int
    kl_float16: float
    kl_bfloat16: float
    nonfinite_float16: int  # rows of logits with NaN or Inf
    nonfinite_bfloat16: int


@dataclass(frozen=True)
class Comparison:
    """Two models on the same text. nats for kl; shares between 0 and 1; generated are greedy continuations of
    prompts.
    """

    tokens: int
    context: int
    perplexity_original: float
    perplexity_quantized: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nonfinite_original: int  # logit rows with NaN or Inf
    nonfinite_quantized: int
    token0_share: float  # of the quantized model's generated tokens
    longest_repeat: int  # most times one token stands in a row in them
    generated: int
    replies: tuple[tuple[str, str, str], ...] = ()  # (prompt, original's reply, quantized model's reply)
    block_errors: tuple[float, ...] = ()  # relative output error after each block: carried along from block to block
    own_errors: tuple[
        float, ...
    ] = ()  # of each block alone, given the original's input: error relative to what the block adds
    token0_share_original: float = 0.0  # the same two of the original's replies: what it says too is no collapse
    longest_repeat_original: int = 0
    half: Half | None = None
    # The same collapse in the predictions on the text, which a model too large to reply in memory gives as well.
    entropy_original: float = float("nan")  # nats, mean over the tokens' next-token distributions
    entropy_quantized: float = float("nan")
    one_choice: float = 0.0  # share of the tokens at which the quantized model ranks one same token first, which is:
    one_choice_token: int = 0
    one_choice_original: float = 0.0  # that share for the original's own favourite


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


# tokenizer


@dataclass
class Tokenizer:
    """What tokenizer.json says, without the library that runs it. ids: every token's id; added: those added on top."""

    ids: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    bos_added: str | None = None  # the token its post-processor puts in front of a single text
    kind: str = ""

    def token(self, token_id: int) -> str | None:
        """The text of an id, None where no token has it."""
        return next((t for t, i in self.ids.items() if i == token_id), None)

    @property
    def largest_id(self) -> int:
        return max(self.ids.values(), default=-1)


@fact("checkpoint", stage="tokenizer")
def tokenizer(checkpoint) -> Tokenizer:
    """tokenizer.json, read as data (Tokenizer)."""
    return read_tokenizer(_document(checkpoint, "tokenizer.json"))


def read_tokenizer(document: dict) -> Tokenizer:
    """Vocabulary and post-processor of a parsed tokenizer.json. Raises Unavailable where its form is unknown."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
        ids = {t[0]: i for i, t in enumerate(vocabulary) if isinstance(t, list) and t and isinstance(t[0], str)}
    elif isinstance(vocabulary, dict):
        ids = {k: v for k, v in vocabulary.items() if isinstance(v, int)}
    else:
        raise Unavailable("tokenizer.json has no vocabulary")
    added, special = {}, set()
    for token in document.get("added_tokens") or []:
        if isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int):
            added[token["content"]] = token["id"]
            if token.get("special"):
                special.add(token["content"])
    return Tokenizer(
        {**ids, **added},
        added,
        frozenset(special),
        _first_added(document.get("post_processor")),
        str(model.get("type", "")),
    )


def _first_added(processor: object) -> str | None:
    """The special token that a TemplateProcessing post-processor puts before a single text, None for none."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        parts = processor.get("processors")
        return next(filter(None, map(_first_added, parts if isinstance(parts, list) else [])), None)
    single = processor.get("single")
    if (
        processor.get("type") == "TemplateProcessing"
        and isinstance(single, list)
        and single
        and isinstance(single[0], dict)
    ):
        token = single[0].get("SpecialToken")
        return token.get("id") if isinstance(token, dict) else None
    if processor.get("type") in ("BertProcessing", "RobertaProcessing") and isinstance(processor.get("cls"), list):
        return processor["cls"][0]
    return None


# values: one fact for each counter, so that a rule names what it looks at


@fact("tensor")
def n_nan(tensor, stats):
    """Values that are NaN."""
    return stats.n_nan


@fact("tensor")
def n_inf(tensor, stats):
    """Values that are +Inf or -Inf."""
    return stats.n_inf


@fact("tensor")
def n_zero(tensor, stats):
    """Values that are 0."""
    return stats.n_zero


@fact("tensor")
def numel(tensor, stats):
    """Values in all."""
    return stats.numel


@fact("tensor")
def n_fp16_overflow(tensor, stats):
    """Finite values that a cast to fp16 turns into Inf."""
    return stats.n_fp16_overflow


@fact("tensor")
def n_fp16_underflow(tensor, stats):
    """Values other than 0 that a cast to fp16 turns into 0."""
    return stats.n_fp16_underflow


@fact("tensor")
def absmax(tensor, stats):
    """Largest magnitude among finite values."""
    return stats.absmax


@fact("tensor")
def first_nonfinite(tensor, stats):
    """Flat index of the first NaN or Inf, -1 where there is none."""
    return stats.first_nonfinite


# across tensors


@fact("checkpoint")
def largest_values(checkpoint, every_absmax):
    """tensor -> largest magnitude among its finite values, for pictures across blocks."""
    return every_absmax


@fact("checkpoint")
def head_equals_embed(checkpoint, spec, every_same_bytes):
    """Whether head and embedding hold the same bytes; None where not both are stored."""
    return every_same_bytes.get(spec.head_tensor)


@fact("checkpoint")
def mlp_makers(checkpoint, spec):
    """(module that holds them, block, expert) -> the linears whose rows make the inputs of an MLP's second matrix."""
    found: dict[tuple, list] = {}
    for linear in spec.linears:
        if linear.role in ("gate", "up", "gate_up"):
            found.setdefault(_mlp(linear), []).append(linear)
    return found


@fact("linear")
def dead_inputs(linear, spec, mlp_makers, every_zero_rows, every_zero_columns):
    """in_features of an MLP's second matrix whose input is 0 for every token, because the row that makes it is all 0.

    Where the column that reads it is 0 as well it is padding, and not counted. 0 for other linears, and where a bias
    may make such a row speak.
    """
    makers = mlp_makers.get(_mlp(linear), []) if linear.role == "down" else []
    if not makers or any(f"{x.name}.bias" in spec.biases for x in makers):
        return 0
    dead = max(-(-every_zero_rows.get(x.name, 0) // (2 if x.role == "gate_up" else 1)) for x in makers)
    return max(0, dead - every_zero_columns.get(linear.name, 0))


def _mlp(linear) -> tuple:
    return linear.name.rpartition(".")[0], linear.block, linear.expert


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


def _parameters(checkpoint: Checkpoint, store: Store) -> int:
    """Weights of the model. A packed linear counts as the matrix that it stands for, not as the words it is stored
    in.
    """
    layout = store.get(CHECKPOINT, "layout") if store.has(CHECKPOINT, "layout") else None
    tensors = checkpoint.tensors
    if layout is not None and not layout.quantized:
        return sum(t.numel for t in tensors.values())
    if layout is not None:
        packed = {x.name: x.in_features * x.out_features for x in layout.linears}
    else:  # of a form that is not read: each scale stands for a group, where the group size is stated
        from doctor.plan.groups import stored_recipe

        group = stored_recipe(checkpoint, Recipe(group_size=-1)).group_size
        names = {
            n.rpartition(".")[0]: SCALES[method]
            for method, words in WORDS.items()
            for n in tensors
            if n.endswith(f".{words}")
        }
        scales = {module: tensors.get(f"{module}.{tail}") for module, tail in names.items()}
        packed = {module: info.numel * group for module, info in scales.items() if info is not None and group > 0}
    rest = sum(
        t.numel for name, t in tensors.items() if name.endswith(".bias") or name.rpartition(".")[0] not in packed
    )
    return rest + sum(packed.values())


def summary(checkpoint: Checkpoint, store: Store) -> dict:
    """What the second line of every report says about the files."""
    kinds: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        kinds[info.dtype.name] = kinds.get(info.dtype.name, 0) + info.nbytes
    spec = store.get(CHECKPOINT, "spec") if store.has(CHECKPOINT, "spec") else None
    return {
        "path": str(checkpoint.root),
        "architecture": spec.architecture or spec.model_type if spec else "",
        "parameters": _parameters(checkpoint, store),
        "dtype": max(kinds, key=kinds.get, default=""),
        "shards": len(checkpoint.shards),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_bytes,
        "blocks": spec.n_layers if spec else None,
        "linears": len(spec.linears) if spec else 0,
    }
