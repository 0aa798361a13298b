"""One pass over the bytes: every tensor is read exactly once, counted, and turned into facts.

Shards are cut into spans of whole tensors, so that one large file keeps every worker busy too. A worker reads a span in
file order in chunks of about 1 MiB, aligned to whole rows of a matrix; the counters merge by addition and maximum. Zero
groups, rows and columns are looked for only in chunks that hold enough zeros to form one, while they are still in
cache: on a healthy model that is never.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import CHUNK_BYTES, TensorInfo, new_digest
from doctor.core.messages import _
from doctor.core.store import Store
from doctor.formats.known import counted_as, holds_codes
from doctor.formats.registry import sampled_tails, verbatim_tails
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.scan import counters, outliers
from doctor.scan.gguf_facts import scan_gguf
from doctor.scan.header import COMPARED, DIGESTED, RECIPE, SPEC
from doctor.scan.packed_words import PACKED_WORDS, REPEATED, STORED_BYTES, ZERO_CODE_ROWS, PackedWordStats
from doctor.scan.twin import Twin
from doctor.scan.value_facts import (
    DIGESTS,
    FIRST_ZERO_GROUP,
    ONE_SIGNED,
    OUTLIER_COLUMN,
    OUTLIER_ENTRY,
    SAME_BYTES,
    STATS,
    ZERO_COLUMNS,
    ZERO_GROUPS,
    ZERO_GROUPS_FP16,
    ZERO_ROWS,
)

SPAN_BYTES = 64 << 20
MAX_ROW_BYTES = 64 << 20  # a row is read whole, by each worker; no linear has a row of a hundredth of that
VERBATIM_BYTES = 1 << 16  # a description of a weight is a few hundred bytes
# Signs of groups are looked at in one place of a linear every so many values: two groups first, more where one has a
# single sign: 2 % of the time.
SAMPLE_EVERY, FIRST_GROUPS, SAMPLE_VALUES = 4 << 20, 2, 8192


class Scan:
    """Counts of one pass. `bytes_read` are tensor bytes read; `skipped` maps tensor -> why its values were not judged;
    `whole` are the tensors of which every byte was read, `left` the others where the user stopped the pass."""

    def __init__(self):
        self.bytes_read = 0
        self.whole: set[str] = set()
        self.left: list[str] = []
        self.stopped = threading.Event()
        self.skipped: dict[str, str] = {}
        self.digests: dict[str, dict[str, str]] = {}  # tensor -> file -> digest of its bytes there
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        with self._lock:
            self.bytes_read += n

    def add_digest(self, info: TensorInfo, digest: str) -> None:
        with self._lock:
            self.digests.setdefault(info.name, {})[info.shard] = digest


def scan(
    checkpoint: Checkpoint,
    store: Store,
    progress: Callable[[int], None] = lambda n: None,
    workers: int | None = None,
    keep_partial: bool = False,
    watch: Callable[[TensorInfo], Callable[[memoryview], None] | None] | None = None,
) -> Scan:
    """Read every tensor's bytes once and put the value facts into the store.

    keep_partial: a KeyboardInterrupt ends the pass and keeps the facts of the tensors that were read; else it is
    raised. watch: tensor -> what its bytes are shown to, in order, or None. progress gets the number of bytes of each
    chunk, from any thread. Raises BadCheckpoint when a file changes under the scan.
    """
    run = Scan()
    if checkpoint.gguf:
        run.add(scan_gguf(checkpoint, store, progress))
        store.say_produced("values")
        return run
    digested, compared = store.find(DIGESTED) or set(), store.find(COMPARED) or {}
    group = store.get(RECIPE).group_size
    spec = store.find(SPEC)
    linears = {linear.tensor: linear for linear in spec.linears} if spec is not None else {}

    def work(span: list[TensorInfo]) -> None:
        buffer = memoryview(bytearray(max(min(_step(info), info.nbytes) for info in span)))
        with checkpoint.open_file(span[0].shard) as file:
            for info in span:
                if run.stopped.is_set():
                    return
                with Twin(checkpoint, info, compared.get(info.name)) as twin:
                    _scan_tensor(
                        checkpoint,
                        file,
                        buffer,
                        info,
                        linears.get(info.name),
                        _norm(info, spec),
                        group,
                        info.name in digested,
                        twin,
                        watch(info) if watch and checkpoint.tensors.get(info.name) is info else None,
                        store,
                        run,
                        progress,
                    )

    spans = list(_spans(checkpoint))
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8, max(len(spans), 1))) as pool:
        jobs = [pool.submit(work, span) for span in spans]
        try:
            for job in jobs:
                job.result()
        except BaseException as error:
            run.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if not (keep_partial and isinstance(error, KeyboardInterrupt)):
                raise
    for name, found in run.digests.items():
        store.put(DIGESTS, found, f"tensor:{name}")
    if run.stopped.is_set():
        run.left = [info.name for span in spans for info in span if info.name not in run.whole]
        store.say_partial("values", _("interrupted before its weights were read"))
    else:
        store.say_produced("values")
    return run


def _spans(checkpoint: Checkpoint):
    """Runs of tensors of one shard, in file order, of about SPAN_BYTES each; every tensor stands in exactly one."""
    for shard in checkpoint.shards.values():
        span, size = [], 0
        for info in shard.tensors:
            span.append(info)
            size += info.nbytes
            if size >= SPAN_BYTES:
                yield span
                span, size = [], 0
        if span:
            yield span


def _scan_tensor(
    checkpoint, file, buffer, info, linear, norm, group, wants_digest, twin, shown, store, run, progress
) -> None:
    subject = f"tensor:{info.name}"
    total = counters.EMPTY
    shape = _Shape(info, linear, group) if linear is not None and info.dtype.is_float and _row_bytes(info) else None
    digest = new_digest() if wants_digest else None
    kind = counted_as(info.name, info.dtype.name)
    known = counters.can_scan(kind)
    words = _Words() if info.dtype.name == "I32" and info.name.endswith(sampled_tails()) else None
    codes = _Codes(info.dtype.name) if info.numel and holds_codes(info.name, info.dtype.name) else None
    zero_rows = 0 if codes and info.dtype.name == "I8" and len(info.shape) == 2 and _row_bytes(info) else None
    text = bytearray() if info.nbytes <= VERBATIM_BYTES and info.name.endswith(verbatim_tails()) else None
    offset, step = 0, _step(info)
    for at in range(info.begin, info.end, step):
        if run.stopped.is_set():
            return
        part = buffer[: min(step, info.end - at)]
        if known:
            counted = counters.read_and_scan(file, at, part, kind, offset)
        else:
            file.read_into(at, part)
        run.add(len(part))
        progress(len(part))
        twin.compare(part)
        if shown is not None:
            shown(part)
        if digest is not None:
            digest.update(part)
        if words is not None:
            words.add(part)
        if codes is not None:
            codes.add(part)
        if zero_rows is not None:
            zero_rows += _zero_rows(part, info.shape[1])
        if text is not None:
            text += part
        if not known:
            continue
        if shape is not None:
            shape.add(part, counted)
        if norm:
            store.put(OUTLIER_ENTRY, outliers.entry(part, info.dtype.name, norm, counted), subject)
        total = total.merge(counted)
        offset += counted.numel
    run.whole.add(info.name)
    if digest is not None:
        run.add_digest(info, digest.hexdigest())
    # A tensor that stands in several shards is read in each, but its facts are those of the one a reader takes.
    if checkpoint.tensors.get(info.name) is not info:
        return
    if words is not None:
        store.put(PACKED_WORDS, words.result(), subject)
    if text is not None:
        store.put(STORED_BYTES, bytes(text), subject)
    if codes is not None:
        store.put(REPEATED, codes.repeated, subject)
    if zero_rows is not None:
        store.put(ZERO_CODE_ROWS, zero_rows, subject)
    if twin.same is not None:
        store.put(SAME_BYTES, twin.same, subject)
    if not known:
        if words is None and codes is None:
            run.skipped[info.name] = _("{dtype} values are not judged", dtype=info.dtype.name)
        return
    store.put(STATS, total, subject)
    if shape is not None:
        shape.put(store)
    elif linear is not None and info.numel and info.dtype.is_float:
        run.skipped[info.name] = _(
            "its rows have {n:,} bytes, more than {limit:,}: zero rows, columns and groups are not looked for",
            n=info.nbytes // info.shape[0],
            limit=MAX_ROW_BYTES,
        )


def _norm(info: TensorInfo, spec: ModelSpec | None) -> str:
    """How the model applies a norm's weights; "" for other tensors and for those longer than a chunk."""
    if len(info.shape) != 1 or not info.name.endswith("norm.weight") or info.dtype.name not in counters.WIDE:
        return ""
    return (spec.norm_of(info.name) or "") if spec and 0 < info.nbytes <= VERBATIM_BYTES else ""


