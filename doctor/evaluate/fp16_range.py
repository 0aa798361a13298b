"""Would a model survive float16? Its activations in float32 against float16's range, and its predictions with every
step rounded.

Most kernels for GPTQ and AWQ files compute in float16, while models are trained in bfloat16, whose range is 10^33 times
wider. So while the original is run block by block, everything its modules take and give is looked at, on all rows; and
a few rows run twice more, with weights, inputs and outputs of each module rounded to float16 and to bfloat16. Sums stay
in float32, as they do in the matrix kernels of every engine. Not seen: attention scores that an engine keeps in float16
(doctor kvcache gives the largest q·k).
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch

from doctor.core.messages import _
from doctor.core.records import Fp16Range
from doctor.evaluate.scores import Tally
from doctor.scan.counters import FP16_OVERFLOW

ROUNDED_ROWS = 2  # of the text; two more passes over them cost a twelfth of a comparison on 24 rows
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Fp16RangeProbe:
    """Looks at one model while it is run: `watch(i)` around block i on all rows, then `round(i)` while its weights are
    there.
    """

    def __init__(self, skeleton, rows: list[torch.Tensor], hidden: list[torch.Tensor], calls: list[list]):
        """hidden f32[1, length, width] and calls (of every block) of every row, as they enter the first block."""
        self.skeleton, self.calls, self.rows = skeleton, calls[:ROUNDED_ROWS], rows[:ROUNDED_ROWS]
        self.hidden = {name: [_rounded(x, dtype) for x in hidden[:ROUNDED_ROWS]] for name, dtype in DTYPES.items()}
        self.largest: list[tuple[str, float]] = []  # of each block: (place, largest |value|)
        self.residual: list[float] = []
        self.first: tuple[str, float] | None = None
        self._see("the embeddings", hidden)

    @contextmanager
    def watch(self, i: int) -> Iterator[None]:
        """Everything that block i's modules take and give while inside is looked at."""
        self.largest.append(("", 0.0))
        hooks = []
        for path, module in _steps(self.skeleton.layers[i]):
            hooks += self._look_on(module, f"{self._name(i)}.{path}")
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look_on(self, module: torch.nn.Module, name: str) -> list:
        """Hooks on one step. They answer nothing: what a hook returns would take the value's place."""

        def before(_module, args):
            self._see(_("the input of {name}", name=name), args)

        def after(_module, args, out):
            self._see(_("the output of {name}", name=name), out if isinstance(out, tuple) else (out,))

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def leave(self, i: int, hidden: list[torch.Tensor]) -> None:
        """hidden f32[1, length, width] of every row after block i: the residual stream."""
        self.residual.append(self._see(_("the residual stream after {name}", name=self._name(i)), hidden))

    @torch.no_grad()
    def round(self, i: int) -> None:
        """Run the first rows through block i in float16 and in bfloat16. Its weights must be loaded; they are left as
        they were.
        """
        for name, dtype in DTYPES.items():
            with _rounding(self.skeleton.layers[i], dtype):
                self.hidden[name] = [
                    _rounded(self.skeleton.run_layer(i, x, calls[i], carry=False), dtype)
                    for x, calls in zip(self.hidden[name], self.calls, strict=True)
                ]

    def result(
        self, exact: list[torch.Tensor], logits: Callable[[list, list], Generator[torch.Tensor, None, None]]
    ) -> Fp16Range:
        """exact: hidden states of the rounded rows in float32, after the last block. logits(rows, hidden) gives each
        one's logits.
        """
        tallies = {name: Tally() for name in DTYPES}
        states = [exact, *self.hidden.values()]
        found = logits(
            [ids for ids in self.rows for _ in states], [s[r] for r in range(len(self.rows)) for s in states]
        )
        for ids in self.rows:
            base = next(found)
            for tally in tallies.values():
                tally.add(base[:-1], next(found)[:-1], ids[0, 1:])
        found.close()
        largest = max(self.largest, key=lambda pair: _sortable(pair[1]), default=("", 0.0))
        return Fp16Range(
            absmax=largest[1],
            place=largest[0],
            first=self.first,
            residual=tuple(self.residual),
            blocks=tuple(self.largest),
            tokens=tallies["float16"].tokens,
            kl_float16=tallies["float16"].divergence()[0],
            kl_bfloat16=tallies["bfloat16"].divergence()[0],
            nonfinite_float16=tallies["float16"].nonfinite[1],
            nonfinite_bfloat16=tallies["bfloat16"].nonfinite[1],
        )

    def _name(self, i: int) -> str:
        return f"{self.skeleton.model.base_model_prefix}.{self.skeleton.layers_path}.{i}"

    def _see(self, place: str, tensors) -> float:
        """The largest |value| of these tensors, noted; NaN where one is NaN."""
        bounds = [t.aminmax() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        sizes = [float(torch.maximum(-low, high)) for low, high in bounds]
        size = max(sizes, key=_sortable, default=0.0)
        if self.first is None and not size < FP16_OVERFLOW:
            self.first = (place, size)
        if self.largest and _sortable(size) > _sortable(self.largest[-1][1]):
            self.largest[-1] = (place, size)
        return size


def _steps(block: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(path, module) of a block's single steps: linears, norms, activations."""
    return [(path, m) for path, m in block.named_modules() if path and not list(m.children())]


@contextmanager
def _rounding(block: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every step of the block takes, holds and gives values of this dtype, and computes in float32 between.

    One module's weights are held twice at a time.
    """

    def before(module, args):
        module.exact = dict(module._parameters)
        for name, parameter in module.exact.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(_rounded(parameter, dtype), requires_grad=False)
        return tuple(_rounded(a, dtype) for a in args)

    def after(module, args, out):
        module._parameters.update(module.__dict__.pop("exact"))
        return _rounded(out, dtype)

    hooks = []
    for _path, module in _steps(block):
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounded(value, dtype: torch.dtype):
    """A float tensor rounded to dtype and back, Inf beyond its range; tuples item by item; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(_rounded(v, dtype) for v in value)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype).to(value.dtype)
    return value


def _sortable(value: float) -> float:
    return value if value == value else float("inf")
