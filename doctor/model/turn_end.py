"""The token with which a chat template ends a turn, read from its syntax tree. No template is ever run.

The tree is laid out in reading order as literal text and places where a message's content is printed. The special token
that comes next after a content is what ends the turn; where contents are followed by different tokens, nothing is said.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from doctor.model.chat_template import parsed_template

_CONTENT = object()
_CONTENT_NAMES = frozenset({"content", "message_content", "text"})


def turn_end(template: str, special: Iterable[str], named: dict[str, str]) -> str | None:
    """The one special token that follows the content of every message; None where there is none, or more than one.

    special: the tokenizer's special tokens. named: what a template's variables stand for, as {"eos_token": "</s>"}.
    """
    tree = parsed_template(template)
    if tree is None:
        return None
    tokens = sorted(set(special), key=len, reverse=True)
    ends: set[str] = set()
    waiting = False
    for piece in _pieces(tree[1], named):
        if piece is _CONTENT:
            waiting = True
        elif waiting and (found := _first(piece, tokens)) is not None:
            ends.add(found)
            waiting = False
    return ends.pop() if len(ends) == 1 else None


def _first(text: str, tokens: list[str]) -> str | None:
    places = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return min(places)[2] if places else None


def _pieces(node: Any, named: dict[str, str]) -> Iterator[Any]:
    """Literal texts and _CONTENT, in reading order. Conditions, targets and arguments print nothing."""
    from jinja2 import nodes

    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, nodes.Name):
        if node.name in named:
            yield named[node.name]
        elif node.name in _CONTENT_NAMES:
            yield _CONTENT
    elif isinstance(node, (nodes.Getattr, nodes.Getitem)):
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if key in _CONTENT_NAMES:
            yield _CONTENT
    elif isinstance(node, nodes.If):
        for part in (*node.body, *node.elif_, *node.else_):
            yield from _pieces(part, named)
    elif isinstance(node, nodes.CondExpr):
        for part in filter(None, (node.expr1, node.expr2)):
            yield from _pieces(part, named)
    elif isinstance(node, nodes.Filter):
        if node.node is not None:
            yield from _pieces(node.node, named)
    elif isinstance(node, nodes.For):
        for part in (*node.body, *node.else_):
            yield from _pieces(part, named)
    elif isinstance(node, nodes.Assign):
        yield from _assigned(node, named)
    elif not isinstance(node, (nodes.Compare, nodes.Test, nodes.Call, nodes.Macro)):
        for child in node.iter_child_nodes():
            yield from _pieces(child, named)


def _assigned(node: Any, named: dict[str, str]) -> Iterator[Any]:
    """What an assignment prints later: only a text that holds a content and what follows it."""
    parts = list(_pieces(node.node, named))
    if _CONTENT in parts and any(isinstance(part, str) for part in parts):
        yield from parts