def _row_bytes(info: TensorInfo) -> int:
    """Bytes of what one index of the first dimension holds; 0 where that is no whole number of bytes, nothing, or above
    MAX_ROW_BYTES, and the tensor is read in chunks of any values.
    """
    if len(info.shape) < 2 or not info.numel or info.nbytes % info.shape[0]:
        return 0
    row = info.nbytes // info.shape[0]
    return row if row <= MAX_ROW_BYTES else 0


def _step(info: TensorInfo) -> int:
    """Chunk size: about CHUNK_BYTES, in whole rows where _row_bytes knows them."""
    row = _row_bytes(info)
    if not row:
        return CHUNK_BYTES - CHUNK_BYTES % max(info.dtype.bits // 8, 1)
    return max(CHUNK_BYTES // row, 1) * row


def _zero_rows(part: memoryview, columns: int) -> int:
    """Rows of 8-bit codes that are all 0. The first columns tell of nearly every row that it is none."""
    rows = np.frombuffer(part, np.int8).reshape(-1, columns)
    rows = rows[~rows[:, :64].any(axis=1)]
    return int((~rows.any(axis=1)).sum())


class _Words:
    """What the words of a packed index or zero-point tensor are, gathered chunk by chunk."""

    KINDS = 16  # symmetric zero points are one word repeated; more kinds than this are counted no further

    def __init__(self):
        self.count = self.full = 0
        self.smallest, self.largest, self.last = 1 << 31, -(1 << 31), -(1 << 31)
        self.rising = True
        self.kinds: dict[int, int] | None = {}

    def add(self, part: memoryview) -> None:
        words = np.frombuffer(part, "<i4")
        if not words.size:
            return
        self.count += words.size
        self.smallest, self.largest = min(self.smallest, int(words.min())), max(self.largest, int(words.max()))
        self.rising = self.rising and int(words[0]) >= self.last and bool((words[1:] >= words[:-1]).all())
        self.last = int(words[-1])
        pairs = words & (words >> 1)
        self.full += int((pairs & (pairs >> 2) & 0x11111111 != 0).sum())
        if self.kinds is not None:
            found, counts = np.unique(words.view(np.uint32), return_counts=True)
            for word, n in zip(found[: self.KINDS + 1].tolist(), counts[: self.KINDS + 1].tolist(), strict=True):
                self.kinds[word] = self.kinds.get(word, 0) + n
            if len(self.kinds) > self.KINDS:
                self.kinds = None

    def result(self) -> PackedWordStats:
        return PackedWordStats(self.count, self.smallest, self.largest, self.rising, self.full, self.kinds)


class _Codes:
    """Whether all elements of a packed tensor are one. Nothing more is looked at once two differ."""

    def __init__(self, dtype: str):
        self._width = {"U8": "u1", "I8": "u1", "I16": "<u2", "I32": "<u4", "I64": "<u8"}.get(dtype, "u1")
        self.repeated: int | None = None
        self._differ = False

    def add(self, part: memoryview) -> None:
        if self._differ or not part:
            return
        elements = np.frombuffer(part, self._width)
        first = int(elements[0]) if self.repeated is None else self.repeated
        self._differ = not bool((elements == first).all())
        self.repeated = None if self._differ else first


class _Shape:
    """Zero groups, rows and columns of one linear, gathered chunk by chunk. Rows are out_features unless stored
    transposed.
    """

    def __init__(self, info: TensorInfo, linear: Linear, group: int):
        self.info, self.linear = info, linear
        self.columns = info.shape[1]
        self.group = self.columns if group == -1 else group
        self.row = 0
        self.zero_rows = 0
        self.live_columns: np.ndarray | None = np.zeros(self.columns, bool)  # None: every column has shown a value
        self.zero_groups = self.zero_groups_fp16 = 0
        self.first: tuple[int, int] | None = None
        self.sampled, self.one_signed, self.next_sample = 0, 0, 0
        self.outlier: outliers.Outlier | None = None

    def add(self, part: memoryview, counted: counters.Stats) -> None:
        rows = counted.numel // self.columns
        if self.live_columns is not None:
            # Fewer zeros than rows in a chunk: no column of it can be all zero.
            if counted.n_zero < rows:
                self.live_columns = None
            else:
                _, per_column = counters.row_col_absmax(part, self.info.dtype.name, self.columns)
                self.live_columns |= per_column > 0
        if counted.n_zero >= self.columns:
            per_row, _ = counters.row_col_absmax(part, self.info.dtype.name, self.columns)
            self.zero_rows += int((per_row == 0).sum())
        if (
            not self.linear.transposed
            and counted.n_zero + counted.n_fp16_underflow >= self.group
            and self.columns % self.group == 0
        ):
            zero, zero_fp16, first = counters.group_zeros(part, self.info.dtype.name, self.columns, self.group)
            self.zero_groups += zero
            self.zero_groups_fp16 += zero + zero_fp16
            if first is not None and self.first is None:
                self.first = (self.row + first[0], first[1] * self.group)
        if self.row >= self.next_sample and not self.linear.transposed:
            self.next_sample = self.row + max(SAMPLE_EVERY // self.columns, 1)
            found = outliers.column(part, self.info.dtype.name, self.columns, counted)
            self.outlier = max(filter(None, (self.outlier, found)), key=lambda o: o.times, default=None)
            if self.columns % self.group == 0:
                self._sample(part)
        self.row += rows

    def _sample(self, part: memoryview) -> None:
        """Signs of the groups of a chunk's first rows: who builds a matrix without negative weights builds all of it
        so.
        """
        width = self.info.dtype.bits // 8
        step = self.group * width
        tops = (
            bytes(part[at + width - 1 : at + step : width])
            for at in range(0, min(FIRST_GROUPS * step, len(part)), step)
        )
        if all(min(top) < 128 <= max(top) for top in tops):  # the sign is the highest bit of the last byte
            return
        size = SAMPLE_VALUES // self.columns * self.columns or self.columns
        some = part[: size * width]
        counted = counters.one_signed_groups(some, self.info.dtype.name, self.columns, self.group)
        self.sampled, self.one_signed = self.sampled + counted[0], self.one_signed + counted[1]

    def put(self, store: Store) -> None:
        dead = 0 if self.live_columns is None else int((~self.live_columns).sum())
        rows, columns = (dead, self.zero_rows) if self.linear.transposed else (self.zero_rows, dead)
        subject = f"linear:{self.linear.name}"
        store.put(ZERO_ROWS, rows, subject)
        store.put(ZERO_COLUMNS, columns, subject)
        if not self.linear.transposed:
            store.put(ZERO_GROUPS, self.zero_groups, subject)
            store.put(ZERO_GROUPS_FP16, self.zero_groups_fp16, subject)
            store.put(FIRST_ZERO_GROUP, self.first, subject)
            store.put(ONE_SIGNED, (self.sampled, self.one_signed), subject)
            store.put(OUTLIER_COLUMN, self.outlier, subject)
