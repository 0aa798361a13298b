"""O624 client-differs: the client computes something else with these files than doctor.

Why: perplexity and divergence above are doctor's own reading of the packed weights. Where the client reads them in another
way, its users get another model than the one that was verified: another order of nibbles, another zero point, a layer
that it left out.

Do: trust the client. Quantize into another format that it reads, or serve with the client that agrees.

False alarms: a client that computes in float16 what overflows there (O615 says so). vLLM's 8-bit integers on a CPU that
has AVX2 alone: sums of two products end at 16 bits there (0.27 nats on SmolLM2).

Fix safety: no fix: which side is wrong is not known here.

Sources: measured on SmolLM2-135M in compressed-tensors, 1,533 tokens: transformers 5.24 in bfloat16 differs from float32
by 0.037 nats a token on average, vLLM 0.32 (GPTQ, 1,022 tokens) by 0.037; 0.17 and 0.19 at the 99th percentile. INT8 and
FP8_DYNAMIC, whose inputs are rounded too, 510 tokens: transformers 5.23 by 0.18 and 0.14, vLLM 0.32 FP8_DYNAMIC by 0.15.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import compared, ran_by_client

APART = 0.15  # nats of a token's log-probability, mean: bfloat16 gives 0.04, one wrong layer more than 0.5
ROUNDED = 0.25  # where inputs are rounded to 8 bits, bfloat16 beforehand moves many to a neighbour: 0.14 to 0.18


@rule("O624", "error")
def client_differs(checkpoint, client_run):
    r = client_run
    if r.reason:
        return
    if r.refused:
        yield finding(
            _("{client} does not run this checkpoint: {error}", client=r.client, error=r.refused),
            evidence={"error": str(r.refused)},
        )
    elif not r.apart <= (limit := ROUNDED if r.rounds else APART):
        yield finding(
            _(
                "{client} computes perplexity {theirs:.4g} with these files and doctor {ours:.4g}; a token's log-probability "
                "differs by {apart:.2g} nats on average, at most {limit} expected",
                client=r.client,
                theirs=r.perplexity,
                ours=r.perplexity_doctor,
                apart=r.apart,
                limit=limit,
            ),
            evidence={"apart": r.apart, "perplexity": r.perplexity, "perplexity_doctor": r.perplexity_doctor},
        )


def bad():
    case = compared()
    case.put("checkpoint:", "client_run", ran_by_client(apart=1.5, perplexity=60.0))
    return case, (
        "vllm 0.32.0 computes perplexity 60 with these files and doctor 12.3; a token's log-probability differs by 1.5 nats "
        "on average, at most 0.15 expected"
    )


def good():
    case = compared()
    case.put("checkpoint:", "client_run", ran_by_client())
    return case


def more():
    """A client that refuses."""
    case = compared()
    case.put("checkpoint:", "client_run", ran_by_client(refused="ValueError: no kernel for it"))
    yield case
