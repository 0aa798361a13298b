"""The advice of `doctor kvcache`: how few bits the keys survive, why, and what to do."""

from typing import Any

from doctor.core.messages import Message, _
from doctor.evaluate.kvcache.predict import BROKEN, FINE, FP16_MAX, Fitness, advice

MOST_LISTED = 8  # layers named in a sentence


def conclude(fits: list[Fitness], biases: dict[int, dict], layers: int, reason: str = "") -> dict[str, Any]:
    """The advice for the whole model: level "Q4", "Q6", "never Q4" or "unknown", and sentences that say why and what to
    do.

    parts are the same sentences as [template, values], for renderings in another language. The simulation decides where
    there is one, since a large bias does no harm where the signal is large too; else the biases do.
    """
    level, sentences = _judged(fits, biases, layers, reason)
    return {
        "level": level,
        "sentences": [str(s) for s in sentences],
        "parts": [[s.template, dict(s.values)] for s in sentences],
    }


def _judged(fits: list[Fitness], biases: dict[int, dict], layers: int, reason: str) -> tuple[str, list[Message]]:
    if fits:
        level, sentences = _by_simulation(fits, layers)
        large = max(biases, key=lambda i: biases[i]["absmax"], default=None)
        if level == "Q4" and large is not None and biases[large]["key_bits"] > 4:
            sentences.append(
                _(
                    "The key bias of layer {layer} reaches {size}, by its size alone a reason for {bits} bits; against "
                    "this layer's queries it weighs little. --measure settles it.",
                    layer=large,
                    size=f"{biases[large]['absmax']:.3g}",
                    bits=biases[large]["key_bits"],
                )
            )
        return level, sentences
    if not biases:
        return "unknown", [
            _("Not judged: {reason}", reason=reason or _("there is no layer with plain keys.")),
            _("Q8 is the choice that needs no judgement; --measure decides."),
        ]
    worst = max(biases, key=lambda i: biases[i]["absmax"])
    level = {4: "Q4", 6: "Q6", 8: "never Q4"}[max(b["key_bits"] for b in biases.values())]
    by_bias = _(
        "By the key biases alone, of which the largest is {size}, in layer {layer}. The layers could not be simulated: "
        "{reason}",
        size=f"{biases[worst]['absmax']:.3g}",
        layer=worst,
        reason=reason,
    )
    return level, [by_bias, _what_to_do(level)]


def _what_to_do(level: str) -> Message:
    if level == "Q4":
        return _(
            "Q4 is fine where memory is short; verify recall over long contexts, which no short test shows. Q6 and Q8 "
            "cost next to nothing."
        )
    if level == "Q6":
        return _(
            "Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k q8_0 --cache-type-v q4_0. Q4 "
            "costs some quality."
        )
    return _(
        "Never store these keys in 4 bits. Take Q6 (8-bit keys, 4-bit values): ExLlamaV2 Q6, llama.cpp --cache-type-k "
        "q8_0 --cache-type-v q4_0; Q8 where memory allows. In vLLM leave the cache dtype on auto."
    )


def _error_of(level: str, layer: int, error: float) -> Message:
    """How far 4-bit keys move the logits of the worst layer, and what such an error does."""
    values: dict[str, Any] = {"layer": layer, "error": f"{error:.2f}"}
    if level == "Q4":
        return _(
            "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other "
            "layer: below {fine}, where 4 bits cost a few percent of perplexity.",
            fine=f"{FINE:g}",
            **values,
        )
    if level == "Q6":
        return _(
            "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other "
            "layer: between {fine} and {broken}, where text gets worse.",
            fine=f"{FINE:g}",
            broken=f"{BROKEN:g}",
            **values,
        )
    return _(
        "4-bit keys move the attention logits of layer {layer} by {error} (rms), more than those of any other layer: "
        "above {broken}, where heads attend to the wrong tokens.",
        broken=f"{BROKEN:g}",
        **values,
    )


def _by_simulation(fits: list[Fitness], layers: int) -> tuple[str, list[Message]]:
    worst = max(fits, key=lambda f: nan_last(f.errors["4-bit"]))
    error = worst.errors["4-bit"]
    level = advice(error)
    sentences = [_error_of(level, worst.block, error), _what_to_do(level)]
    eight, fp8 = (max((f.errors[k] for f in fits), key=nan_last) for k in ("8-bit", "FP8"))
    if level != "never Q4" and not fp8 <= error:
        sentences.append(
            _("FP8 (e5m2) keys move them by {fp8}, more than 4-bit keys do, and take more room.", fp8=f"{fp8:.2f}")
        )
    if level == "never Q4":
        bad = [f.block for f in fits if f.advice == "never Q4"]
        sentences.append(
            _(
                "{n} of {layers} layers are this bad ({list}): an engine with a type per layer needs wide keys only "
                "there.",
                n=len(bad),
                layers=layers,
                list=_first(bad),
            )
        )
        values = {"eight": f"{eight:.2f}", "fp8": f"{fp8:.2f}"}
        sentences.append(
            _("There 8-bit keys move the logits by at most {eight}, FP8 (e5m2) by {fp8}.", **values)
            if eight <= BROKEN
            else _(
                "There 8-bit keys move the logits by at most {eight}, FP8 (e5m2) by {fp8}. Run --measure before "
                "relying on 8 bits.",
                **values,
            )
        )
    peak = max(fits, key=lambda f: nan_last(f.peak))
    if not peak.peak <= FP16_MAX:
        sentences.append(
            _(
                "q·k reaches {peak} in layer {layer}: attention that multiplies in float16 before it scales overflows "
                "(65,504), whatever the cache.",
                peak=f"{peak.peak:,.0f}",
                layer=peak.block,
            )
        )
    return level, sentences


def nan_last(value: float) -> float:
    """A key to sort by, for which NaN is the largest."""
    return value if value == value else float("inf")


def _first(numbers: list[int]) -> str:
    shown, more = ", ".join(map(str, numbers[:MOST_LISTED])), len(numbers) - MOST_LISTED
    return _("{shown} and {n} more", shown=shown, n=more) if more > 0 else shown
