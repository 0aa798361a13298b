"""What a run takes, worked out from headers alone: memory, disk, and how much is left for what can be spilled.

Peak memory on a CPU = one decoder layer as stored + its packed output + the Hessians of one stage (of one expert after
the other) + the larger of what solving one linear and computing with it hold + a constant for Python, torch and
transformers. It does not grow with the number of layers, nor of experts but for their packed output. Hidden states, the
next layer read ahead and suspended forwards (forward/staged.py) come on top where memory suffices; hidden states and
suspended forwards are spilled to disk where it does not (forward/spill.py).

A Hessian that float32 cannot factor takes one more square while float64 is tried (solve/square.py).
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import MachineError
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe, is_kept
from doctor.formats.gguf import blocks_of
from doctor.formats.grid import E4M3
from doctor.formats.known import streams
from doctor.formats.registry import format_of, stored_bytes
from doctor.model.fused_experts import unfuse
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant import import_stubs
from doctor.quant.solving_budget import (
    CHUNK_BYTES,
    LOOP_BYTES,
    PACKED_BYTES,
    TILE,
    can_be_hosted,
    products_of,
    solving_hosted,
    solving_in_torch,
)
from doctor.scan import native

# A batch this long keeps matrix products at full speed, on a CPU and on a GPU; more only costs memory.
BATCH_TOKENS, DEVICE_BATCH_TOKENS = 2048, 4096
# Of [n, k] in float32, natively: AWQ and GGUF's types work on all rows, GPTQ and rounding on some at a time (_solving).
_OBLONGS_OF_ALL_ROWS = 5
# Of rounding without a model: threads (more read no faster), and what each holds of a tensor, its codes and its scales.
STREAM_WORKERS, STREAM_BYTES = 8, 32 << 20
_SHARE_OF_FREE = 0.7  # of what is free, where no limit is given: other programs want to live too


def constant() -> int:
    """Bytes of Python, torch, transformers, the model's frame, and heap that is free but not returned.

    Measured with torch's CPU build: 350 MiB in a process of doctor's own (lean.py), 440 in another. Its CUDA build
    takes 770 even where there is no GPU, most of it while the libraries load.
    """
    if not version("torch").endswith("+cpu"):
        return 900 << 20
    return (390 if import_stubs.installed() else 520) << 20


@dataclass(frozen=True)
class Need:
    """Bytes. `fixed` is held whatever the number of rows; hidden states are for all rows; disk is the output with its
    parts.
    """

    block: int  # one decoder layer, as stored, without experts that are quantized
    packed: int  # its output, until it is written
    ahead: int  # the next one, as stored; read while the layer computes where memory suffices
    hessians: int
    solving: int
    computing: int  # the weight of the linear that computes, in float32
    batch: int
    row: int  # one row instead of a batch of them
    outside: int  # embeddings as stored, held with one layer while the first inputs are taken
    hidden: int
    output: int
    streaming: int = 0  # rows of a few tensors at a time, where no model is run: then all but output is 0
    on_device: int = 0  # of a GPU's memory, an upper bound; hidden states and suspended forwards take some of the rest
    on_small_device: int = 0  # the same where Hessians lie in the host's memory; 0 where they cannot
    squares_on_disk: int = 0  # Hessians and factors, where memory does not hold them; then `hessians` is what is read
    solving_on_device: int = 0  # of it, with one batch: what is not there from the start of a layer
    hosted: bool = False  # Hessians of a GPU's run lie in the host's memory, because its own is too small
    constant: int = field(default_factory=constant)

    @property
    def fixed(self) -> int:
        one_after_other = max(self.solving, self.computing + self.batch)
        running = self.block + self.packed + self.hessians + one_after_other
        return self.constant + max(running, self.outside + self.block + self.computing + self.row, self.streaming)

    @property
    def disk(self) -> int:
        """Parts and the shards that they are joined into exist together for a moment; a streamed part is a shard."""
        return self.output if self.streaming else 2 * self.output + self.squares_on_disk

    def parts(self) -> list[tuple[str, int]]:
        """(what, bytes) of `fixed` for people; of the moment that takes more."""
        weight = (_("one linear's weight in float32"), self.computing)
        computing = [weight, (_("one batch of rows"), self.batch)]
        solving = [(_("solving one linear"), self.solving)]
        running = [
            (_("one decoder layer as stored"), self.block),
            (_("its packed output"), self.packed),
            (_("Hessians on disk, read by rows"), self.hessians)
            if self.squares_on_disk
            else (_("Hessians of one stage"), self.hessians),
            *max(solving, computing, key=_sum),
        ]
        first = [
            (_("one decoder layer as stored"), self.block),
            (_("embeddings"), self.outside),
            weight,
            (_("one row"), self.row),
        ]
        rows = [(_("rows of a few tensors"), self.streaming)]
        return [*max(running, first, rows, key=_sum), (_("Python, torch and transformers"), self.constant)]


def _sum(parts: Sequence[tuple[str, int]]) -> int:
    return sum(size for _what, size in parts)


def needs(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: int,
    length: int,
    memory: int | None = None,
    device: int | None = None,
) -> Need:
    """Of quantizing with `rows` calibration rows of `length` tokens; 0 rows for a method without calibration, which
    takes no Hessian. Under a limit of `memory` bytes Hessians lie on disk where that is what fits; of a GPU with
    `device` bytes free they lie in the host's memory where its own does not hold them.
    """
    need = _needs(checkpoint, spec, recipe, rows, length)
    if device is not None and device < need.on_device and need.on_small_device:
        solving = need.on_small_device - need.block
        need = replace(need, hosted=True, on_device=need.on_small_device, solving_on_device=solving)
    files = recipe.solver.factors and not format_of(recipe).in_blocks and native.level() is not None
    files = files and (device is None or need.hosted)
    if memory is None or memory >= need.fixed or not files or not need.hessians:
        return need
    k = math.isqrt(need.hessians // 4)
    # Rows of tiles of the factor and of what it is made from, and the tiles that are worked on.
    window = min(need.hessians, 4 * TILE * (2 * k + 3 * TILE))
    return replace(need, hessians=window, squares_on_disk=2 * need.hessians)


def _needs(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int) -> Need:
    checkpoint, spec = unfuse(checkpoint, spec, recipe)
    linears = _quantized(spec, recipe)
    output = _output_bytes(checkpoint, linears, recipe)
    if streams(recipe):
        held = min(STREAM_WORKERS, os.cpu_count() or 1) * STREAM_BYTES
        return Need(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, output, streaming=held)
    quantized = {x.tensor: x for x in linears}
    by_layer = _layers(checkpoint, spec)
    layers = [_layer(tensors, quantized, recipe) for tensors in by_layer.values()] or [_Layer()]
    tokens = rows * length
    inside = {t.name for tensors in by_layer.values() for t in tensors}
    outside = [t for t in checkpoint.tensors.values() if t.name not in inside]
    hessians, width = _hessian_bytes(linears, recipe) if rows else 0, _width(spec, linears)

    def batch(most_tokens: int) -> int:
        return 4 * min(tokens, max(most_tokens, length)) * width if rows else 0

    block = max(layer.held for layer in layers)
    computing = 4 * max((x.in_features * x.out_features for x in linears), default=0) if rows else 0
    outer = sum(t.nbytes for t in outside if len(t.shape) == 2 and "head" not in t.name) if rows else 0
    on_device = max(solving_in_torch(linears, bool(rows)), batch(DEVICE_BATCH_TOKENS))
    small = 0
    if rows and can_be_hosted(recipe):
        weight = computing * 3 // 2  # what codes stand for in float32, and the same in the dtype of the layer
        summing = weight + batch(BATCH_TOKENS) + products_of(linears)
        small = block + max(solving_hosted(linears), summing, outer + weight + batch(0))
    return Need(
        block=block,
        packed=max(layer.packed for layer in layers),
        ahead=max(layer.held for layer in layers) if len(layers) > 1 else 0,
        hessians=hessians,
        solving=max((_solving(x, own, bool(rows)) for x, own in _of_each_size(linears, recipe)), default=0),
        computing=computing,
        batch=batch(BATCH_TOKENS),
        row=batch(0),
        outside=outer,
        hidden=4 * tokens * (spec.hidden or 0) * _streams(spec),
        output=output,
        on_device=4 * max(layer.elements for layer in layers) + hessians + on_device,
        solving_on_device=hessians + on_device,
        on_small_device=small,
    )


def row_bytes(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, length: int) -> int:
    """What a decoder layer computes for one row of `length` tokens: Need.row, without the rest."""
    checkpoint, spec = unfuse(checkpoint, spec, recipe)
    return 4 * length * _width(spec, _quantized(spec, recipe))


def _quantized(spec: ModelSpec, recipe: Recipe) -> list[Linear]:
    return [x for x in spec.linears if x.block is not None and not is_kept(recipe, x.name)]


class _Layer(NamedTuple):
    """Of one decoder layer: bytes that lie in memory while it is worked on, bytes of its output, and its elements."""

    held: int = 0
    packed: int = 0
    elements: int = 0


def _layer(tensors: list[TensorInfo], quantized: Mapping[str, Linear], recipe: Recipe) -> _Layer:
    held = packed = 0
    for tensor in tensors:
        x = quantized.get(tensor.name)
        if x is None:
            held += 4 * tensor.numel if len(tensor.shape) != 2 else max(tensor.nbytes, 2 * tensor.numel)
            continue
        held += 0 if x.expert is not None else 4 * tensor.numel if x.transposed else tensor.nbytes
        packed += stored_bytes(recipe, x.name, x.in_features, x.out_features)
    return _Layer(held, packed, sum(t.numel for t in tensors))


def _of_each_size(linears: list[Linear], recipe: Recipe) -> list[tuple[Linear, Recipe]]:
    """One linear, with its own recipe, of each size and recipe: a mixture has tens of thousands of a handful."""
    pairs = ((x, recipe.for_linear(x.name)) for x in linears)
    return list({(x.in_features, x.out_features, x.expert is None, own): (x, own) for x, own in pairs}.values())


def _solving(x: Linear, recipe: Recipe, calibrated: bool) -> int:
    """Bytes that solving one linear by its own recipe holds on a CPU, besides its Hessian and its weight as stored."""
    if native.level() is None:
        return solving_in_torch([x], calibrated)
    n, k = x.out_features, x.in_features
    stored = 2 * n * k if x.expert is not None else 0  # read for it alone
    form = format_of(recipe)
    if recipe.folds_scales or form.in_blocks or form.grid(recipe.scheme).levels == E4M3:
        return stored + 4 * _OBLONGS_OF_ALL_ROWS * n * k
    if not calibrated:
        return stored + 2 * n * k + 8 * min(CHUNK_BYTES, 4 * n * k)
    some = min(n, max(1, LOOP_BYTES // (4 * k)))  # rows of the loops
    panel = min(PACKED_BYTES, 4 * k * k) if 4 * k * 128 < PACKED_BYTES else 4 * k * 128
    # Codes and the same transposed for packing; weights, errors, grids and two more sets of codes of some rows.
    return stored + 2 * n * k + panel + some * (4 * k + 4 * k + 2 * k + 16 * (k // 32))


def _layers(checkpoint: Checkpoint, spec: ModelSpec) -> dict[int, list]:
    """Headers of the tensors of each decoder layer, by its number."""
    stems = Counter(x.tensor.partition(f".{x.block}.")[0] for x in spec.linears if x.block is not None)
    if not stems:
        return {}
    inside = re.compile(rf"{re.escape(stems.most_common(1)[0][0])}\.(\d+)\.")
    found: dict[int, list] = {}
    for tensor in checkpoint.tensors.values():
        match = inside.match(tensor.name)
        if match:
            found.setdefault(int(match[1]), []).append(tensor)
    return found


def _streams(spec: ModelSpec) -> int:
    """Residual streams that a model carries beside each other: Gemma 3n's AltUp, hyper-connections."""
    stated = (spec.config.get(key) for key in ("altup_num_inputs", "hc_mult"))
    return next((n for n in stated if isinstance(n, int) and 1 < n < 64), 1)


