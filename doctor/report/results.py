"""The numbers of a quantization or of a comparison with the original, a line each."""

from doctor.core.methods import is_rounding
from doctor.core.records import damp_raised
from doctor.lint.engine import Report
from doctor.locale.catalogue import counted, say, translated
from doctor.report.text import figure, number, percent, safe, seconds, size, thousands

FP16_MAX = 65504
WORST = 3  # linears that are named


def results(report: Report) -> list[tuple[str, str]]:
    """(what, numbers) of a quantization or a comparison; [] after a check."""
    lines = []
    done = [x for x in report.linears if isinstance(x, dict)]
    if done:
        kinds = {o: sum(x.get("outcome") == o for x in done) for o in dict.fromkeys(x.get("outcome", "") for x in done)}
        solves = [x["solve"] for x in done if x.get("solve")]
        raised = sum(map(damp_raised, solves))
        better = [
            s["loss"] / s["rtn_loss"]
            for s in solves
            if not is_rounding(s.get("outcome", ""))
            and number(s["loss"])
            and number(s["rtn_loss"])
            and s["rtn_loss"] > 0
        ]
        text = ", ".join(f"{n:,} {o}" for o, n in kinds.items())
        text += say("; damp raised for {n}", n=raised) if raised else ""
        text += (
            say("; error {share} of plain rounding's (median)", share=f"{sorted(better)[len(better) // 2]:.0%}")
            if better
            else ""
        )
        lines.append((say("linears"), text))
    if report.extra.get("allocation"):
        lines.append((say("widths"), _widths(report.extra["allocation"])))
    if report.extra.get("tuning"):
        lines.append((say("tuning"), _tuning(report.extra["tuning"])))
    worst = _worst(done)
    lines += [(say("worst"), worst)] if worst else []
    if report.extra.get("run"):
        lines.append((say("size"), _run(report)))
    if report.extra.get("receipt_only"):
        known = {"versions": say("versions"), "calibration": say("calibration"), "note": say("note")}
        lines += [(known[kind], text) for kind, text, _more in report.extra["receipt"]["steps"] if kind in known]
    c = report.extra.get("comparison")
    if c:
        before, after = c["perplexity_original"], c["perplexity_quantized"]
        change = ""
        if number(before) and number(after) and before > 0:
            change = f" ({_change(after / before)}{_span(c.get('ratio_span'), less=1)})"
        span = say(
            "{change} on {tokens} tokens, {context} at a time",
            change=change,
            tokens=f"{c['tokens']:,}",
            context=f"{c['context']:,}",
        )
        lines.append((say("perplexity"), f"{figure(before)} → {figure(after)}{span}"))
        lines += (
            [(say("layers"), _layers(c["own_errors"], c["block_errors"]))] if c.get("own_errors") and not done else []
        )
        lines.append(
            (
                say("divergence"),
                say(
                    "KL {mean} nats on average, {p99} at the 99th percentile; same next token {top1}",
                    mean=figure(c["kl_mean"]) + _span(c.get("kl_span")),
                    p99=figure(c["kl_p99"]),
                    top1=percent(c["top1_agreement"]) + _span(c.get("top1_span"), less=0),
                ),
            )
        )
        if number(c.get("kl_max")):
            lines.append(
                (
                    say("tail"),
                    say(
                        "KL {median} in the middle, {p999} at 99.9 %, {most} at the most",
                        median=figure(c["kl_median"]),
                        p999=figure(c["kl_p999"]),
                        most=figure(c["kl_max"]),
                    ),
                )
            )
        if c.get("same_experts") or c.get("experts_unseen"):
            lines.append((say("experts"), _experts(list(c.get("same_experts") or ()), c.get("experts_unseen") or 0)))
        if c.get("rounded_inputs"):
            told = counted(
                "rounded in {n:,} linear, as engines do", "rounded in {n:,} linears, as engines do", c["rounded_inputs"]
            )
            lines.append((say("inputs"), told))
        if done:  # at the end of a quantization: what else was looked at, `doctor verify` shows
            c = {}
        if number(c.get("entropy_quantized")) or number(c.get("entropy_original")):
            lines.append(
                (
                    say("entropy"),
                    say(
                        "{before} → {after} nats a token; one and the same first choice at most {one_before} → "
                        "{one_after}",
                        before=figure(c["entropy_original"]),
                        after=figure(c["entropy_quantized"]),
                        one_before=percent(c["one_choice_original"]),
                        one_after=percent(c["one_choice"]),
                    ),
                )
            )
        if c:
            lines.append(
                (
                    say("replies"),
                    say(
                        "{tokens}, longest repeat {repeat}, token 0 {share}",
                        tokens=counted("{n:,} token", "{n:,} tokens", c["generated"]),
                        repeat=c["longest_repeat"],
                        share=percent(c["token0_share"]),
                    )
                    if c["generated"]
                    else say("not generated: {reason}", reason=_no_replies(report)),
                )
            )
        if c.get("half"):
            lines.append((say("float16"), _sixteen_bits(c["half"])))
    if report.extra.get("own_measure"):
        lines += _own_measure(report.extra["own_measure"])
    lines += [(say("task"), _task(score)) for score in report.extra.get("tasks", ())]
    if report.extra.get("load_proof"):
        lines.append((say("loading"), _loading(report.extra["load_proof"])))
    missing = (("not_proved", say("loading")), ("not_compared", say("divergence")))
    lines += [(label, translated(report.extra[key])) for key, label in missing if report.extra.get(key)]
    if report.extra.get("client_run"):
        lines.append((say("client"), _client(report.extra["client_run"])))
    return [(label, safe(text)) for label, text in lines]


