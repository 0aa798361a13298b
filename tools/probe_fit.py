"""Expressions over config keys that give what two models of a family show: sizes of tensors, and kinds of layers."""

import itertools
from collections.abc import Iterable, Mapping

from probe_families import CONDITIONS, FORMULAS, GENERIC, NO_SIZE, OLDER_WORDS, WITH_OLDER_WORDS
from probe_model import Model, ProbeError

from doctor.model.expressions import evaluate, holds, keys_of


def fit_size(values: tuple[int, int], models: tuple[Model, Model], hint: str | None, of_heads: bool = False) -> str:
    """An expression that gives both models' size of one axis: the hint where it fits, else the simplest of a search.

    of_heads: the axis is that of all query heads side by side.
    """

    def fits(expression: str) -> bool:
        return all(evaluate(expression, m.size) == v for m, v in zip(models, values, strict=True))

    if hint is not None and fits(hint) and (keys_of(hint) or values[0] < 5):
        return hint
    numbers = {k: tuple(m.size(k) for m in models) for k in models[0].config}
    numbers["head_dim"] = tuple(m.size("head_dim") for m in models)
    keys = sorted(
        k
        for k, v in numbers.items()
        if all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in v)
        and v[0] != v[1]
        and not NO_SIZE.search(k)
    )
    if values[0] == values[1]:
        return str(values[0])
    # Equal values under two names: those of GENERIC come first, then the shortest.
    keys.sort(key=lambda k: (GENERIC.index(k) if k in GENERIC else len(GENERIC), len(k)))
    pairs = list(itertools.combinations_with_replacement(keys, 2))
    # Without a head_dim of the class's own this is hidden_size, and a config.json may still state one.
    heads = "num_attention_heads * head_dim"
    for candidates in (
        [heads] if of_heads else [],
        keys,
        FORMULAS,
        (f"{n} * {k}" for n in (2, 3, 4, 6) for k in keys),
        (f"{a} * {b}" for a, b in pairs),
        (f"{a} + {b}" for a, b in pairs if a != b),
        (f"{a} + 2 * {b}" for a in keys for b in keys if a != b),
        (f"2 * {a} * {b}" for a, b in pairs),
        (f"{k} // {n}" for n in (2, 4, 8) for k in keys),
        (f"{a} // {b}" for a in keys for b in keys if a != b),
        (f"{a} * ({b} + {c})" for a in keys for b, c in pairs if b != c),
        (f"({a} + 2 * {b}) * {c}" for a in keys for b in keys for c in keys if a != b),
        (f"{a} * {b} + {n} * {c} * {d}" for n in (2, 1) for a, b in pairs for c, d in pairs),
        (f"2 * {a} * {b} + {c} + 2 * {d} * {e}" for a, b in pairs for c in keys for d, e in pairs),
    ):
        found = next((c for c in candidates if fits(c)), None)
        if found:
            return found
    raise ProbeError(f"no expression gives sizes {values[0]} and {values[1]}")


def fit_kind(
    layers: tuple[set[int], set[int]], models: tuple[Model, Model], hints: Mapping[str, tuple[str, ...]]
) -> tuple[str, tuple[str, ...]]:
    """(name of the kind, conditions) that are true for exactly these layers of both models; the hints' own where they
    fit.
    """

    def fits(condition: str) -> bool:
        return all(
            {i for i in range(m.layers) if holds((condition,), m.config.get, i)} == own
            and all(holds((condition,), m.config.get, i) is not None for i in range(m.layers))
            for m, own in zip(models, layers, strict=True)
        )

    for kind, conditions in hints.items():
        if fits(conditions[0]):
            return kind, tuple(
                c for c in conditions if fits(c) or not all(n in m.config for m in models for n in keys_of(c))
            )
    found = [(kind, text) for kind, text in (*_by_word(models), *CONDITIONS) if fits(text)]
    if not found:
        raise ProbeError(f"no condition gives the layers {sorted(layers[0])} and {sorted(layers[1])}")
    return found[0][0], tuple(dict.fromkeys(text for kind, text in found))


def _by_word(models: tuple[Model, Model]) -> Iterable[tuple[str, str]]:
    """Conditions on the lists of words that say what each layer is, with (kind, condition) for one to three words."""
    for key in ("layer_types", "layers_block_type"):
        words = sorted({w for m in models for w in m.config.get(key) or ()})
        for count in (1, 2, 3):
            for some in itertools.combinations(words, count):
                older = [
                    OLDER_WORDS[w]
                    for w in some
                    if w in OLDER_WORDS and models[0].config["model_type"] in WITH_OLDER_WORDS
                ]
                yield (
                    "_or_".join(some),
                    f"{key}[i] in ({', '.join(repr(w) for w in (*some, *older))})"
                    if (*older, *some)[1:]
                    else f"{key}[i] == {some[0]!r}",
                )
