"""transformers without the parts of it and of torch that only training, compiling and sharding use.

transformers loads torch._dynamo, the distributed tensors of torch with sympy, and losses that take scipy's optimizers
as soon as a model is defined, whatever it is then used for: 96 MiB and more than half of the import's time, with
transformers 5.24 and torch 2.13. No command of doctor compiles, shards or computes a loss. So a process that is
doctor's own puts something in their place that loads the real module the moment anything else is asked of it. A program
that imports doctor is left alone: it may train.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

_DYNAMO, _INDEXING, _LOSSES = (
    "torch._dynamo",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "transformers.loss.loss_utils",
)


class _Later(ModuleType):
    """In the place of a module: has what `ready` holds, and becomes the real one when anything else is wanted."""

    def __init__(self, name: str, ready: dict[str, object]):
        super().__init__(name)
        self.__dict__.update(ready)

    def __getattr__(self, attribute: str) -> object:
        if attribute.startswith("__") and attribute != "__path__":  # inspect asks every module for its file
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


class _Losses(dict):
    """No losses, until one is asked for: optimum reads every attribute of a model, its loss_function too."""

    def __missing__(self, name: str) -> object:
        if isinstance(sys.modules.get(_LOSSES), _Later):
            del sys.modules[_LOSSES]
        return importlib.import_module(_LOSSES).LOSS_MAPPING[name]


class _Watch:
    """First of the finders; finds nothing. Takes the places when transformers is looked for, and answers for it as soon
    as it can ask.
    """

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name == "transformers":
            _take_places()
        asks = sys.modules.get("transformers.utils.import_utils")
        if asks is not None and hasattr(asks, "is_torch_distributed_available"):
            sys.meta_path.remove(self)
            if os.environ.get("WORLD_SIZE", "1") == "1":
                _deny_distributed(asks)


def install() -> None:
    """From now on, when transformers is imported for the first time in this process."""
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, _Watch())


def installed() -> bool:
    """Whether this process goes, or will go, without them."""
    return any(isinstance(finder, _Watch) for finder in sys.meta_path) or isinstance(sys.modules.get(_LOSSES), _Later)


def _take_places() -> None:
    if _DYNAMO not in sys.modules:
        sys.modules[_DYNAMO] = _Later(
            _DYNAMO, {"disable": _as_it_is, "allow_in_graph": _as_it_is, "assume_constant_result": _as_it_is}
        )
        sys.modules[_INDEXING] = _Later(_INDEXING, {"__path__": [], "TransformGetItemToIndex": _indexing})
    sys.modules[_LOSSES] = _Later(_LOSSES, {"__path__": [], "LOSS_MAPPING": _Losses()})


def _as_it_is(function: Callable | None = None, *args, **kwargs) -> Callable:
    """What torch._dynamo's decorators mean where nothing is compiled."""
    return function if function is not None else _as_it_is


def _indexing(*args):
    """The real TransformGetItemToIndex, from the real module."""
    if isinstance(sys.modules.get(_INDEXING), _Later):
        del sys.modules[_INDEXING]
    return importlib.import_module(_INDEXING).TransformGetItemToIndex(*args)


def _deny_distributed(asks: ModuleType) -> None:
    """transformers asks once whether torch was built with torch.distributed, and keeps the answer; torch itself is not
    changed.
    """
    import torch

    available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        asks.is_torch_distributed_available()
    finally:
        torch.distributed.is_available = available
