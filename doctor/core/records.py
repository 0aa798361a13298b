"""What a calibration, a quantizer's run and a comparison measured: plain records that rules read and reports print.

Their fields are keys of the JSON report, so a field keeps its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doctor.core.facts import FactKey, provide


@dataclass(frozen=True)
class CalibrationFacts:
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
    seen_rows: int = 0  # of the rows, with images or sound


@dataclass(frozen=True)
class TuningFacts:
    """Scales and norm gains tuned after a quantization, or why they were not. start, end: KL(original || quantized) in
    nats a token of the watched rows, before and after.
    """

    rows: int = 0  # trained on
    watched: int = 0  # not trained on
    unseen: bool = False  # the watched rows calibrated nothing either
    steps: int = 0
    start: float = 0.0
    end: float = 0.0
    written: bool = False  # the tuned values are in the output
    reason: str = ""  # why nothing was tuned


@dataclass(frozen=True)
class HessianFacts:
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
class SolveRecord:
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

    @property
    def damp_first(self) -> float:
        """The damping that was tried first: what was asked for, or what so few calibration rows call for."""
        return self.attempts[0][0] if self.attempts else self.damp_asked


def damp_raised(solve: Mapping[str, Any]) -> bool:
    """Whether the outcome of a linear, as a report holds it, needed more damping than was tried first."""
    first = solve["attempts"][0][0] if solve.get("attempts") else solve["damp_asked"]
    return solve["damp_used"] > first


@dataclass(frozen=True)
class Fp16Range:
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
    half: Fp16Range | None = None
    # The same collapse in the predictions on the text, which a model too large to reply in memory gives as well.
    entropy_original: float = float("nan")  # nats, mean over the tokens' next-token distributions
    entropy_quantized: float = float("nan")
    one_choice: float = 0.0  # share of the tokens at which the quantized model ranks one same token first, which is:
    one_choice_token: int = 0
    one_choice_original: float = 0.0  # that share for the original's own favourite
    kl_median: float = float("nan")
    kl_p999: float = float("nan")
    kl_max: float = float("nan")
    # 95 in 100 resamplings of the rows lie in these spans (bootstrap); NaN where there are fewer than 3 rows.
    ratio_span: tuple[float, float] = (float("nan"), float("nan"))  # of perplexity_quantized / perplexity_original
    kl_span: tuple[float, float] = (float("nan"), float("nan"))  # of kl_mean
    top1_span: tuple[float, float] = (float("nan"), float("nan"))  # of top1_agreement
    # Of a mixture: (layer, share of the original's choices of an expert that the quantized model makes for the same
    # token); and how many layers have experts whose choices were not seen.
    same_experts: tuple[tuple[int, float], ...] = ()
    experts_unseen: int = 0
    rounded_inputs: int = 0  # linears of the quantized model whose inputs were rounded too, as engines round them


@dataclass(frozen=True)
class OwnMeasure:
    """A model that is compared by its own measure. kind: "embedding", "score", or "sequence" for an encoder and a
    decoder. Cosines are those of last hidden states (the decoder's): of each token, and of a row's mean. Scores are of
    a row each, NaN where there are none.
    """

    kind: str
    rows: int
    tokens: int
    cosine: float  # mean over the tokens
    cosine_least: float
    cosine_pooled: float  # mean over the rows
    nonfinite_original: int  # tokens whose states have NaN or Inf
    nonfinite_quantized: int
    score_correlation: float = float("nan")
    score_apart: float = float("nan")  # mean distance, as a share of the standard deviation of the original's scores


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task for both models. errors: standard errors; span: where 95 of 100 resamplings of the
    questions have the difference; same: share of questions on which both choose the same. NaN where not known.
    """

    task: str
    metric: str
    original: float
    quantized: float
    questions: int = 0
    original_error: float = float("nan")
    quantized_error: float = float("nan")
    span: tuple[float, float] = (float("nan"), float("nan"))
    same: float = float("nan")


@dataclass(frozen=True)
class LoadProof:
    """What a client's own loading code did with a checkpoint, under the class that config.json names.

    missing, unexpected, mismatched: names of parameters. packed: linears that the client took as packed. compared: of
    these and of experts, how many were unpacked by the client's own library; differing: those whose values are not
    ours; misread: the same of experts that the client joins into one tensor. refused: the client's own error. reason:
    why the client could not be asked; then nothing is proved.
    """

    client: str  # name and version
    architecture: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    packed: int = 0
    compared: int = 0
    differing: tuple[str, ...] = ()
    misread: tuple[str, ...] = ()
    library: str = ""
    refused: str = ""
    reason: str = ""

    @property
    def whole(self) -> bool:
        """Whether the client was asked and loads every parameter with the values that the files hold."""
        names = (self.missing, self.unexpected, self.mismatched, self.differing, self.misread)
        return not (self.reason or self.refused or any(names))


@dataclass(frozen=True)
class MergedLinear:
    """One matrix of an adapter in a merged checkpoint. share: how many times scale * B @ A was added to the base, by
    least squares; NaN for an adapter of zeros. apart: share of values that are neither the computed sum nor next to it.
    unchanged: the base's values. problem: why it was not compared.
    """

    name: str
    share: float = float("nan")
    apart: float = 1.0
    unchanged: bool = False
    problem: str = ""


@dataclass(frozen=True)
class MergeProof:
    """A merged checkpoint against its base and its adapter. changed: tensors that differ from the base and that the
    adapter does not touch. reason: why nothing was compared.
    """

    base: str = ""
    adapter: str = ""
    linears: tuple[MergedLinear, ...] = ()
    changed: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class ClientRun:
    """What a client computes with a checkpoint, against what doctor computes with it, on the same tokens.

    perplexity: the client's; perplexity_doctor: doctor's of the same files, in float32. apart: mean absolute difference
    of a token's log-probability in nats, apart_p99 its 99th percentile. refused: the client's own error. reason: why
    the client could not be asked; then nothing is known. rounds: linears round their inputs, in which two ways to
    compute them differ by noise of their own.
    """

    client: str  # name and version
    tokens: int = 0
    perplexity: float = float("nan")
    perplexity_doctor: float = float("nan")
    apart: float = float("nan")
    apart_p99: float = float("nan")
    rounds: bool = False
    refused: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Allocation:
    """A mixture of widths under a budget, and the uniform model of the same size. bpw is bits a weight of the linears
    that were quantized, everything stored for them counted; KL in nats a token.
    """

    budget: float  # bpw that was asked for
    bpw: float  # of the mixture
    uniform_bpw: float
    uniform: str  # as people write it: 4-bit g64, Q4_K_M
    linears: dict[float, int]  # of the mixture: Recipe.width -> linears
    predicted: float  # KL of the mixture, before it was made
    kl: float  # of the mixture, on rows that were held back
    kl_uniform: float
    tokens: int  # of those rows
    written: str  # mixture or uniform


CALIBRATION: FactKey[CalibrationFacts] = provide(
    "calibration", "checkpoint", "calibration", "What the calibration rows are (records.CalibrationFacts)."
)
HESSIAN: FactKey[HessianFacts] = provide(
    "hessian", "linear", "calibration", "What was measured of the Hessian of a linear's input (records.HessianFacts)."
)
SOLVE: FactKey[SolveRecord] = provide(
    "solve", "linear", "run", "How a linear was quantized, and everything that was tried (records.SolveRecord)."
)
ALLOCATION: FactKey[Allocation] = provide(
    "allocation", "checkpoint", "run", "A mixture of widths against the uniform model (records.Allocation)."
)
ORIGINAL_BROKEN = "O606"  # the rule whose finding says that a comparison says nothing
STACKED_EXPERTS: FactKey[tuple[tuple[str, str], ...]] = provide(
    "stacked_experts", "checkpoint", "run", "(tensor, why) of each fused 3-D expert tensor that a run kept in 16 bits."
)
OUTSIDE_LINEARS: FactKey[tuple[str, ...]] = provide(
    "outside_linears",
    "checkpoint",
    "run",
    "Names of linears that a run left in 16 bits as in no layer.",
)
SLOWER_PATHS: FactKey[tuple[str, ...]] = provide(
    "slower_paths", "checkpoint", "run", "Why a run took a slower path than it can, one sentence each; () for none."
)
COMPARISON: FactKey[Comparison] = provide(
    "comparison", "checkpoint", "output", "The quantized model compared with its original (records.Comparison)."
)
OWN_MEASURE: FactKey[OwnMeasure] = provide(
    "own_measure",
    "checkpoint",
    "output",
    "An embedding or reward model compared with its original by its own measure (records.OwnMeasure).",
)
MERGE_PROOF: FactKey[MergeProof] = provide(
    "merge_proof", "checkpoint", "values", "The checkpoint against --base and --adapter (records.MergeProof)."
)
CLIENT_RUN: FactKey[ClientRun] = provide(
    "client_run", "checkpoint", "output", "What a client computes with the files (records.ClientRun)."
)
LOAD_PROOF: FactKey[LoadProof] = provide(
    "load_proof", "checkpoint", "output", "What a client's own loading code did with the output (records.LoadProof)."
)