def _hessian_bytes(linears: list[Linear], recipe: Recipe) -> int:
    """Of the largest stage: one a kind of input, and of experts one after the other."""
    kinds = {"k": "q", "v": "q", "up": "gate"}
    stages: dict[tuple, int] = {}
    for x in linears:
        stages[x.block, x.expert, kinds.get(x.role, x.role)] = 4 * x.in_features**2
    return max(stages.values(), default=0)


def _width(spec: ModelSpec, linears: list[Linear]) -> int:
    """float32 values per token that one decoder layer computes, an upper bound: every output of a linear, and a few
    hidden states.
    """
    widths: dict[int | None, int] = {}
    for x in linears:
        widths[x.block] = widths.get(x.block, 0) + (x.out_features if x.expert in (None, 0) else 0)
    return max(widths.values(), default=0) + 6 * (spec.hidden or 0)


def _output_bytes(checkpoint: Checkpoint, linears: list[Linear], recipe: Recipe) -> int:
    quantized, form = {x.tensor: x for x in linears}, format_of(recipe)
    total = 0
    for tensor in checkpoint.tensors.values():
        x = quantized.get(tensor.name)
        if x is None and form.in_blocks and len(tensor.shape) == 2:
            total += outer_bytes(tensor, checkpoint, recipe)
        elif x is None:
            total += tensor.nbytes // 2 if tensor.dtype.bits == 32 else tensor.nbytes
        else:
            total += stored_bytes(recipe, x.name, x.in_features, x.out_features)
    return total


