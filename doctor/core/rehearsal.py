"""What quantizing would end with, found out elsewhere before any work, so that rules stay pure.

Nothing here builds a model. doctor.evaluate.clients.rehearsal runs quantize's own steps on headers and asks the client
about the result; without that the rules on it are skipped and say so.
"""

from dataclasses import dataclass

from doctor.core.facts import FactKey, Unavailable, fact, provide
from doctor.core.messages import _
from doctor.core.records import LoadProof


@dataclass(frozen=True)
class Rehearsal:
    """refused: why a run would stop before its first layer, and advice for that. proof: what the client would do with
    the output, None where nothing would be written. source: what transformers does with the files as they are, None
    where it was not asked. tokenizer: why transformers does not load the tokenizer. reason: why none of it is known.
    """

    refused: str = ""
    advice: str = ""
    proof: LoadProof | None = None
    source: LoadProof | None = None
    tokenizer: str = ""
    reason: str = ""


GIVEN_REHEARSAL: FactKey[Rehearsal | None] = provide(
    "given_rehearsal",
    "checkpoint",
    "header",
    "What a rehearsal of quantizing gave (rehearsal.Rehearsal); None without one.",
)


@fact("checkpoint")
def rehearsal(checkpoint, given_rehearsal) -> Rehearsal:
    """What quantizing would end with, by headers alone (rehearsal.Rehearsal)."""
    if given_rehearsal is None:
        raise Unavailable(_("transformers was not asked: that takes a directory, torch and transformers"))
    if given_rehearsal.reason:
        raise Unavailable(given_rehearsal.reason)
    return given_rehearsal