def headline(report: Report) -> list[tuple[str, str]]:
    """(what, figure) of what one asks first of a quantized model: size, bits a weight, divergence. [] after a check."""
    found = []
    run, c = report.extra.get("run"), report.extra.get("comparison")
    if run:
        found += [
            (say("size"), f"{size(run['source_bytes'])} → {size(run['output_bytes'])}"),
            (say("bits a weight"), f"{run['bits']:.2f}"),
        ]
    if c:
        found.append((say("KL, nats"), figure(c.get("kl_mean")) + _span(c.get("kl_span"))))
        before, after = c.get("perplexity_original"), c.get("perplexity_quantized")
        if number(before) and number(after) and before > 0:
            found.append((say("perplexity"), f"{_change(after / before)}{_span(c.get('ratio_span'), less=1)}"))
    return [(label, safe(text)) for label, text in found]


def _widths(a: dict) -> str:
    """What a budget was spent on, and what else it could have bought."""
    kinds = ", ".join(say("{n} × {bits} bits", n=n, bits=bits) for bits, n in a["linears"].items())
    return say(
        "mixture {kinds}: {bpw} bits a weight, KL {kl}; {name} for all: {same}, KL {uniform}; written: {winner}",
        kinds=kinds,
        bpw=f"{a['bpw']:.3f}",
        kl=figure(a["kl"]),
        name=a["uniform"],
        same=f"{a['uniform_bpw']:.3f}",
        uniform=figure(a["kl_uniform"]),
        winner=say("the mixture") if a["written"] == "mixture" else a["uniform"],
    )


def _tuning(t: dict) -> str:
    """What tuning the scales did, or why it was not done."""
    if t["reason"]:
        return say("not done: {reason}", reason=translated(t["reason"]))
    if t["unseen"]:
        rows = counted(
            "{n} row that neither calibrated nor trained", "{n} rows that neither calibrated nor trained", t["watched"]
        )
    else:
        rows = counted(
            "{n} calibration row that did not train", "{n} calibration rows that did not train", t["watched"]
        )
    if not t["written"]:
        return say("KL {start} did not fall on {rows}: scales stay as they are", start=figure(t["start"]), rows=rows)
    change = f"{t['end'] / t['start'] - 1:+.0%}" if number(t["start"]) and t["start"] > 0 else ""
    return say(
        "scales and norms on {trained} rows: KL {start} → {end} ({change}) on {rows}",
        trained=t["rows"],
        start=figure(t["start"]),
        end=figure(t["end"]),
        change=change,
        rows=rows,
    )