def outer_bytes(tensor: TensorInfo, checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Of the embedding or the output head in a GGUF file, or of a linear that stays in 16 bits."""
    config = checkpoint.value("config.json") or {}
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    width = tensor.shape[1]
    if tensor.name not in names:
        return 2 * tensor.numel
    kind = blocks_of(recipe).outer_type(names[tensor.name], recipe.bits, width, bool(config.get("tie_word_embeddings")))
    return tensor.numel // kind.block * kind.nbytes if width % kind.block == 0 else 2 * tensor.numel


def require(need: Need, memory: int | None) -> None:
    """Raises MachineError where `memory` is less than the run takes with everything that can be on disk there."""
    if memory is not None and memory < need.fixed:
        parts = listed(_("{what} {size}", what=what, size=gib(size)) for what, size in need.parts())
        raise MachineError(
            _(
                "--memory {memory}: this run needs {need} at least: {parts}.",
                memory=gib(memory),
                need=gib(need.fixed),
                parts=parts,
            ),
            _("Raise --memory or use another machine; fewer rows change nothing here."),
        )


def left(need: Need, memory: int | None) -> int:
    """Bytes for hidden states and suspended forwards; 0 where there are none."""
    return max(0, limit(memory) - need.fixed - (need.ahead if reads_ahead(need, memory) else 0))


def reads_ahead(need: Need, memory: int | None) -> bool:
    """Whether the next decoder layer is read while one computes: where it takes no more than half of what is left."""
    return 2 * need.ahead <= limit(memory) - need.fixed


def limit(memory: int | None) -> int:
    """Bytes that this process may take."""
    return memory if memory is not None else resident() + int(_SHARE_OF_FREE * free_memory())


def resident() -> int:
    """Bytes of this process that are in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: the constant is the estimate
        return constant()


def give_back() -> None:
    """Free heap back to the system, where the C library can: glibc keeps what suspended forwards leave in holes, an
    eighth of the peak of a small model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_memory() -> int:
    """Bytes that this process can still take: what the system has, or what a container's limit leaves of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        system = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([system, *_container()])


def _container() -> Iterator[int]:
    """What a container's limit leaves, where there is one. Cached files are given back when asked for, so they count as
    free.
    """
    root = Path("/sys/fs/cgroup")
    for folder, limit, used in (
        (root, "memory.max", "memory.current"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another cgroup version, or no container
            continue
        if most != "max":
            yield max(0, int(most) - now + int(stat.get("inactive_file", 0)))


def gib(size: float) -> str:
    """A size in GiB, for messages."""
    return f"{size / 2**30:.2f} GiB"
