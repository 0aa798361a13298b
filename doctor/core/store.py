"""The store of facts: what is known in one run, by subject and name, computed when it is first asked for.

Code asks by key: `store.get(SPEC)` for the checkpoint, `store.get(STATS, "tensor:NAME")` for another subject. The
engine, which has parameter names and no keys, asks by name: `store.value("spec")`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

from doctor.core import facts
from doctor.core.facts import CHECKPOINT, SCOPES, Fact, FactKey, Unavailable, closure, known_fact
from doctor.core.messages import _

T = TypeVar("T")


class Asker(Protocol):
    """A rule or a fact: whatever names the facts that it needs, and those that it can do without."""

    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def wants(self) -> tuple[str, ...]: ...


class Store:
    """Facts of one run. Subjects are strings ("tensor:NAME"); each has an object that rules get as their first
    argument.
    """

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, Any]] = {scope: {} for scope in SCOPES}
        self._values: dict[tuple[str, str], Any] = {}
        self._put: set[str] = set()  # names of the provided facts that some subject has
        self._failed: dict[tuple[str, str], Unavailable] = {}
        self._reasons: dict[str, str] = {}
        self._partial: set[str] = set()
        self._weight_of: dict[str, str] = {}

    # subjects

    def add_subject(self, scope: str, subject: str, thing: object, weight: str | None = None) -> None:
        """Declare a subject. A linear names its `weight` subject ("tensor:…"), whose facts its rules may ask for
        too.
        """
        self._objects[scope][subject] = thing
        if weight is not None:
            self._weight_of[subject] = weight

    def subjects(self, scope: str) -> dict[str, Any]:
        """Subject -> the object that stands for it, in the order they were added."""
        return self._objects[scope]

    # provided facts

    def put(self, key: FactKey[T], value: T, subject: str = CHECKPOINT) -> None:
        """Record a provided fact; a derived fact that failed without it is tried again."""
        self.put_value(key.name, value, subject)

    def put_value(self, name: str, value: object, subject: str = CHECKPOINT) -> None:
        """`put` by the fact's name. Raises TypeError for a name that is not declared as provided."""
        known = facts.FACTS.get(name)
        if known is None or known.compute is not None:
            raise TypeError(f"fact {name!r} is not declared as provided")
        self._values[subject, name] = value
        self._put.add(name)
        self._failed.clear()

    def carry(self, other: Store, subjects: Iterable[str]) -> None:
        """Take over the provided facts of these subjects from another run, whose bytes are the same."""
        wanted = set(subjects)
        for (subject, name), value in other._values.items():
            if subject in wanted and name in facts.FACTS and facts.FACTS[name].compute is None:
                self._values[subject, name] = value
                self._put.add(name)

    def say_missing(self, cost: str, reason: str) -> None:
        """Why facts of this cost do not exist in this run."""
        self._reasons[cost] = reason

    def say_partial(self, cost: str, reason: str) -> None:
        """Facts of this cost exist for some subjects only: a rule that needs those of every subject is skipped."""
        self._reasons[cost] = reason
        self._partial.add(cost)

    def say_produced(self, cost: str) -> None:
        """Facts of this cost have been produced: a subject that has none now gets none."""
        self._reasons.pop(cost, None)

    # asking

    def get(self, key: FactKey[T], subject: str = CHECKPOINT) -> T:
        """The fact's value for a subject. Raises Unavailable with the reason where there is none."""
        return self.value(key.name, subject)

    def find(self, key: FactKey[T], subject: str = CHECKPOINT) -> T | None:
        """The fact's value for a subject, None where there is none."""
        try:
            return self.value(key.name, subject)
        except Unavailable:
            return None

    def has(self, key: FactKey, subject: str = CHECKPOINT) -> bool:
        """Whether the subject has the fact."""
        return self.has_value(key.name, subject)

    def has_value(self, name: str, subject: str = CHECKPOINT) -> bool:
        """`has` by the fact's name."""
        try:
            self.value(name, subject)
        except Unavailable:
            return False
        return True

    def value(self, name: str, subject: str = CHECKPOINT) -> Any:
        """`get` by the fact's name. Raises Unavailable where there is no value, TypeError where there is no such
        fact.
        """
        known = known_fact(name)
        if known is None:
            raise TypeError(f"there is no fact {name!r}")
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
            raise Unavailable(self._reasons.get(known.cost) or _no_value(name, holder))
        try:
            thing = self._objects[known.scope].get(holder)
            value = known.compute(thing, *self.values(holder, known))
        except Unavailable as error:
            self._failed[key] = error
            raise
        self._values[key] = value
        return value

    def values(self, subject: str, asker: Asker) -> list[Any]:
        """What a fact or rule gets after its subject: its needs, then its wants. Raises Unavailable where a need is."""
        return [
            *(self.value(n, subject) for n in asker.needs),
            *(self.value(n, subject) if self.has_value(n, subject) else None for n in asker.wants),
        ]

    def _every(self, name: str) -> dict[str, Any]:
        """Name of the subject -> its fact. Raises Unavailable where no subject has it and there is a reason for
        that.
        """
        one = facts.FACTS[name]
        if one.cost in self._partial:
            raise Unavailable(self._reasons[one.cost])
        found = (
            {}
            if self._lacks(one)
            else {s.partition(":")[2]: self.value(name, s) for s in self._objects[one.scope] if self.has_value(name, s)}
        )
        if not found and one.cost in self._reasons:
            raise Unavailable(self._reasons[one.cost])
        return found

    def _lacks(self, one: Fact) -> bool:
        """Whether no subject can have it, because nothing that it rests on was put for any: 50,000 tensors are not
        asked one by one.
        """
        if one.compute is None:
            return one.name not in self._put
        return any(
            self._lacks(facts.FACTS[n]) for n in one.needs if n in facts.FACTS and facts.FACTS[n].scope == one.scope
        )

    def _holder(self, subject: str, known: Fact) -> str:
        """The subject that the fact belongs to: the subject itself, its checkpoint, or a linear's weight."""
        scope = subject.partition(":")[0]
        if known.scope == scope:
            return subject
        if known.scope == "checkpoint":
            return CHECKPOINT
        if known.scope == "tensor" and subject in self._weight_of:
            return self._weight_of[subject]
        raise TypeError(f"a rule on {scope} cannot ask for {known.name}, a fact of {known.scope}")


class Variant(Store):
    """A store that differs from another in one provided fact of the checkpoint: what rests on it is computed anew, the
    rest is shared.
    """

    def __init__(self, base: Store, key: FactKey[T], value: T):
        super().__init__()
        self._base, self._objects, self._weight_of, self._reasons, self._partial = (
            base,
            base._objects,
            base._weight_of,
            base._reasons,
            base._partial,
        )
        self._put = set(base._put)
        self._own = {n for n in facts.FACTS if key.name in closure([n])}
        self.put(key, value)

    def value(self, name: str, subject: str = CHECKPOINT) -> Any:
        return super().value(name, subject) if name in self._own else self._base.value(name, subject)


def _no_value(name: str, holder: str) -> str:
    of = holder.partition(":")[2]
    words = name.replace("_", " ")
    return (
        _("no {fact} for {subject}", fact=words, subject=of) if of else _("no {fact} for this checkpoint", fact=words)
    )