def _worst(done: list[dict]) -> str:
    """The linears that lost most: the energy of their error as a share of that of what they compute."""
    losses = [(x["solve"]["loss"], x["name"]) for x in done if x.get("solve") and number(x["solve"].get("loss"))]
    worst = [f"{safe(name)} {loss:.2%}" for loss, name in sorted(losses, reverse=True)[:WORST] if loss > 0]
    return ", ".join(worst)


def _task(score: dict) -> str:
    """Scores of both models on one task."""
    before, after = score["original"], score["quantized"]
    low, high = score.get("span") or (None, None)
    if number(low) and number(high):
        apart = f"{after - before:+.1%} [{low:+.1%}, {high:+.1%}]"
    else:
        apart = f"{after - before:+.4g}"
        errors = [score.get("original_error"), score.get("quantized_error")]
        if all(map(number, errors)):
            apart += say(", standard errors {first} and {second}", first=figure(errors[0]), second=figure(errors[1]))
    more = ""
    if score.get("questions"):
        more = say(
            "; {questions}, the same choice on {same}",
            questions=counted("{n:,} question", "{n:,} questions", score["questions"]),
            same=percent(score["same"]),
        )
    return f"{score['task']} {score['metric']} {figure(before)} → {figure(after)} ({apart}){more}"


def _run(report: Report) -> str:
    """Bytes before and after, and what it took."""
    run = report.extra["run"]
    return say(
        "{before} → {after}, {bits} bits a weight; {seconds}, {peak} of memory at the peak",
        before=size(run["source_bytes"]),
        after=size(run["output_bytes"]),
        bits=f"{run['bits']:.2f}",
        seconds=seconds(report.seconds),
        peak=size(run["peak_bytes"]),
    )


def _own_measure(m: dict) -> list[tuple[str, str]]:
    """Embeddings, and scores where there are any."""
    embeddings = say(
        "cosine {mean} on average over {tokens}, {least} at the least; {pooled} of the rows' means",
        mean=figure(m["cosine"]),
        tokens=counted("{n:,} token", "{n:,} tokens", m["tokens"]),
        least=figure(m["cosine_least"]),
        pooled=figure(m["cosine_pooled"]),
    )
    lines = [(say("decoder states") if m["kind"] == "sequence" else say("embeddings"), embeddings)]
    if m["kind"] == "score":
        scores = say(
            "correlation {correlation} over {rows}, apart by {apart} of their spread",
            correlation=figure(m["score_correlation"]),
            rows=counted("{n:,} row", "{n:,} rows", m["rows"]),
            apart=percent(m["score_apart"]),
        )
        lines.append((say("scores"), scores))
    return lines


def _client(ran: dict) -> str:
    """What the client computes with the quantized files."""
    if ran["reason"]:
        return say("not asked: {reason}", reason=translated(ran["reason"]))
    if ran["refused"]:
        return say("{client} does not run it: {error}", client=ran["client"], error=translated(ran["refused"]))
    return say(
        "{client} computes perplexity {theirs} with these files, doctor {ours}; a token's log-probability differs by "
        "{apart} nats on average, {most} at the 99th percentile",
        client=ran["client"],
        theirs=figure(ran["perplexity"]),
        ours=figure(ran["perplexity_doctor"]),
        apart=figure(ran["apart"]),
        most=figure(ran["apart_p99"]),
    )


