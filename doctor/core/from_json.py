"""Dataclasses from the JSON that was written of them: the other way of dataclasses.asdict.

Types are those of the fields' annotations: str, int, float, bool, dataclasses, lists and tuples of them, dict and None.
JSON has no NaN, so where a float is expected "NaN", "Infinity" and "-Infinity" are read as such.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from doctor.core.errors import DoctorError
from doctor.core.messages import _, restored

T = TypeVar("T")
_NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def read_document(kind: type[T], document: dict[str, Any], schema: str) -> T:
    """The dataclass `kind` of a saved document, its texts as messages. Raises DoctorError where it is of another schema
    or damaged.
    """
    if document.get("schema") != schema:
        raise DoctorError(_("not a report of this kind: the schema must be {schema}.", schema=repr(schema)))
    try:
        return rebuilt(kind, restored(document, document.get("messages")))
    except ValueError as error:
        raise DoctorError(
            _("the report is damaged: {error}.", error=str(error)), _("Make it again with the command that wrote it.")
        ) from None


def rebuilt(kind: Any, value: Any, where: str = "report") -> Any:
    """A value of this type from its JSON. Raises ValueError with the place where it is of another type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is types.UnionType:
        return None if value is None else rebuilt(next(k for k in inner if k is not type(None)), value, where)
    if origin in (list, tuple):
        return _sequence(origin, inner, value, where)
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    wanted: Any = (int, float) if kind is float else origin or kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {type(value).__name__}, must be {getattr(kind, '__name__', kind)}")
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, must be an object")
    hints, given = get_type_hints(kind), {}
    for one in fields(kind):
        if one.name in value:
            given[one.name] = rebuilt(hints[one.name], value[one.name], f"{where}.{one.name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{where} has no {one.name}")
    return kind(**given)


def _sequence(origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {type(value).__name__}, must be a list")
    if origin is tuple and inner[-1:] != (...,):
        if len(value) != len(inner):
            raise ValueError(f"{where} has {len(value)} values, must have {len(inner)}")
        kinds = inner
    else:
        kinds = (inner[0],) * len(value)
    return origin(rebuilt(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
