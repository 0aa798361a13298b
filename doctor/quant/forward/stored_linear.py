"""A linear whose weight stays as it is stored, or as its codes, until it computes.

A decoder layer of a 110B model takes 2.5 GiB in bfloat16 and twice that in float32. Only the linear that computes needs
its weight in float32, so it is cast then and forgotten. What was quantized stays codes, and an expert's weight stays in
the checkpoint until it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Give = Callable[[], torch.Tensor]


class StoredLinear(nn.Linear):
    """`weight` is computed when it is read: the parameter as it is stored, or what `give` returns, in `computes`.

    on_demand: the weight is read from the checkpoint each time, and the parameter stays on the meta device.
    """

    computes: torch.dtype
    on_demand: bool
    give: Give | None

    @staticmethod
    def convert(module: nn.Linear, computes: torch.dtype, on_demand: bool) -> None:
        """Make a linear one of these; its parameter stays."""
        module.__class__ = StoredLinear
        assert isinstance(module, StoredLinear)
        module.computes, module.on_demand, module.give = computes, on_demand, None

    @property
    def stored(self) -> torch.Tensor:
        """The weight [out_features, in_features] in the dtype that it has."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.detach() if self.give is None else self.give()

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The same in the dtype that the layer computes in; changing it changes nothing."""
        return nn.Parameter(self.stored.to(self.computes), requires_grad=False)

    def hold(self, give: Give | None) -> None:
        """Take the weight from `give` from now on; None: from the parameter, which is forgotten meanwhile."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        self.give = give
        if give is not None and parameter.device.type != "meta":
            self._parameters["weight"] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def to_meta(module: nn.Module) -> None:
    """Forget the weights of a module and of those inside it."""
    for child in module.modules():
        if isinstance(child, StoredLinear):
            child.hold(None)
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
