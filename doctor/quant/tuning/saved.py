"""The state of a tuning on disk: what a killed run goes on from, to the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from doctor.fixing.filesystem import machine_errors
from doctor.quant.stage import FREE_SPACE, sha256_of

Tensors = dict[str, dict[str, torch.Tensor]]  # kind -> name -> tensor


@dataclass
class Saved:
    """The file that holds the state after the last look. told: gets {"tuning": name, "sha256": of the file} once it is
    whole, and keeps it (a journal); digest: what was told last, None where nothing was.
    """

    path: Path
    told: Callable[[dict], None]
    digest: str | None = None

    def keep(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all. state: JSON values. Raises MachineError."""
        flat = {
            f"{kind} {name}": x.detach().cpu().contiguous().clone()
            for kind, values in tensors.items()
            for name, x in values.items()
        }
        beside = self.path.with_suffix(".tmp")
        with machine_errors(self.path, FREE_SPACE):
            save_file(flat, beside, metadata={"state": json.dumps(state)})
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        self.told({"tuning": self.path.name, "sha256": sha256_of(self.path)})

    def take_up(self, device: torch.device) -> tuple[Tensors, dict[str, Any]] | None:
        """What `keep` wrote last, tensors on `device`; None where nothing is there, or not what was written."""
        if self.digest is None or not self.path.is_file() or sha256_of(self.path) != self.digest:
            return None
        found: Tensors = {}
        with safe_open(self.path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file has no iterator
                kind, _space, name = key.partition(" ")
                found.setdefault(kind, {})[name] = file.get_tensor(key).to(device)
            return found, json.loads(file.metadata()["state"])