def _loading(proof: dict) -> str:
    """What the client's own loading code did with the quantized checkpoint."""
    if proof["reason"]:
        return say("not proved: {reason}", reason=translated(proof["reason"]))
    if proof["refused"]:
        return say("{client} refuses it: {error}", client=proof["client"], error=proof["refused"])
    wrong = sum(len(proof[kind]) for kind in ("missing", "unexpected", "mismatched"))
    if wrong:
        return say("{client} does not load it whole: see O617", client=proof["client"])
    text = say("{client} loads every parameter as {name}", client=proof["client"], name=proof["architecture"])
    if proof["compared"] and not proof["differing"]:
        same = say(
            "{library} unpacks {n} sampled linears as doctor does", library=proof["library"], n=proof["compared"]
        )
        return f"{text}; {same}"
    return text


def _layers(own: list, carried: list) -> str:
    """The error of each layer alone, and what is carried along to the end."""
    finite = sorted(e for e in own if number(e))
    worst = max(range(len(own)), key=lambda i: own[i] if number(own[i]) else float("inf"))
    return say(
        "each alone off by {median} (median), layer {worst} the most by {most}; carried along to the last layer {last}",
        median=percent(finite[len(finite) // 2]) if finite else "NaN",
        worst=worst,
        most=percent(own[worst]),
        last=percent(carried[-1]),
    )


def _experts(same: list, unseen: int) -> str:
    """How many choices of an expert stay as they were, over the layers of a mixture."""
    parts = []
    if same:
        layer, least = min(same, key=lambda x: x[1] if number(x[1]) else float("-inf"))
        shares = [share for _layer, share in same]
        mean = sum(shares) / len(shares) if all(map(number, shares)) else float("nan")
        parts.append(
            say(
                "{mean} of the choices are the original's, layer {layer} the fewest with {least}",
                mean=percent(mean),
                layer=layer,
                least=percent(least),
            )
        )
    if unseen:
        parts.append(
            counted("{n:,} layer whose choices were not seen", "{n:,} layers whose choices were not seen", unseen)
        )
    return "; ".join(parts)


def _span(span: object, less: int | None = None) -> str:
    """` [0.07, 0.11]`: where 95 of 100 resamplings of the rows lie; less: in percent above it."""
    if not isinstance(span, (list, tuple)) or len(span) != 2 or not all(map(number, span)):
        return ""
    low, high = (figure(x) if less is None else f"{x - less:+.1%}" if less else f"{x:.1%}" for x in span)
    return f" [{low}, {high}]"


def _change(ratio: float) -> str:
    """`+5.0%`; a factor from eleven times on, where percents only count digits."""
    return f"{ratio - 1:+.1%}" if ratio <= 11 else f"× {ratio:.2g}"


def _no_replies(report: Report) -> str:
    given = report.extra.get("reply_bytes")
    if given is not None and number(given):
        return say(
            "a whole model in float32 does not fit the {size} GiB given to it; --memory raises it",
            size=f"{given / 2**30:.1f}",
        )
    return translated(report.extra.get("not_generated") or "") or say("no prompts")


def _sixteen_bits(half: dict) -> str:
    """Whether the original fits float16, and what rounding to each 16-bit type does to its predictions."""
    shift = say(
        "KL of the original rounded to float16 {fp16}, to bfloat16 {bf16}",
        fp16=figure(half["kl_float16"]),
        bf16=figure(half["kl_bfloat16"]),
    )
    if half["first"] is not None:
        place, size = half["first"]
        return (
            say(
                "overflows: {place} reaches {size}, float16 ends at 65,504",
                place=translated(place),
                size=thousands(size),
            )
            + "; "
            + shift
        )
    used = percent(half["absmax"] / FP16_MAX) if number(half["absmax"]) else half["absmax"]
    return (
        say(
            "the original fits: its largest activation is {size}, {share} of the range",
            size=thousands(half["absmax"]),
            share=used,
        )
        + f" ({translated(half['place'])}); "
        + shift
    )
