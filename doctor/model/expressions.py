"""Expressions over config keys in the tables of architectures: sizes of tensors, and which layers are of a kind.

A size is arithmetic over integers: `2 * num_attention_heads * head_dim`. A condition is a comparison, with `i` the
number of a decoder layer: `layer_types[i] == 'full_attention'`, `i >= first_k_dense_replace`. Both are parsed, never
run as Python: names, whole numbers, strings, tuples, subscripts and the operators listed here, nothing else. A name
that nobody knows makes the answer None, not False.
"""

import ast
import operator
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def evaluate(expression: str, lookup: Callable[[str], object]) -> int | None:
    """Value of a size expression; None where a name is unknown or no whole number."""
    try:
        return _size(_parsed(expression), lookup)
    except (TypeError, ZeroDivisionError, SyntaxError):
        return None


def holds(conditions: Iterable[str], lookup: Callable[[str], object], layer: int) -> bool | None:
    """Answer of the first condition whose names are all known, for one decoder layer; None where there is none."""
    for condition in conditions:
        try:
            return bool(_value(_parsed(condition), lambda name: layer if name == "i" else lookup(name)))
        except (TypeError, ZeroDivisionError, SyntaxError, IndexError, ValueError):
            continue
    return None


@cache
def keys_of(expression: str) -> tuple[str, ...]:
    """Config keys in an expression, in order, each once; none in an empty one."""
    names = (n for n in ast.walk(_parsed(expression)) if isinstance(n, ast.Name) and n.id != "i") if expression else ()
    return tuple(dict.fromkeys(n.id for n in sorted(names, key=lambda n: n.col_offset)))


@cache
def _parsed(expression: str) -> ast.AST:
    return ast.parse(expression, mode="eval").body


def _size(node: ast.AST, lookup) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        value = lookup(node.id)
        if not isinstance(value, int):
            raise TypeError(node.id)
        return value
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC and not isinstance(node.op, ast.Mod):
        return _ARITHMETIC[type(node.op)](_size(node.left, lookup), _size(node.right, lookup))
    raise TypeError(ast.dump(node))


def _value(node: ast.AST, lookup) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, str)):
        return node.value
    if isinstance(node, ast.Name):
        value = lookup(node.id)
        if not isinstance(value, (int, str, list, tuple)):
            raise TypeError(node.id)
        return value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(item, lookup) for item in node.elts)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](_value(node.left, lookup), _value(node.right, lookup))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return _COMPARE[type(node.ops[0])](_value(node.left, lookup), _value(node.comparators[0], lookup))
    if isinstance(node, ast.BoolOp):
        join = all if isinstance(node.op, ast.And) else any
        return join([_value(part, lookup) for part in node.values])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, lookup)
    if isinstance(node, ast.Subscript):
        container: Any = _value(node.value, lookup)
        return container[_value(node.slice, lookup)]
    raise TypeError(ast.dump(node))
