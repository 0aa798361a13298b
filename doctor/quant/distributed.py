"""One run on several processes, as torchrun starts them: rows are split, Hessians summed, a stage's linears solved
side by side.

Every rank takes the same steps on the same weights, so there is one code path; only rank 0 writes and reports
progress. Ranks exchange sums of Hessians, codes with their grids, and short JSON; nothing is pickled. Sums over
several ranks are taken in another order than those of one, so results agree to rounding and not to the bit.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch

from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import _
from doctor.quant.solve.factor import Attempt
from doctor.quant.solve.grid import Grid
from doctor.quant.solve.hessian import Hessian, NonFinite
from doctor.quant.solve.solution import Solution

# A rank that waits for another's solving must outlast the largest linear; a rank that died is seen at once, by its
# closed connection.
_TIMEOUT = timedelta(hours=2)


class Ranks:
    """This process among `size`. With size 1 every method is the identity and torch.distributed is not touched."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu"):
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def local_batches(self, batches: list) -> list:
        """This rank's batches, consecutive ones. Raises DoctorError where there are fewer than ranks."""
        if len(batches) < self.size:
            raise DoctorError(
                _(
                    "{ranks} ranks for {batches} batches of rows: every rank needs one.",
                    ranks=self.size,
                    batches=len(batches),
                ),
                _("Start fewer, or give more rows."),
            )
        cuts = [len(batches) * r // self.size for r in range(self.size + 1)]
        return batches[cuts[self.rank] : cuts[self.rank + 1]]

    def owner(self, number: int) -> int:
        """The rank that solves a stage's linear of this number."""
        return number % self.size

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        self._do(lambda d: d.all_reduce(value))
        return bool(value.item() > 0)

    def sum_hessians(self, hessian: Hessian) -> None:
        """Replace this rank's rows, sums and first non-finite value by those of all ranks."""
        if self.size == 1:
            return
        bad = hessian.nonfinite or NonFinite(-1, -1, 0)
        own = torch.tensor([hessian.rows, bad.count, bad.row, bad.channel], dtype=torch.int64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._do(lambda d: d.all_gather(found, own))
        for part in hessian.parts():
            there = part.to(self.device)
            self._do(lambda d, there=there: d.all_reduce(there))
            part.copy_(there)
        self._do(lambda d: d.all_reduce(hessian.largest, op=d.ReduceOp.MAX))
        rows = [one.tolist() for one in found]
        first = next((r for r in range(self.size) if rows[r][1]), None)
        if first is not None:
            before = sum(r[0] for r in rows[:first])
            _rows, _count, row, channel = rows[first]
            hessian.nonfinite = NonFinite(before + row, channel, sum(r[1] for r in rows))
        hessian.rows = sum(r[0] for r in rows)

    def broadcast_json(self, source: int, value: Any) -> Any:
        """A JSON value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        raw = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(raw)], device=self.device)
        self._do(lambda d: d.broadcast(size, source))
        data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if raw:
            data.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        self._do(lambda d: d.broadcast(data, source))
        return json.loads(bytes(data.cpu().numpy()))

    def broadcast(
        self, source: int, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor of rank `source`, on every rank; None on the others."""
        found = (
            torch.empty(shape, dtype=dtype, device=self.device)
            if tensor is None
            else tensor.to(self.device).contiguous()
        )
        if self.size > 1:
            self._do(lambda d: d.broadcast(found, source))
        return found.to(device)

    def broadcast_solution(
        self,
        source: int,
        solution: Solution | None,
        failure: str,
        seconds: float,
        shape: tuple[int, int],
        device: torch.device,
    ) -> tuple[Solution | None, str, float]:
        """(solution, or None and why, seconds) that rank `source` found for a linear of shape [n, k], on every rank."""
        sent = None
        if self.rank == source:
            sent = [failure, seconds]
            if solution is not None:
                sent += [
                    solution.outcome,
                    finite_json(solution.loss),
                    finite_json(solution.rtn_loss),
                    [asdict(a) for a in solution.attempts],
                    list(solution.grid.scale.shape),
                ]
        failure, seconds, *rest = self.broadcast_json(source, sent)
        if not rest:
            return None, failure, seconds
        outcome, loss, rtn_loss, attempts, sides = rest
        n, k = shape
        codes = self.broadcast(source, solution.codes if solution else None, (n, k), torch.uint8, device)
        scale = self.broadcast(source, solution.grid.scale if solution else None, tuple(sides), torch.float32, device)
        zero = self.broadcast(source, solution.grid.zero if solution else None, tuple(sides), torch.int32, device)
        g_idx = self.broadcast(source, solution.g_idx if solution else None, (k,), torch.int32, device)
        loss, rtn_loss = (math.nan if x is None else x for x in (loss, rtn_loss))
        tried = tuple(Attempt(**a) for a in attempts)
        return Solution(codes, Grid(scale, zero), g_idx, outcome, loss, rtn_loss, tried), "", seconds

    def _do(self, call: Callable) -> None:
        import torch.distributed as distributed

        try:
            call(distributed)
        except RuntimeError as error:
            raise lost(self.rank, self.size, str(error).splitlines()[0][:160]) from None


def lost(rank: int, size: int, why: str) -> MachineError:
    """The error for a rank whose partner died."""
    return MachineError(
        _("rank {rank} of {size}: another rank of this run is gone: {why}.", rank=rank, size=size, why=why),
        _("Finished layers are kept: see that rank's own error, then run the same command again with --resume."),
    )


def size() -> int:
    """How many processes torchrun started; 1 where it did not start this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def start(device: str) -> Ranks:
    """Join the ranks that torchrun started, or be the only one. Raises MachineError where they do not find each
    other.
    """
    if size() == 1:
        return Ranks(device=device)
    import torch.distributed as distributed

    kind = torch.device(device).type
    if not distributed.is_initialized():
        try:
            distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise MachineError(
                _(
                    "rank {rank}: cannot join the others: {why}.",
                    rank=os.environ["RANK"],
                    why=str(error).splitlines()[0][:200],
                ),
                _("Start with `torchrun --nproc-per-node N -m doctor quantize …`."),
            ) from None
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), device)

    def ended(number, frame):
        raise lost(ranks.rank, ranks.size, _("torchrun ends this one"))

    signal.signal(signal.SIGTERM, ended)
    return ranks


def stop(ranks: Ranks) -> None:
    """Leave the group."""
    import torch.distributed as distributed

    if ranks.size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()


def finite_json(value: float) -> float | None:
    """The value, None for NaN and Inf: JSON has neither."""
    return value if math.isfinite(value) else None
