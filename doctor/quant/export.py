"""The quantized checkpoint on disk: parts while the run goes on, shards at its end, one rename when all is well.

Every finished layer is one part file (stage.py); a journal line says how its linears went. At the end parts are joined
into shards of at most 4 GiB by copying bytes, never by holding tensors.

What stays in 16 bits keeps its dtype (float32 is stored as bfloat16, since no 4-bit kernel computes in float32).
Formats and keys: formats as read by vLLM, transformers, GPTQModel and ExLlamaV2; `desc_act` is false even with
act-order because groups are fixed beforehand, so serving costs nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.checkpoint.header_text import header_bytes
from doctor.checkpoint.json_text import dumps
from doctor.checkpoint.safetensors import Shard, open_shard
from doctor.core.errors import MachineError
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.fixing.filesystem import machine_errors
from doctor.fixing.receipt import RECEIPT
from doctor.fixing.staging import StagingDir
from doctor.formats.mixed import with_schemes
from doctor.formats.registry import format_of
from doctor.model.linears import is_router
from doctor.model.spellings import with_old_keys
from doctor.plan.loading import loading_options
from doctor.quant.block_change import NewValue
from doctor.quant.calibration.tokenizer import encoder
from doctor.quant.client import Linears, plain_linears
from doctor.quant.gguf_output import write_model
from doctor.quant.stage import FREE_SPACE, JOURNAL, KEPT, TUNING, Stage, copy_hashed, require_room

MAX_SHARD_BYTES = 4 << 30
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
# Weights in other containers would be a second, unquantized copy of the model; pickles are never carried along.
_NOT_COPIED = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|pkl|py)$|\.index\.json$|^(quantize_config|doctor)\.json$"
)
_COPY_LIMIT = 256 << 20


def _modules_of_experts(kept: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Modules of experts of which every linear is kept: vLLM computes them in one kernel, and asks by the module's
    name.
    """
    number = re.compile(r"^(.*)\.\d+\.\w+$")
    found = {match[1] for match in map(number.match, kept) if match and match[1].endswith("experts")}
    return sorted(found - {match[1] for match in map(number.match, quantized) if match})


