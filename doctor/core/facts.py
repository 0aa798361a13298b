"""The store of facts, and the registry of what a fact is: the only words in which a rule may ask.

A fact belongs to a scope (checkpoint, shard, tensor, linear) and to the stage that it costs (listing, header, values,
tokenizer, calibration, run, output). It is either *provided* by a producer (the scan, the quantizer) or *derived*: a
pure function of other facts, worked out once, when a rule first asks. A fact that was not produced in this run is
`Unavailable` with the reason, and the rules that need it are skipped with that reason: silence is never a pass.

A parameter with the default None is a fact that its asker can do without: it gets None where there is none.

`every_NAME` is a fact of the checkpoint: the fact NAME of all subjects that have it, as a dict by the subject's name.
It is how one rule speaks of two tensors.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

STAGES = ("listing", "header", "values", "tokenizer", "calibration", "run", "output")
SCOPES = ("checkpoint", "shard", "tensor", "linear")
CHECKPOINT = "checkpoint:"


class Unavailable(Exception):
    """This fact does not exist in this run; the text says why and what would make it."""


@dataclass(frozen=True)
class Fact:
    """One entry of the registry. `compute` is None for a provided fact; `needs` and then `wants` are its parameters
    after the subject.
    """

    name: str
    scope: str
    stage: str
    doc: str
    compute: Callable | None = None
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


FACTS: dict[str, Fact] = {}


def provide(name: str, scope: str, stage: str, doc: str) -> None:
    """Declare a fact that some producer puts into the store."""
    _register(Fact(name, scope, stage, doc))


def fact(scope: str, stage: str | None = None):
    """Declare a derived fact: a function whose first parameter is the scope's subject and whose others are facts.

    Its stage is the latest of what it needs, unless said otherwise.
    """

    def wrap(function: Callable) -> Callable:
        subject, needs, wants = parameters(function)
        if subject != scope:
            raise TypeError(f"fact {function.__name__}: the first parameter must be {scope!r}, the subject")
        own_stage = stage or latest_stage(needs, function.__name__)
        # Its value is kept: what might come later than it is worked out must not be among its wants.
        if STAGES.index(latest_stage(wants, function.__name__)) > STAGES.index(own_stage):
            raise TypeError(f"fact {function.__name__}: one of {', '.join(wants)} is of a later stage than {own_stage}")
        _register(Fact(function.__name__, scope, own_stage, inspect.getdoc(function) or "", function, needs, wants))
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
    """The registry's entry of a name, or the one that gathers a fact over all its subjects; None for what is no
    fact.
    """
    if name in FACTS or not name.startswith("every_"):
        return FACTS.get(name)
    one = FACTS.get(name.removeprefix("every_"))
    if one is None or one.scope == "checkpoint":
        return None
    return Fact(name, "checkpoint", one.stage, f"{one.doc} Of every {one.scope}, by name.", needs=(one.name,))


def _register(new: Fact) -> None:
    old = FACTS.get(new.name)
    if old is not None and (old.scope, old.doc) != (new.scope, new.doc):
        raise TypeError(f"fact {new.name}: declared twice")
    if new.scope not in SCOPES or new.stage not in STAGES:
        raise TypeError(f"fact {new.name}: scope {new.scope!r} or stage {new.stage!r} is unknown")
    FACTS[new.name] = new


def latest_stage(needs: Iterable[str], asker: str) -> str:
    """The most expensive stage among facts. Raises TypeError for a name that is no fact, with the nearest ones."""
    stage = "listing"
    for name in needs:
        known = known_fact(name)
        if known is None:
            import difflib

            near = ", ".join(difflib.get_close_matches(name, FACTS, 5, 0.3)) or ", ".join(sorted(FACTS))
            raise TypeError(f"{asker}: there is no fact {name!r}; nearest: {near}")
        stage = max(stage, known.stage, key=STAGES.index)
    return stage


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


def asks(stage: str, names: Iterable[str]) -> bool:
    """Whether any of these facts rests on one of this stage."""
    return any(known_fact(n).stage == stage for n in closure(names))


class Store:
    """Facts of one run. Subjects are strings ("tensor:NAME"); each has an object that rules get as their first
    argument.
    """

    def __init__(self):
        self._objects: dict[str, dict[str, object]] = {scope: {} for scope in SCOPES}
        self._values: dict[tuple[str, str], object] = {}
        self._put: set[str] = set()  # names of the provided facts that some subject has
        self._failed: dict[tuple[str, str], Unavailable] = {}
        self._reasons: dict[str, str] = {}
        self._partial: set[str] = set()
        self._weight_of: dict[str, str] = {}

    def add_subject(self, scope: str, subject: str, thing: object, weight: str | None = None) -> None:
        """Declare a subject. A linear names its `weight` subject ("tensor:…"), whose facts its rules may ask for
        too.
        """
        self._objects[scope][subject] = thing
        if weight is not None:
            self._weight_of[subject] = weight

    def subjects(self, scope: str) -> dict[str, object]:
        """Subject -> the object that stands for it, in the order they were added."""
        return self._objects[scope]

    def put(self, subject: str, name: str, value: object) -> None:
        """Record a provided fact; what could not be derived without it is tried again."""
        known = FACTS.get(name)
        if known is None or known.compute is not None:
            raise TypeError(f"fact {name!r} is not declared as provided")
        self._values[subject, name] = value
        self._put.add(name)
        self._failed.clear()

    def carry(self, other: "Store", subjects: Iterable[str]) -> None:
        """Take over the provided facts of these subjects from another run, whose bytes are the same."""
        wanted = set(subjects)
        for (subject, name), value in other._values.items():
            if subject in wanted and name in FACTS and FACTS[name].compute is None:
                self._values[subject, name] = value
                self._put.add(name)

    def say_missing(self, stage: str, reason: str) -> None:
        """Why facts of this stage do not exist in this run."""
        self._reasons[stage] = reason

    def say_partial(self, stage: str, reason: str) -> None:
        """Facts of this stage exist for some subjects only: what needs those of every subject cannot be judged."""
        self._reasons[stage] = reason
        self._partial.add(stage)

    def say_produced(self, stage: str) -> None:
        """Facts of this stage have been produced; what a subject lacks now, it has not got."""
        self._reasons.pop(stage, None)

    def has(self, subject: str, name: str) -> bool:
        try:
            self.get(subject, name)
        except Unavailable:
            return False
        return True

    def get(self, subject: str, name: str) -> object:
        """The fact's value for a subject. Raises Unavailable with the reason where there is none."""
        known = known_fact(name)
        holder = self._holder(subject, known)
        key = (holder, name)
        if key in self._values:
            return self._values[key]
        if key in self._failed:
            raise self._failed[key]
        if name.startswith("every_") and known.needs:
            self._values[key] = self._every(known.needs[0])
            return self._values[key]
        if known.compute is None:
            raise Unavailable(
                self._reasons.get(
                    known.stage, f"no {name.replace('_', ' ')} for {holder.partition(':')[2] or 'this checkpoint'}"
                )
            )
        try:
            thing = self._objects[known.scope].get(holder)
            value = known.compute(thing, *self.values(holder, known))
        except Unavailable as error:
            self._failed[key] = error
            raise
        self._values[key] = value
        return value

    def values(self, subject: str, asker) -> list:
        """What a fact or rule gets after its subject: its needs, then its wants. Raises Unavailable where a need is."""
        return [
            *(self.get(subject, n) for n in asker.needs),
            *(self.get(subject, n) if self.has(subject, n) else None for n in asker.wants),
        ]

    def _every(self, name: str) -> dict[str, object]:
        """name of the subject -> its fact. Raises Unavailable where no subject has it and the stage says why."""
        one = FACTS[name]
        if one.stage in self._partial:
            raise Unavailable(self._reasons[one.stage])
        found = (
            {}
            if self._lacks(one)
            else {s.partition(":")[2]: self.get(s, name) for s in self._objects[one.scope] if self.has(s, name)}
        )
        if not found and one.stage in self._reasons:
            raise Unavailable(self._reasons[one.stage])
        return found

    def _lacks(self, one: Fact) -> bool:
        """Whether no subject can have it, because nothing that it rests on was put for any: 50,000 tensors are not
        asked one by one.
        """
        if one.compute is None:
            return one.name not in self._put
        return any(self._lacks(FACTS[n]) for n in one.needs if n in FACTS and FACTS[n].scope == one.scope)

    def _holder(self, subject: str, known: Fact) -> str:
        scope = subject.partition(":")[0]
        if known.scope == scope:
            return subject
        if known.scope == "checkpoint":
            return CHECKPOINT
        if known.scope == "tensor" and subject in self._weight_of:
            return self._weight_of[subject]
        raise TypeError(f"a rule on {scope} cannot ask for {known.name}, a fact of {known.scope}")


class Variant(Store):
    """A store that differs from another in one provided fact of the checkpoint: what rests on it is worked out anew,
    the rest is shared.
    """

    def __init__(self, base: Store, name: str, value: object):
        super().__init__()
        self._base, self._objects, self._weight_of, self._reasons, self._partial = (
            base,
            base._objects,
            base._weight_of,
            base._reasons,
            base._partial,
        )
        self._put = set(base._put)
        self._own = {n for n in FACTS if name in closure([n])}
        self.put(CHECKPOINT, name, value)

    def get(self, subject: str, name: str) -> object:
        return super().get(subject, name) if name in self._own else self._base.get(subject, name)
