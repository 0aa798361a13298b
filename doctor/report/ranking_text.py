"""What `doctor compare` found: which model is closest to its original, and whether that is more than chance."""

from __future__ import annotations

from doctor.evaluate.ranking_report import Contender, Difference, Ranking
from doctor.locale.catalogue import counted, say
from doctor.report.formats.json_report import dumps
from doctor.report.table_page import TablePage
from doctor.report.text import figure, number, percent, size


def ranking_page(found: Ranking) -> TablePage:
    """The Ranking as every format shows it."""
    mark, sentence = _verdict(found)
    rows = counted("{n:,} row", "{n:,} rows", found.rows)
    return TablePage(
        title=say(
            "{original} and {models}",
            original=found.original,
            models=counted("{n} model of it", "{n} models of it", len(found.models)),
        ),
        about=[
            say(
                "{rows} of {context} tokens, {tokens} in all, of {source}; original: perplexity {perplexity}, {size}",
                rows=rows,
                context=f"{found.context:,}",
                tokens=f"{found.tokens:,}",
                source=found.source,
                perplexity=figure(found.perplexity),
                size=size(found.original_bytes),
            )
        ],
        mark=mark,
        sentence=sentence,
        heads=[
            say("model"),
            say("stored as"),
            say("size"),
            say("bits"),
            say("KL, nats"),
            say("99 %"),
            say("perplexity"),
            say("same top token"),
        ],
        rows=[_row(model) for model in found.models],
        numbers=frozenset(range(2, 8)),
        droppable=(5, 1, 7),
        more=[_difference(found.models[0], d) for d in found.differences],
        notes=[say("[…]: where 95 of 100 resamplings of the rows lie; for a difference both models get the same ones")]
        if any(number(model.kl_span[0]) for model in found.models)
        else [say("fewer than 3 rows, or numbers that are not finite: no spread can be given; --rows raises them")],
        json=dumps(found.to_dict()),
    )


def _verdict(found: Ranking) -> tuple[str, str]:
    best, differences = found.models[0], found.differences
    broken = [model.name for model in found.models if model.nonfinite]
    if not number(best.kl):
        return "error", say("no model computes finite numbers only: {names}", names=", ".join(broken))
    if broken:
        return "error", say("{names}: logits with NaN or Inf", names=", ".join(broken))
    clear = [d for d in differences if d.clear]
    same = [d.name for d in differences if not d.clear]
    if clear and not same:
        return "ok", say("{name} is closer to its original, by more than the spread", name=best.name)
    if clear:
        return "ok", say(
            "{name} is closest to its original; its lead over {others} is within the spread",
            name=best.name,
            others=", ".join(same),
        )
    if not any(number(d.apart.kl_span[0]) for d in differences):
        return "warning", say("too few rows to tell the models apart: no spread is known")
    return "warning", say("no difference that is larger than the spread")


def _row(model: Contender) -> list[str]:
    ratio = f"{model.ratio - 1:+.1%}" if number(model.ratio) else figure(model.ratio)
    return [
        model.name,
        model.stored,
        size(model.bytes),
        f"{model.bits:.2f}",
        _short(model.kl) + _span(list(map(_short, model.kl_span)), model.kl_span),
        _short(model.kl_p99),
        ratio + _span([f"{x - 1:+.1%}" for x in model.ratio_span], model.ratio_span),
        percent(model.top1) + _span([f"{x:.1%}" for x in model.top1_span], model.top1_span),
    ]


def _difference(best: Contender, found: Difference) -> str:
    """How far another model is from the closest one."""
    d = found.apart
    if not number(d.kl):
        return say("{name}: not compared, its logits are not finite", name=found.name)
    said = {
        "name": found.name,
        "best": best.name,
        "kl": f"{d.kl:+.3g}" + _span([f"{x:+.3g}" for x in d.kl_span], d.kl_span),
        "ratio": f"{d.ratio - 1:+.2%}" + _span([f"{x - 1:+.2%}" for x in d.ratio_span], d.ratio_span),
        "top1": f"{d.top1:+.2%}" + _span([f"{x:+.2%}" for x in d.top1_span], d.top1_span),
    }
    if found.clear:
        return say(
            "{name} against {best}: KL {kl}, perplexity {ratio}, same top token {top1}: larger than the spread", **said
        )
    if not number(d.kl_span[0]):
        return say("{name} against {best}: KL {kl}, perplexity {ratio}, same top token {top1}", **said)
    return say("{name} against {best}: KL {kl}, perplexity {ratio}, same top token {top1}: within the spread", **said)


def _short(value: float) -> str:
    return f"{value:.3g}" if number(value) else figure(value)


def _span(shown: list[str], span: tuple[float, float]) -> str:
    return f" [{shown[0]}, {shown[1]}]" if all(map(number, span)) else ""