def routers(tensors: Iterable[str], packed: Container[str]) -> list[str]:
    """Modules of routers, which stay in 16 bits. transformers holds them as bare parameters, so its linears do not name
    them; vLLM builds some (Qwen3-MoE, LFM2-MoE, Gemma 4) as linears, and takes them as packed unless a list says no.
    """
    modules = (name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    return [module for module in modules if is_router(module) and module not in packed]


class Output(Stage):
    """The directory that a run fills beside its destination. `Output.open`, then write_part and note, then finish and
    commit.
    """

    @classmethod
    def open(cls, destination: str | os.PathLike, fingerprint: dict, *, resume: bool = False) -> Output:
        """A stage beside the destination. resume takes up the one that an interrupted run of the same fingerprint left
        there.

        Raises PlanRefused where the stage is of another run, or where it has finished layers and is not resumed. The
        caller has judged the destination (outputs.check_output) and holds it (lock.hold).
        """
        self = cls(Path(os.path.abspath(destination)))
        self.begin(fingerprint, resume)
        return self

    def parts(self) -> list[Path]:
        """The parts that are there, in order."""
        return sorted(self.stage.glob("part-*.safetensors"))

    def write_part(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """One part, whole or absent."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.seal(name, size, lambda file: write_safetensors(file, tensors))

    def read_part(self, name: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.part(name))

    # the end

    def finish(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        kept: Iterable[str],
        receipt: dict,
        linears: Linears | None = None,
        join: bool = True,
        values: Mapping[str, NewValue] = MappingProxyType({}),
    ) -> None:
        """Join parts into shards, or let each be one, write index, configs and receipt, copy the other files; or make
        one GGUF file, which holds all of that. Parts and journal are gone after it. values: of tensors that differ from
        what the parts hold.
        """
        parts = self.parts()
        if format_of(recipe).in_blocks:
            require_room(self.stage, self.bytes_there())
            with machine_errors(self.stage, FREE_SPACE):
                write_model(self.stage, parts, checkpoint, recipe, encoder(checkpoint), values)
                return self._tidy(parts, receipt)
        if join:
            require_room(self.stage, self.bytes_there())
        with machine_errors(self.stage, FREE_SPACE):
            weight_map, total = self._join(parts) if join else self._rename(parts)
            put_values(self.stage, weight_map, values)
            self._finish(parts, (weight_map, total), checkpoint, recipe, kept, receipt, linears or {})

    def _finish(
        self,
        parts: list[Path],
        shards: tuple[dict[str, str], int],
        checkpoint: Checkpoint,
        recipe: Recipe,
        kept: Iterable[str],
        receipt: dict,
        linears: Linears,
    ) -> None:
        weight_map, total = shards
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(self.stage / INDEX_NAME, index)
        write_configs(self.stage, checkpoint, recipe, self.stated(recipe, kept, weight_map, linears))
        for name, entry in checkpoint.entries.items():
            if name != "config.json" and not _NOT_COPIED.search(name) and entry.size <= _COPY_LIMIT:
                raw = checkpoint.json[name].raw if name in checkpoint.json else checkpoint.read_file(name, _COPY_LIMIT)
                (self.stage / name).write_bytes(raw)
        self._tidy(parts, receipt)

    @staticmethod
    def stated(recipe: Recipe, kept: Iterable[str], tensors: Iterable[str], linears: Linears) -> dict:
        """The quantization_config of an output with these tensors."""
        forms = [format_of(own) for own in recipe.recipes]
        words = tuple(f".{form.words or form.scales}" for form in forms)  # what tells a packed linear by its name
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(words))
        form = format_of(recipe)
        if form.takes(form.config(recipe)) is not None:  # its readers take every linear that the list does not name
            kept = [*kept, *routers(tensors, names)]
        return quantization_config(recipe, kept, names, linears)

    @contextmanager
    def as_checkpoint(
        self, checkpoint: Checkpoint, recipe: Recipe, kept: Iterable[str], linears: Linears
    ) -> Iterator[Checkpoint]:
        """The finished parts as a quantized checkpoint with configs and weights alone, before they are joined."""
        folder = self.stage / "parts"
        with machine_errors(folder, FREE_SPACE):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            parts, weight_map = self.parts(), dict[str, str]()
            for number, path in enumerate(parts, 1):
                name = shard_name(number, len(parts))
                weight_map |= {t.name: name for t in open_shard(path, path.name).tensors}
                try:
                    os.link(path, folder / name)
                except OSError:  # a file system without hard links
                    require_room(folder, path.stat().st_size)
                    shutil.copyfile(path, folder / name)
            if len(parts) > 1:
                _write_json(folder / INDEX_NAME, {"weight_map": dict(sorted(weight_map.items()))})
            write_configs(folder, checkpoint, recipe, self.stated(recipe, kept, weight_map, linears))
        try:
            yield Checkpoint.open(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tidy(self, parts: list[Path], receipt: dict) -> None:
        """The receipt, and nothing of what the run left beside the output."""
        _write_json(self.stage / RECEIPT, receipt)
        for leftover in (*parts, *self.stage.glob("*.tmp"), self.stage / TUNING, self.stage / JOURNAL):
            leftover.unlink(missing_ok=True)

    def change(self, values: Mapping[str, NewValue]) -> None:
        """Overwrite tensors of a finished stage, each with a value of its own shape and dtype."""
        shards = Checkpoint.open(self.stage).tensors
        with machine_errors(self.stage, FREE_SPACE):
            put_values(self.stage, {name: shards[name].shard for name in values}, values)

    def add_to_receipt(self, more: dict) -> None:
        """What became known of a finished stage after its receipt was written."""
        path = self.stage / RECEIPT
        with machine_errors(path):
            _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **more})

    def commit(self, overwrite: bool = False) -> Path:
        """Sync everything and rename the stage to the destination."""
        with machine_errors(self.stage, KEPT):
            for path in self.stage.iterdir():
                _sync(path)
        StagingDir(self.destination, self.stage, overwrite).commit()
        return self.destination

    def _join(self, parts: list[Path]) -> tuple[dict[str, str], int]:
        """Shards from parts, in order: (tensor -> shard file, bytes of all tensors)."""
        shards = [open_shard(path, path.name) for path in parts]
        groups: list[list[Shard]] = [[]]
        sealed = set(self.sealed().values())
        size = 0
        for shard in shards:
            data = shard.size - shard.data_begin
            if groups[-1] and size + data > MAX_SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(shard)
            size += data
        weight_map, total = {}, 0
        for number, group in enumerate(groups, 1):
            name = shard_name(number, len(groups))
            infos = [(t.name, t.dtype.name, t.shape, t.nbytes) for shard in group for t in shard.tensors]
            with open(self.stage / name, "wb") as file:
                file.write(header_bytes(infos))
                for shard in group:
                    with open(self.stage / shard.name, "rb") as part:
                        digest = copy_hashed(part, file, shard.data_begin)
                    if digest not in sealed:
                        raise MachineError(
                            _("{path}: changed since it was written: its sha256 differs.", path=part.name), KEPT
                        )
            weight_map.update({info[0]: name for info in infos})
            total += sum(info[3] for info in infos)
        return weight_map, total

    def _rename(self, parts: list[Path]) -> tuple[dict[str, str], int]:
        """The same where each part is a shard: it takes the shard's name."""
        weight_map: dict[str, str] = {}
        total = 0
        for number, path in enumerate(parts, 1):
            tensors = open_shard(path, path.name).tensors
            name = shard_name(number, len(parts))
            weight_map |= {t.name: name for t in tensors}
            total += sum(t.nbytes for t in tensors)
            os.rename(path, self.stage / name)
        return weight_map, total


def put_values(folder: Path, weight_map: Mapping[str, str], values: Mapping[str, NewValue]) -> None:
    """Overwrite tensors of shards that were just written, each with a value of its own shape and dtype."""
    for name in sorted({weight_map[tensor] for tensor in values}):
        infos = {t.name: t for t in open_shard(folder / name, name).tensors}
        with open(folder / name, "r+b") as file:
            for tensor in sorted(infos.keys() & values.keys()):
                value, info = values[tensor], infos[tensor]
                assert isinstance(value, torch.Tensor)  # words of blocks are changed as GGUF is written
                assert (_NAMES[value.dtype], tuple(value.shape)) == (info.dtype.name, info.shape), tensor
                file.seek(info.begin)
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def shard_name(number: int, count: int) -> str:
    """The file of shard `number` of `count`, from 1."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def quantization_config(recipe: Recipe, kept: Iterable[str], packed: Iterable[str], linears: Linears) -> dict:
    """The output's quantization_config. kept, packed: modules of the files in 16 bits, and packed; linears: the
    client's, of which those that no packed one is loaded into are excluded too.
    """
    packed = list(packed)
    other = {name: recipe.for_linear(name) for name in packed if recipe.scheme_for(name)}
    widths = {n: w for n in packed if n not in other and (w := recipe.for_linear(n).bits) != recipe.bits}
    return with_schemes(config_of(recipe, kept, packed, linears, widths), other)


def config_of(
    recipe: Recipe, kept: Iterable[str], packed: Iterable[str], linears: Linears, widths: Mapping[str, int]
) -> dict:
    """The same for linears whose widths are known. widths: bits of those that have others than recipe.bits."""
    form, packed = format_of(recipe), list(packed)
    kept = [*kept, *_modules_of_experts(kept, packed)]
    stated = form.config(recipe, kept, widths)
    plain = [name for name in plain_linears(linears, packed) if not form.excluded(stated)(name)]
    kept = [*kept, *plain]
    stated = form.config(recipe, kept, widths) if plain else stated
    of_client = [name for name, sources in linears.items() if not set(packed).isdisjoint(sources)]
    return form.naming_packed(stated, [*packed, *of_client], kept)


def write_configs(folder: Path, checkpoint: Checkpoint, recipe: Recipe, stated: dict) -> None:
    """config.json with its quantization_config, and the format's copies of that."""
    config = with_old_keys(_sixteen_bits(checkpoint.value("config.json") or {}))
    stated = {**stated, **loading_options(recipe.output_format, str(config.get("model_type", "")))}
    _write_json(folder / "config.json", {**config, "quantization_config": stated})
    for copy in format_of(recipe).config_files:
        _write_json(folder / copy, stated)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(dumps(value, indent=2) + "\n", encoding="utf-8")


class ReadOnlyOutput(Output):
    """Read-only view of the staging directory for ranks > 0."""

    def __init__(self, destination: Path):
        super().__init__(destination)
        self._there = {path.name for path in self.stage.glob("part-*.safetensors")}
        self._noted = super().notes()

    def has_part(self, name: str) -> bool:
        return self.part(name).name in self._there

    def notes(self) -> list[dict]:
        return self._noted

    def write_part(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def note(self, entry: dict) -> None:
        pass

    def discard(self) -> None:
        pass


def write_safetensors(file, tensors: dict[str, torch.Tensor]) -> None:
    """Tensors in the order given, each element in a place that its size divides (larger element types first)."""
    items = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    file.write(header_bytes((n, _NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in items))
    for _name, tensor in items:
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def kept_tensors(names: Iterable[str], load, vectors: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for what stays in 16 bits: as stored, float32 and float64 as bfloat16. vectors: norms and biases
    stay as they are, too: GGUF holds them in float32.
    """
    for name in names:
        tensor = load(name)
        wide = tensor.dtype in (torch.float32, torch.float64) and not (vectors and tensor.ndim < 2)
        yield name, tensor.to(torch.bfloat16) if wide else tensor


def _sixteen_bits(config: dict) -> dict:
    """config.json with float32 as its dtype replaced by what kept_tensors stores instead."""
    return {
        k: "bfloat16" if k in ("dtype", "torch_dtype") and v in ("float32", "float64") else v for k, v in config.items()
    }


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
