"""A quantized checkpoint seen as the floating-point one that engines compute with: qweight and its kin become
`.weight`.

Read as the engine reads it, by what quantization_config says and not by what the words look like: a wrong
checkpoint_format gives the same wrong weights here as there, which is what `verify` must see.
"""

import numpy as np
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import Unavailable
from doctor.core.recipe import BITS
from doctor.formats.tensor_names import NEEDED, PARTS, WORDS
from doctor.plan.groups import own_widths, plain_block, weight_groups
from doctor.quant import pack


def quantization(checkpoint: Checkpoint) -> dict | None:
    """quantization_config of config.json, or of quantize_config.json where config.json has none; None for a float
    model.
    """
    config = checkpoint.value("config.json") or {}
    stated = config.get("quantization_config") or checkpoint.value("quantize_config.json")
    return plain_block(stated) if isinstance(stated, dict) else None


def as_float(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it holds floats, else a view of it that does. Raises BadCheckpoint for unknown
    formats.
    """
    stated = quantization(checkpoint)
    if stated is None:
        return checkpoint
    method = str(stated.get("quant_method") or "gptq").lower()
    if method not in PARTS:
        raise BadCheckpoint(f"config.json: quant_method {method!r} cannot be read back; {', '.join(PARTS)} can.")
    return Dequantized(checkpoint, method, stated)


class Dequantized:
    """A Checkpoint's reading interface over dequantized weights: `tensors` and `load` give float32 for quantized
    linears.
    """

    def __init__(self, source: Checkpoint, method: str, stated: dict):
        self.source, self.method, self.stated = source, method, stated
        self.bits = _bits(method, stated)
        try:
            self.widths = own_widths(stated)
        except Unavailable as error:
            raise BadCheckpoint(f"config.json: {error}; such a file cannot be read back.") from None
        self.modules = sorted(
            n.removesuffix("." + WORDS[method]) for n in source.tensors if n.endswith("." + WORDS[method])
        )
        own = {f"{module}.{part}" for module in self.modules for part in PARTS[method]}
        self.tensors: dict[str, TensorInfo] = {n: i for n, i in source.tensors.items() if n not in own}
        for module in self.modules:
            first = source.tensors[f"{module}.{WORDS[method]}"]
            self.tensors[f"{module}.weight"] = first._replace(
                name=f"{module}.weight", dtype=DTYPES["F32"], shape=self._shape(module)
            )

    def __getattr__(self, name):
        return getattr(self.source, name)

    def value(self, name: str) -> dict | None:
        """A JSON file's object; config.json without its quantization_config, since what is read here are floats."""
        document = self.source.value(name)
        if name == "config.json" and document is not None:
            return {k: v for k, v in document.items() if k != "quantization_config"}
        return document

    def _shape(self, module: str) -> tuple[int, int]:
        if self.method == "compressed-tensors":
            n, k = (int(x) for x in self.source.load(f"{module}.weight_shape"))
            return n, k
        height, width = self.source.tensors[f"{module}.qweight"].shape
        return (
            (width, height * 32 // self.widths.of(module, self.bits)) if self.method == "gptq" else (width * 8, height)
        )

    def load(self, name: str) -> np.ndarray:
        """Codes of a stored tensor; float32 values of a dequantized weight [out_features, in_features]."""
        return self.source.load(name) if self._stored(name) else self.load_on(name, "cpu").numpy()

    def _stored(self, name: str) -> bool:
        return (
            name in self.source.tensors
            or f"{name.removesuffix('.weight')}.{WORDS[self.method]}" not in self.source.tensors
        )

    def load_on(self, name: str, device: torch.device | str) -> torch.Tensor | None:
        """f32[out_features, in_features] of a dequantized weight, its words moved to the device before they are
        unpacked; None for a stored tensor.
        """
        if self._stored(name):
            return None
        module = name.removesuffix(".weight")
        parts = {p: self._part(f"{module}.{p}") for p in PARTS[self.method] if f"{module}.{p}" in self.source.tensors}
        missing = [p for p in NEEDED[self.method] if p not in parts]
        if missing:
            raise BadCheckpoint(f"{module}: {', '.join(missing)} missing beside {WORDS[self.method]}.")
        return self._dequantize(
            {p: t if p == "weight_shape" else t.to(device) for p, t in parts.items()}, self.widths.of(module, self.bits)
        )

    def _dequantize(self, parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
        if self.method == "awq":
            return pack.awq_dequantize(parts["qweight"], parts["qzeros"], parts["scales"])
        if self.method == "compressed-tensors":
            first, scale, shape = parts.pop("weight_packed"), parts.pop("weight_scale"), parts.pop("weight_shape")
            return pack.compressed_dequantize(first, scale, tuple(shape.tolist()), bits, **parts)
        version = (
            2 if str(self.stated.get("checkpoint_format") or self.stated.get("format") or "gptq") == "gptq_v2" else 1
        )
        return pack.gptq_dequantize(
            parts["qweight"], parts["qzeros"], parts["scales"], parts.get("g_idx"), bits, version=version
        )

    def _part(self, name: str) -> torch.Tensor:
        return to_torch(self.source.load(name), self.source.tensors[name].dtype.name)


def to_torch(codes: np.ndarray, dtype_name: str) -> torch.Tensor:
    """The tensor whose raw codes these are, in its own dtype; shares memory where NumPy allows writing, else copies."""
    if not codes.flags.writeable:
        codes = codes.copy()
    kind = DTYPES[dtype_name].torch
    if kind is None or not hasattr(torch, kind):
        raise BadCheckpoint(f"dtype {dtype_name} has no torch type in torch {torch.__version__}.")
    return torch.from_numpy(codes).view(getattr(torch, kind))


def _bits(method: str, stated: dict) -> int:
    bits = stated.get("bits") or stated.get("w_bit")
    if method == "compressed-tensors":
        groups = weight_groups(stated)
        rest = [
            g for g in groups if g.get("targets") == ["Linear"]
        ] or groups  # the others name linears of their own width
        widths = {g["weights"].get("num_bits") for g in rest}
        if stated.get("format") != "pack-quantized" or len(widths) != 1:
            raise BadCheckpoint(
                f"config.json: compressed-tensors format {stated.get('format')!r} with widths {sorted(map(str, widths))}; "
                "pack-quantized with one width can be read back."
            )
        bits = widths.pop()
    if bits not in BITS:
        raise BadCheckpoint(f"config.json: quantization_config bits is {bits!r}; must be 2, 3, 4 or 8.")
    return bits
