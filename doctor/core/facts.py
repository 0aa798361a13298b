"""The registry of facts: the only words in which a rule may ask.

A fact belongs to a scope (checkpoint, shard, tensor, linear) and has a cost: the work that a run must do before the
fact is known (listing, header, values, tokenizer, calibration, run, output). It is either *provided* by a producer (the
scan, the quantizer) or *derived*: a pure function of other facts, computed once, when a rule first asks for it. A fact
that this run did not produce is `Unavailable` with the reason, and the rules that need it are skipped with that reason:
silence is never a pass.

A parameter with the default None is a fact that its asker can do without: it gets None where there is none.

`every_NAME` is a fact of the checkpoint: the fact NAME of all subjects that have it, as a dict by the subject's name.
It is how one rule speaks of two tensors.

Rules and derived facts ask by parameter name. Other code asks the store (doctor.core.store) by a `FactKey`, which
carries the type of the value: `store.get(SPEC)` is a ModelSpec.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

COSTS = ("listing", "header", "values", "tokenizer", "calibration", "run", "output")
SCOPES = ("checkpoint", "shard", "tensor", "linear")
CHECKPOINT = "checkpoint:"

T = TypeVar("T")


class Unavailable(Exception):
    """This fact does not exist in this run; the text says why and what would produce it."""

    @property
    def reason(self) -> str:
        """The text, as the Message that it was raised with."""
        return self.args[0] if self.args else ""


@dataclass(frozen=True)
class Fact:
    """One entry of the registry. `compute` is None for a provided fact; `needs` and then `wants` are its parameters
    after the subject.
    """

    name: str
    scope: str
    cost: str
    doc: str
    compute: Callable | None = None
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactKey(Generic[T]):
    """The name of a fact together with the type of its value, for code that asks the store."""

    name: str


FACTS: dict[str, Fact] = {}


def provide(name: str, scope: str, cost: str, doc: str) -> FactKey[Any]:
    """Declare a fact that some producer puts into the store. Annotate the key with the value's type:
    `FactKey[Recipe]`.
    """
    _register(Fact(name, scope, cost, doc))
    return FactKey(name)


def key_of(function: Callable[..., T]) -> FactKey[T]:
    """The key of a derived fact, with the type that its function returns."""
    return FactKey(function.__name__)


def fact(scope: str, cost: str | None = None):
    """Declare a derived fact: a function whose first parameter is the scope's subject and whose others are facts.

    Its cost is the highest of what it needs, unless given.
    """

    def wrap(function: Callable[..., T]) -> Callable[..., T]:
        name = function.__name__
        subject, needs, wants = parameters(function)
        if subject != scope:
            raise TypeError(f"fact {name}: the first parameter must be {scope!r}, the subject")
        own_cost = cost or highest_cost(needs, name)
        # Its value is kept: a fact that is known only later must not be among its wants.
        if COSTS.index(highest_cost(wants, name)) > COSTS.index(own_cost):
            raise TypeError(f"fact {name}: one of {', '.join(wants)} costs more than {own_cost}")
        _register(Fact(name, scope, own_cost, inspect.getdoc(function) or "", function, needs, wants))
        return function

    return wrap


def parameters(function: Callable) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(the first parameter, the others, those of them with a default, which must come last). Raises TypeError."""
    code = function.__code__  # inspect.signature() takes twenty times as long, for 300 functions at each start
    names, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    if (
        not names
        or any(d is not None for d in defaults)
        or code.co_kwonlyargcount
        or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    ):
        raise TypeError(
            f"{function.__name__}: takes a subject and facts; one that it can do without has the default None"
        )
    first_want = len(names) - len(defaults)
    return names[0], names[1:first_want], names[max(first_want, 1) :]


def known_fact(name: str) -> Fact | None:
    """The registry's entry of a name, or the one that gathers a fact over all its subjects; None for any other name."""
    if name in FACTS or not name.startswith("every_"):
        return FACTS.get(name)
    one = FACTS.get(name.removeprefix("every_"))
    if one is None or one.scope == "checkpoint":
        return None
    return Fact(name, "checkpoint", one.cost, f"{one.doc} Of every {one.scope}, by name.", needs=(one.name,))


def _register(new: Fact) -> None:
    old = FACTS.get(new.name)
    if old is not None and (old.scope, old.doc) != (new.scope, new.doc):
        raise TypeError(f"fact {new.name}: declared twice")
    if new.scope not in SCOPES or new.cost not in COSTS:
        raise TypeError(f"fact {new.name}: scope {new.scope!r} or cost {new.cost!r} is unknown")
    FACTS[new.name] = new


def highest_cost(needs: Iterable[str], asker: str) -> str:
    """The cost of knowing all of these facts. Raises TypeError, with the nearest names, for a name that is no fact."""
    cost = "listing"
    for name in needs:
        known = known_fact(name)
        if known is None:
            import difflib

            near = ", ".join(difflib.get_close_matches(name, FACTS, 5, 0.3)) or ", ".join(sorted(FACTS))
            raise TypeError(f"{asker}: there is no fact {name!r}; nearest: {near}")
        cost = max(cost, known.cost, key=COSTS.index)
    return cost


def closure(names: Iterable[str]) -> set[str]:
    """Every fact that these facts rest on, themselves included."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        known = known_fact(name)
        if name not in seen and known is not None:
            seen.add(name)
            todo += (*known.needs, *known.wants)
    return seen


def asks(cost: str, names: Iterable[str]) -> bool:
    """Whether any of these facts rests on one of this cost."""
    found = (known_fact(name) for name in closure(names))
    return any(known is not None and known.cost == cost for known in found)


def fact_table(scope: str = "", cost: str = "") -> list[Fact]:
    """Every declared fact, by scope, then cost, then name; only those of one scope or cost if given.

    Facts are declared as their modules are imported: load the rules first, some of which declare their own.
    """
    found = [one for one in FACTS.values() if scope in ("", one.scope) and cost in ("", one.cost)]
    return sorted(found, key=lambda one: (SCOPES.index(one.scope), COSTS.index(one.cost), one.name))
