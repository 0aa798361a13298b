"""A model of which one decoder layer at a time has weights: built on the meta device, filled from a checkpoint view.

The architecture is transformers' own definition of the config's model_type, never code of the checkpoint
(meta_model.py). Parameters are on meta from the start. Buffers (rotary frequencies, causal masks) are real, because
constructors compute their values.

What runs before the first layer (embeddings, positions, masks) runs once per batch. Every layer records its arguments
then, because models with several kinds of attention give different masks to different layers.

Expert weights that transformers fuses into 3-D parameters are unfused into linears (expert_modules.py), since each
expert has its own input and therefore its own Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.dequantize import Dequantized
from doctor.quant.forward.expert_modules import FORMS, Experts, GptOssExperts, SortedGptOssExperts
from doctor.quant.forward.head import load_head
from doctor.quant.forward.layer_call import LayerCall, run_layer, shared
from doctor.quant.forward.meta_model import build_model, find_decoder_layers
from doctor.quant.forward.parameter_names import ParameterNames, require_shape
from doctor.quant.forward.prefetch import Prefetch, load_tensor
from doctor.quant.forward.recorder import record_calls, require_all_layers, returned_values
from doctor.quant.forward.stored_linear import StoredLinear, to_meta
from doctor.quant.forward.text_model import HeadedModel
from doctor.quant.forward.unfollowed import unfollowed, unfollowed_experts
from doctor.quant.forward.whole_model import WholeModel

_SMALL = 1 << 22  # elements of norms and the like beside the decoder layers


class Skeleton:
    """transformers' model of a checkpoint, weights on meta. `layers` are its decoder layers.

    Computes in `dtype`: float32 whatever the checkpoint's, unless asked otherwise. On a CPU it is faster than bfloat16,
    and the Hessians see inputs without a second rounding. Embeddings keep their stored dtype (they are only looked up);
    what they give is cast.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        on_demand: Callable[[Linear], bool] | None = None,
        experts_at_once: int | None = None,
    ):
        """on_demand: linears whose weights stay in the checkpoint until they compute; the others then stay as they are
        stored (stored_linear.py). None: weights are loaded and cast with their layer. experts_at_once: see Experts;
        None for all.
        """
        self.checkpoint, self.dtype = checkpoint, dtype
        self.spec = spec
        self.device = torch.device(device)
        self.model: Any = build_model(checkpoint, spec)  # a transformers model, whose attributes are its own
        self.base: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self.class_name = type(self.base if isinstance(self.model, HeadedModel) else self.model).__name__
        self.layers_path, self.layers = find_decoder_layers(self.base, spec)
        self._names = ParameterNames(
            checkpoint,
            self.model.base_model_prefix,
            self.layers_path,
            getattr(self.model.config, "model_type", ""),
            self.layers,
        )
        layer_of = {name: i for i in range(len(self.layers)) for name in self.tensors_of(i)}
        self.linears: dict[int, dict[str, Linear]] = {}  # of each layer, by name
        self.outside: list[Linear] = []  # those of no layer of the model: multi-token prediction, a talker
        for linear in spec.linears:
            if linear.tensor in layer_of:
                self.linears.setdefault(layer_of[linear.tensor], {})[linear.name] = linear
            else:
                self.outside.append(linear)
        for i in range(len(self.layers)):
            self._unfuse_experts(i)
            for linear, module in self.modules_of(i).values() if on_demand is not None else ():
                if type(module) is nn.Linear and on_demand is not None:
                    StoredLinear.convert(module, dtype, on_demand(linear))
            for part in self.layers[i].modules() if experts_at_once else ():
                if isinstance(part, Experts):
                    part.at_once = experts_at_once or part.at_once
        self.experts_at_once = experts_at_once or 1 << 30
        self._values = 0  # that a layer returns in a tuple; 0: hidden states alone
        self._prefetch: tuple[int, Prefetch] | None = None
        self._prefetched: dict[str, torch.Tensor] = {}

    # names

    def modules_of(self, i: int) -> dict[str, tuple[Linear, nn.Module]]:
        """Linear's checkpoint name -> (Linear, the module that holds it) of layer i, without those that have no
        module.
        """
        by_source = self.by_tensor(i)
        return {
            name: (linear, by_source[linear.tensor])
            for name, linear in self.linears.get(i, {}).items()
            if linear.tensor in by_source
        }

    def experts_of(self, i: int) -> set[nn.Module]:
        """Modules inside the experts of layer i that take them in turn."""
        return {m for part in self.layers[i].modules() if isinstance(part, Experts) for m in part.experts.modules()}

    def kind_of(self, i: int) -> tuple[str, str]:
        """What distinguishes layers with linears of the same names: their class, and the kind of attention that config
        gives this one.
        """
        kinds = getattr(self.model.config, "layer_types", None)
        return type(self.layers[i]).__name__, str(kinds[i]) if kinds and i < len(kinds) else ""

    def by_tensor(self, i: int) -> dict[str, nn.Module]:
        """Checkpoint name of a weight -> the module of layer i that holds it."""
        found = {}
        for path, module in self.layers[i].named_modules():
            if "weight" in module._parameters:
                source = self._source(i, f"{path}.weight")
                if source is not None:
                    found[source] = module
        return found

    def _unfuse_experts(self, i: int) -> None:
        experts = [x for x in self.linears.get(i, {}).values() if x.expert is not None]
        if not experts or {x.tensor for x in experts} <= self.by_tensor(i).keys():
            return
        for path, module in list(self.layers[i].named_modules()):
            form = next((form for form in FORMS if form.fits(module)), None)
            stored = getattr(self.checkpoint, "format", None)
            if form is GptOssExperts and stored is not None and stored.separates_gate_and_up:
                form = SortedGptOssExperts
            if form is not None:
                parent = self.layers[i].get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], form(module))
                for linear in experts:
                    at = f"{self.layers_path}.{i}.{path}.experts.{linear.expert}.{linear.role}"
                    self._names.give(f"{at}.weight", linear.tensor)
                    self._names.give(f"{at}.bias", f"{linear.name}.bias")
                return
        raise unfollowed_experts(i, self.layers[i], self.class_name, len(experts))

    def source_of(self, parameter: str) -> str | None:
        """The checkpoint's tensor of a parameter of the base model, None where it has none."""
        return self._names.find(parameter)

    def _source(self, i: int, parameter: str) -> str | None:
        return self._names.find(f"{self.layers_path}.{i}.{parameter}")

    # weights

    def load_layer(self, i: int) -> nn.Module:
        """Layer i with its weights, on the device. Raises NotQuantizable where the checkpoint lacks one."""
        if self._prefetch is not None and self._prefetch[0] == i:
            (_, ahead), self._prefetch = self._prefetch, None
            self._prefetched = ahead.tensors()
        try:
            self._load(self.layers[i], f"{self.layers_path}.{i}.")
        finally:
            self._prefetched = {}
        return self.layers[i]

    def require_tensors(self) -> None:
        """Raises NotQuantizable where the checkpoint lacks a tensor for a parameter, or has it in another shape."""
        for name, parameter in self.base.named_parameters():
            if not self._names.parts(name):
                require_shape(source := self._tensor_of(name), self.checkpoint.tensors[source].shape, parameter.shape)

    def require_one_after_another(self) -> None:
        """Raises NotQuantizable where the model does not run all of its layers one after another, as far as a forward
        without weights tells: embeddings are made up, what is small beside the layers is zero, and what cannot run so
        is not judged.
        """
        width = getattr(self.model.config, "hidden_size", 1)
        embedded = torch.arange(1, 8 * width + 1, dtype=torch.float32).view(1, 8, width) / width
        inside = set(self.layers.modules())
        small = [
            (module, name, parameter)
            for module in self.base.modules()
            if module not in inside
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta and parameter.numel() <= _SMALL
        ]
        try:
            for module, name, parameter in small:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
            require_all_layers(
                self.layers,
                lambda: self.base(inputs_embeds=embedded, use_cache=False),
                self.class_name,
            )
        finally:
            for module, name, parameter in small:
                module._parameters[name] = parameter

    def prefetch(self, i: int) -> None:
        """Start reading layer i, if there is one, for the next load_layer(i)."""
        self.stop_prefetch()
        if i < len(self.layers):
            later = {f"{p}.weight" for p, m in self.layers[i].named_modules() if getattr(m, "on_demand", False)}
            sources = (self._source(i, name) for name, _ in self.layers[i].named_parameters() if name not in later)
            names = [name for name in dict.fromkeys(sources) if name is not None]
            self._prefetch = i, Prefetch(self.checkpoint, names, self.device.type == "cuda")

    def stop_prefetch(self) -> None:
        """Wait for the reading thread and forget what it read."""
        if self._prefetch is not None:
            self._prefetch[1].stop()
            self._prefetch = None

    def drop_layer(self, i: int) -> None:
        """Forget the weights of layer i."""
        to_meta(self.layers[i])

    def tensors_of(self, i: int) -> list[str]:
        """Names of all tensors of layer i in the checkpoint, quantized or not, in the checkpoint's order."""
        return self._names.of_layer(i)

    def outer_tensors(self) -> list[str]:
        """Names of all tensors of the checkpoint that belong to no layer of the model."""
        inside = {name for i in range(len(self.layers)) for name in self.tensors_of(i)}
        return [name for name in self.checkpoint.tensors if name not in inside]

    def load_ends(self) -> None:
        """Weights outside the layers: embeddings, final norm, head (its own, or the embedding's where tied)."""
        self.load_base()
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        load_head(self.model, self.base, self.spec, self._names, self.checkpoint, like)

    def load_base(self) -> None:
        """The same without the head."""
        self.load_before_layers()
        for module in self.base.modules():
            if isinstance(module, nn.Embedding):
                module.weight.data = module.weight.data.to(self.dtype)

    def load_whole(self) -> None:
        """Everything: the model computes from ids to logits."""
        self.load_ends()
        for i in range(len(self.layers)):
            self.load_layer(i)

    def load_before_layers(self) -> None:
        """Weights of everything but the layers and the head, embeddings as they are stored."""
        self._load(self.base, "", skip=self.layers)

    def _load(self, module: nn.Module, prefix: str, skip: nn.Module | None = None) -> None:
        for path, child in module.named_modules():
            if skip is not None and any(child is m for m in skip.modules()):
                continue
            keep_dtype = isinstance(child, (nn.Embedding, StoredLinear))
            if isinstance(child, StoredLinear):
                child.hold(None)
            for name in list(child._parameters):
                if child._parameters[name] is None:
                    continue
                full = prefix + (f"{path}.{name}" if path else name)
                read = partial(self._read, full, child._parameters[name].shape, keep_dtype and name == "weight")
                if isinstance(child, StoredLinear) and child.on_demand and name == "weight":
                    child.hold(read)
                    continue
                child._parameters[name] = nn.Parameter(read(), requires_grad=False)
            for name, buffer in child._buffers.items():
                if buffer is None:
                    continue
                source = self._names.find(prefix + (f"{path}.{name}" if path else name))
                dtype = (
                    torch.float32 if buffer.is_floating_point() else buffer.dtype
                )  # rotary frequencies, in every model
                if source is not None and name not in child._non_persistent_buffers_set:
                    buffer = load_tensor(self.checkpoint, source)
                    dtype = self.dtype if buffer.is_floating_point() else buffer.dtype
                child._buffers[name] = buffer.to(self.device, dtype)

    def _read(self, name: str, shape: torch.Size, keep_dtype: bool) -> torch.Tensor:
        if self._names.parts(name):
            return self._read_joined(name, shape)
        source = self._tensor_of(name)
        tensor = self._prefetched.pop(source, None)
        if tensor is None and isinstance(self.checkpoint, Dequantized):
            tensor = self.checkpoint.load_on(source, self.device)
        tensor = load_tensor(self.checkpoint, source) if tensor is None else tensor
        require_shape(source, tensor.shape, shape)
        # The copy to a GPU is of the stored width and need not be waited for; the cast happens there.
        return tensor.to(self.device, non_blocking=True).to(tensor.dtype if keep_dtype else self.dtype)

    def _tensor_of(self, name: str) -> str:
        """The tensor of a parameter. Raises NotQuantizable where there is none."""
        source = self._names.find(name)
        if source is None:
            raise unfollowed(name, self.base, self.class_name, self._names, self.checkpoint)
        return source

    def _read_joined(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A parameter that transformers joins from several tensors."""
        parts = [load_tensor(self.checkpoint, part) for part in self._names.parts(name)]
        joined = torch.cat(parts)
        require_shape(self._names.parts(name)[0], joined.shape, shape)
        return joined.to(self.device, self.dtype)

    # running

    @torch.no_grad()
    def open_calls(
        self, batches: list[torch.Tensor], seen: Mapping[int, Mapping[str, torch.Tensor]] = MappingProxyType({})
    ) -> Iterator[tuple[torch.Tensor, list[LayerCall]]]:
        """(inputs of the first layer f32[rows, length, hidden], each layer's LayerCall) for every batch of ids
        int64[rows, length]. seen: what the processor made of batches that are one row with images or sound.

        Materialises everything before the layers and forgets it at the end. Arguments equal to those of the batch
        before are the same objects, so masks and positions are held once.
        """
        self.load_before_layers()
        casts = [
            m.register_forward_hook(_cast_output(self.dtype))
            for m in self.base.modules()
            if isinstance(m, nn.Embedding)
        ]
        try:
            if batches:
                self._values = self.probe(batches[0])
            whole = WholeModel(self.checkpoint, self.layers, self.model.config, self.device) if seen else None
            before: list[LayerCall] = []
            for number, ids in enumerate(batches):
                if whole is not None and number in seen:
                    yield whole.calls(seen[number], self._values, self.dtype)
                    continue
                hidden, calls = record_calls(self.layers, self._forward, ids, self._values, self.class_name)
                hidden = hidden.to(self.dtype)
                calls = [shared(call, before[i]) if before else call for i, call in enumerate(calls)]
                before = calls
                yield hidden, calls
        finally:
            for hook in casts:
                hook.remove()
            for child in self.base.children():
                if child is not self.layers and not _contains(child, self.layers):
                    to_meta(child)

    def run_layer(self, i: int, hidden: torch.Tensor, call: LayerCall, *, carry: bool = True) -> torch.Tensor:
        """Output [rows, length, hidden] of layer i. Its weights must be loaded. carry: keep what later layers take of
        it besides.
        """
        try:
            return run_layer(self.layers[i], hidden, call, carry=carry)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refuse(i, error) from error

    def as_output(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which a layer returns them."""
        return (hidden, *[None] * (self._values - 1)) if self._values else hidden

    def _refuse(self, i: int, error: Exception) -> NotQuantizable:
        """The model's own code raised on its own weights: sizes in config.json that do not fit each other."""
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        return NotQuantizable(
            _(
                "layer {i}: transformers' {module} cannot compute: {error}: {reason}.",
                i=i,
                module=type(self.layers[i]).__name__,
                error=type(error).__name__,
                reason=reason,
            ),
            _("Run the model in transformers: it ends the same way; correct the sizes in config.json."),
        )

    def probe(self, ids: torch.Tensor) -> int:
        """How many values a layer returns in a tuple, 0 for none: the recorders have to answer in the same form."""
        try:
            return returned_values(self.load_layer(0), self._forward, ids[:1])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refuse(0, error) from error
        finally:
            self.drop_layer(0)

    def _forward(self, ids: torch.Tensor) -> None:
        self.base(input_ids=ids.to(self.device), use_cache=False)


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(child is part for child in module.modules())


def _cast_output(dtype: torch.dtype):
    return lambda module, args, output: output.to(dtype)
