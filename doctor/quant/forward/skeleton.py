"""A model of which one decoder block at a time has weights: built on the meta device, filled from a checkpoint view.

The architecture is transformers' own definition of the config's model_type, never code of the checkpoint. Parameters
are on meta from the start; buffers (rotary frequencies, causal masks) are real, because their values come from
constructors.

The part before the first block (embeddings, positions, masks) runs once for each batch. Every block is a recorder then,
so each block's own arguments are known: models with several attention kinds give different masks to different blocks.

Experts that transformers stacks into 3-D parameters are taken apart again into linears of their own, since each has its
own input, hence its own Hessian.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.model.spec import NOT_TEXT, Linear, ModelSpec
from doctor.quant.dequantize import Dequantized

MOST_MODULES = 10_000  # layers, or experts of one layer, that a config may ask for
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def cache_argument(model: nn.Module) -> str:
    """The name under which forward takes a key/value cache, and its output returns it: releases of transformers
    differ.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def load_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of the checkpoint (or a view of it) in its own dtype, or cast to `dtype`.

    Raises NotQuantizable for what is not F16, BF16, F32 or F64: such a checkpoint is quantized already.
    """
    stored = checkpoint.tensors[name].dtype.name
    if stored not in TORCH_DTYPES:
        raise NotQuantizable(
            f"{name}: dtype {stored}; must be BF16, F16, F32 or F64.",
            "Quantize from the 16-bit original: rounding twice costs twice.",
        )
    codes = checkpoint.load(name)
    if codes.itemsize == 2:
        tensor = torch.from_numpy(codes.view("int16")).view(TORCH_DTYPES[stored])
    else:
        tensor = torch.from_numpy(codes)
    return tensor if dtype is None else tensor.to(dtype)


_DRAWS = ("normal_", "uniform_")  # and trunc_normal_, kaiming_uniform_, xavier_normal_ …


class _NoDraws(TorchFunctionMode):
    """Initial values of meta tensors are not drawn: there is nothing to fill, and torch imports sympy to say so (45
    MiB, 1 s).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "").endswith(_DRAWS) and tensor is not None and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside go to the meta device; buffers keep the values that constructors give them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta
    try:
        with _NoDraws():
            yield
    finally:
        nn.Module.register_parameter = register


class Experts(nn.Module):
    """The experts of one block as linears, in place of transformers' stacked [experts, …] parameters.

    forward(hidden [tokens, k], top_k_index int64[tokens, top_k], top_k_weights [tokens, top_k]) -> [tokens, k], with
    the arithmetic of the stacked module: act(gate(x)) * up(x), down, weighted sum over the experts that a token chose.

    before: called twice in a pass, with (linear, function that gives its input) of every expert that tokens chose:
    before the first gate computes, and before the first down.
    """

    before: Callable[[list], None] | None = None

    def __init__(self, stacked: nn.Module, *, in_first: bool = False, bias: bool = False):
        super().__init__()
        count, both, hidden = stacked.gate_up_proj.shape
        if in_first:
            hidden, both = both, hidden
        self.gated = self.gate_of(stacked)
        with torch.device("meta"):
            self.experts = nn.ModuleList(
                nn.ModuleDict(
                    {
                        "gate": nn.Linear(hidden, both // 2, bias),
                        "up": nn.Linear(hidden, both // 2, bias),
                        "down": nn.Linear(both // 2, hidden, bias),
                    }
                )
                for _ in range(count)
            )
        self.requires_grad_(False)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether this is the plain stacked form: gate_up_proj [E, 2I, H], down_proj [E, H, I], no biases."""
        parameters = dict(module.named_parameters(recurse=False))
        if parameters.keys() != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
            return False
        gate_up, down = parameters["gate_up_proj"].shape, parameters["down_proj"].shape
        return len(gate_up) == 3 and down == (gate_up[0], gate_up[2], gate_up[1] // 2) and not hasattr(module, "limit")

    @staticmethod
    def gate_of(stacked: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The input of down from what gate and up give."""
        act = stacked.act_fn
        return lambda gate, up: act(gate) * up

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        routes = [(expert, *torch.where(top_k_index == number)) for number, expert in enumerate(self.experts)]
        routes = [(expert, token, choice) for expert, token, choice in routes if token.numel()]
        weights = [top_k_weights[token, choice, None] for _, token, choice in routes]
        return self._sum(
            hidden, [(expert, token, lambda token=token: hidden[token]) for expert, token, _ in routes], weights
        )

    def _sum(
        self,
        hidden: torch.Tensor,
        routes: list[tuple[nn.ModuleDict, torch.Tensor, Callable[[], torch.Tensor]]],
        weights: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """Outputs of experts, added up in the places of their tokens. routes: (expert, its tokens, function that gives
        its input).
        """
        self._tell([(expert[role], x) for expert, _, x in routes for role in ("gate", "up")])
        middle = []
        for expert, _, x in routes:
            x = x()
            middle.append(self.gated(expert["gate"](x), expert["up"](x)))
        self._tell([(expert["down"], lambda y=y: y) for (expert, _, _), y in zip(routes, middle)])
        out = torch.zeros_like(hidden)
        for number, ((expert, token, _), y) in enumerate(zip(routes, middle)):
            y = expert["down"](y)
            out.index_add_(0, token, (y if weights is None else y * weights[number]).to(out.dtype))
        return out

    def _tell(self, inputs: list[tuple[nn.Module, Callable[[], torch.Tensor]]]) -> None:
        if self.before is not None:
            self.before(inputs)


class GptOssExperts(Experts):
    """GPT-OSS: stacks lie [experts, in, out] with biases, gate and up take turns among the outputs, and both are
    clamped before they meet.

    The linears `gate` and `up` are the first and the second half of those outputs, as GPTQModel names them.
    """

    def __init__(self, stacked: nn.Module):
        super().__init__(stacked, in_first=True, bias=True)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "GptOssExperts" and callable(getattr(module, "_apply_gate", None))

    @staticmethod
    def gate_of(stacked: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda gate, up: stacked._apply_gate(torch.cat((gate, up), -1))


class SortedGptOssExperts(GptOssExperts):
    """The same with linears that are gate and up, as llm-compressor writes them."""

    @staticmethod
    def gate_of(stacked: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda gate, up: stacked._apply_gate(torch.stack((gate, up), -1).flatten(-2))


class Llama4Experts(Experts):
    """Llama 4's whole mixture. Its router scales what goes into an expert, not what comes out, and gives scores for all
    experts, 0 for those that a token did not choose: transformers computes all of them for every token, the zeros too.

    forward(hidden [rows, length, k]) -> ([tokens, k], the router's logits)
    """

    def __init__(self, mixture: nn.Module):
        super().__init__(mixture.experts, in_first=True)
        self.router, self.shared_expert = mixture.router, mixture.shared_expert

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextMoe"

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = self.router(hidden)
        chosen = [
            (expert, number, torch.where(scores[:, number] != 0)[0]) for number, expert in enumerate(self.experts)
        ]
        routed = self._sum(
            hidden,
            [
                (expert, token, lambda token=token, n=number: hidden[token] * scores[token, n, None])
                for expert, number, token in chosen
                if token.numel()
            ],
            None,
        )
        return self.shared_expert(hidden) + routed, logits


_FORMS = (Experts, GptOssExperts, Llama4Experts)


@dataclass
class Call:
    """Arguments of one block for one batch, without the hidden states: they stand at position 0 or under their name."""

    args: tuple
    kwargs: dict


class _Ahead:
    """Tensors of one block as stored, read by a thread of their own while another block computes; pinned for a copy to
    a GPU.
    """

    def __init__(self, checkpoint: Checkpoint, names: list[str], pinned: bool):
        self._found: dict[str, torch.Tensor] = {}
        self._error: Exception | None = None
        self._wanted = True
        self._thread = threading.Thread(target=self._read, args=(checkpoint, names, pinned), name="doctor-read-ahead")
        self._thread.start()

    def _read(self, checkpoint: Checkpoint, names: list[str], pinned: bool) -> None:
        try:
            for name in names:
                if not self._wanted:
                    return
                tensor = load_tensor(checkpoint, name)
                self._found[name] = tensor.pin_memory() if pinned else tensor
        except Exception as error:  # whatever it is, it belongs to who asks for the block
            self._error = error

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, once. Raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def stop(self) -> None:
        self._wanted = False
        self._thread.join()


class _Enough(Exception):
    """Leaves a forward pass as soon as what was wanted from it is known."""


class Skeleton:
    """transformers' model of a checkpoint, weights on meta. `blocks` are its decoder blocks.

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
    ):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.spec = spec
        self.device = torch.device(device)
        self.model = build_model(checkpoint, spec)
        self.base = getattr(self.model, self.model.base_model_prefix, self.model)
        self.list_name, self.blocks = _find_blocks(self.base, spec)
        self._names = _Names(
            checkpoint, self.model.base_model_prefix, self.list_name, getattr(self.model.config, "model_type", "")
        )
        self.linears: dict[int, dict[str, Linear]] = {}
        for linear in spec.linears:
            if linear.block is not None:
                self.linears.setdefault(linear.block, {})[linear.name] = linear
        for i in range(len(self.blocks)):
            self._separate_experts(i)
        self._returns_tuple = False
        self._ahead: tuple[int, _Ahead] | None = None
        self._at_hand: dict[str, torch.Tensor] = {}

    # names

    def modules_of(self, i: int) -> dict[str, tuple[Linear, nn.Module]]:
        """Linear's checkpoint name -> (Linear, the module that holds it) of block i, without those that have no
        module.
        """
        by_source = self.by_tensor(i)
        return {
            name: (linear, by_source[linear.tensor])
            for name, linear in self.linears.get(i, {}).items()
            if linear.tensor in by_source
        }

    def kind_of(self, i: int) -> tuple[str, str]:
        """What tells blocks with linears of the same names apart: their class, and the kind of attention that config
        gives this one.
        """
        kinds = getattr(self.model.config, "layer_types", None)
        return type(self.blocks[i]).__name__, str(kinds[i]) if kinds and i < len(kinds) else ""

    def by_tensor(self, i: int) -> dict[str, nn.Module]:
        """Checkpoint name of a weight -> the module of block i that holds it."""
        found = {}
        for path, module in self.blocks[i].named_modules():
            if "weight" in module._parameters:
                source = self._source(i, f"{path}.weight")
                if source is not None:
                    found[source] = module
        return found

    def _separate_experts(self, i: int) -> None:
        experts = [x for x in self.linears.get(i, {}).values() if x.expert is not None]
        if not experts:
            return
        for path, module in list(self.blocks[i].named_modules()):
            form = next((form for form in _FORMS if form.fits(module)), None)
            if form is GptOssExperts and getattr(self.checkpoint, "method", "") == "compressed-tensors":
                form = SortedGptOssExperts
            if form is not None:
                parent = self.blocks[i].get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], form(module))
                for linear in experts:
                    at = f"{self.list_name}.{i}.{path}.experts.{linear.expert}.{linear.role}"
                    self._names.give(f"{at}.weight", linear.tensor)
                    self._names.give(f"{at}.bias", f"{linear.name}.bias")
                return
        raise NotQuantizable(
            f"block {i}: the checkpoint has {len(experts)} separate linears of experts, and transformers' "
            f"{type(self.blocks[i]).__name__} stacks them in a form that is not known here.",
            "Quantize a model whose experts are gate, up and down without biases.",
        )

    def _source(self, i: int, parameter: str) -> str | None:
        return self._names.find(f"{self.list_name}.{i}.{parameter}")

    # weights

    def load_block(self, i: int) -> nn.Module:
        """Block i with its weights, on the device. Raises NotQuantizable where the checkpoint lacks one."""
        if self._ahead is not None and self._ahead[0] == i:
            (_, ahead), self._ahead = self._ahead, None
            self._at_hand = ahead.tensors()
        try:
            self._load(self.blocks[i], f"{self.list_name}.{i}.")
        finally:
            self._at_hand = {}
        return self.blocks[i]

    def read_ahead(self, i: int) -> None:
        """Start reading block i, if there is one, for the next load_block(i)."""
        self.stop_reading()
        if i < len(self.blocks):
            sources = (self._source(i, name) for name, _ in self.blocks[i].named_parameters())
            names = [name for name in dict.fromkeys(sources) if name is not None]
            self._ahead = i, _Ahead(self.checkpoint, names, self.device.type == "cuda")

    def stop_reading(self) -> None:
        """Wait for the reading thread and forget what it read."""
        if self._ahead is not None:
            self._ahead[1].stop()
            self._ahead = None

    def drop_block(self, i: int) -> None:
        """Forget the weights of block i."""
        _to_meta(self.blocks[i])

    def tensors_of(self, i: int) -> list[str]:
        """Names of all tensors of block i in the checkpoint, quantized or not, in the checkpoint's order."""
        return self._names.of_block(i)

    def outer_tensors(self) -> list[str]:
        """Names of all tensors of the checkpoint that belong to no block of the model."""
        inside = {name for i in range(len(self.blocks)) for name in self.tensors_of(i)}
        return [name for name in self.checkpoint.tensors if name not in inside]

    def load_ends(self) -> None:
        """Weights of everything outside the blocks: embeddings, final norm, head (its own, or the embedding's where
        tied).
        """
        self._load(self.base, "", skip=self.blocks)
        for module in self.base.modules():
            if isinstance(module, nn.Embedding):
                module.weight.data = module.weight.data.to(self.dtype)
        head = self.model.get_output_embeddings()
        if head is None:
            raise NotQuantizable(f"{type(self.model).__name__} has no output head, so there are no logits to compare.")
        source = self.spec.head_tensor if self.spec.head_tensor in self.checkpoint.tensors else self.spec.embed_tensor
        if source is None:
            raise NotQuantizable(
                "neither an output head nor an embedding is among the tensors, so there are no logits to compare."
            )
        head.weight = nn.Parameter(
            load_tensor(self.checkpoint, source, self.dtype).to(self.device), requires_grad=False
        )
        bias = source.removesuffix("weight") + "bias"
        if getattr(head, "bias", None) is not None and bias in self.checkpoint.tensors:
            head.bias = nn.Parameter(
                load_tensor(self.checkpoint, bias, self.dtype).to(self.device), requires_grad=False
            )

    def load_whole(self) -> None:
        """Everything: the model computes from ids to logits."""
        self.load_ends()
        for i in range(len(self.blocks)):
            self.load_block(i)

    def _load(self, module: nn.Module, prefix: str, skip: nn.Module | None = None) -> None:
        for path, child in module.named_modules():
            if skip is not None and any(child is m for m in skip.modules()):
                continue
            keep_dtype = isinstance(child, nn.Embedding)
            for name in list(child._parameters):
                if child._parameters[name] is None:
                    continue
                full = prefix + (f"{path}.{name}" if path else name)
                child._parameters[name] = nn.Parameter(
                    self._read(full, child._parameters[name].shape, keep_dtype), requires_grad=False
                )
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
        source = self._names.find(name)
        if source is None:
            raise NotQuantizable(
                f"{name}: {type(self.model).__name__} has this parameter, the checkpoint has no tensor for it.",
                "Run `doctor check`: rules F05x compare the tensors with config.json.",
            )
        tensor = self._at_hand.pop(source, None)
        if tensor is None and isinstance(self.checkpoint, Dequantized):
            tensor = self.checkpoint.load_on(source, self.device)
        tensor = load_tensor(self.checkpoint, source) if tensor is None else tensor
        if tensor.shape != shape:
            raise NotQuantizable(
                f"{source}: shape {list(tensor.shape)}; config.json makes it {list(shape)}.",
                "Run `doctor check`: rules F05x compare the tensors with config.json.",
            )
        # The copy to a GPU is of the stored width and need not be waited for; the cast happens there.
        return tensor.to(self.device, non_blocking=True).to(tensor.dtype if keep_dtype else self.dtype)

    # running

    @torch.no_grad()
    def open_calls(self, batches: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, list[Call]]]:
        """(inputs of the first block f32[rows, length, hidden], each block's Call) for every batch of ids int64[rows,
        length].

        Materialises everything before the blocks and forgets it at the end. Arguments equal to those of the batch
        before are the same objects, so masks and positions are held once.
        """
        self._load(self.base, "", skip=self.blocks)
        casts = [
            m.register_forward_hook(_cast_output(self.dtype))
            for m in self.base.modules()
            if isinstance(m, nn.Embedding)
        ]
        try:
            if batches:
                self._returns_tuple = self._probe(batches[0])
            before: list[Call] = []
            for ids in batches:
                hidden, calls = self._record(ids)
                calls = [_share(call, before[i]) if before else call for i, call in enumerate(calls)]
                before = calls
                yield hidden, calls
        finally:
            for hook in casts:
                hook.remove()
            for child in self.base.children():
                if child is not self.blocks and not _contains(child, self.blocks):
                    _to_meta(child)

    def run_block(self, i: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Output [rows, length, hidden] of block i. Its weights must be loaded."""
        if "hidden_states" in call.kwargs:
            out = self.blocks[i](*call.args, **{**call.kwargs, "hidden_states": hidden})
        else:
            out = self.blocks[i](hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _refuse(self, i: int, error: Exception) -> NotQuantizable:
        """The model's own code raised on its own weights: sizes in config.json that do not fit each other."""
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        return NotQuantizable(
            f"block {i}: transformers' {type(self.blocks[i]).__name__} cannot compute: {type(error).__name__}: {reason}.",
            "Run the model in transformers: it ends the same way; correct the sizes in config.json.",
        )

    def _probe(self, ids: torch.Tensor) -> bool:
        """Whether blocks return a tuple: the recorders have to answer in the same form."""
        found = []

        def stop(module, args, output):
            found.append(isinstance(output, tuple))
            raise _Enough

        hook = self.load_block(0).register_forward_hook(stop)
        try:
            self._forward(ids[:1])
        except _Enough:
            pass
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._refuse(0, error) from error
        finally:
            hook.remove()
            self.drop_block(0)
        return found[0]

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        calls: list[Call | None] = [None] * len(self.blocks)
        first = []

        def recorder(i):
            def forward(*args, **kwargs):
                hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if i == 0:
                    first.append(hidden.to(self.dtype))
                named = {k: None if k == "hidden_states" else _no_cache(v) for k, v in kwargs.items()}
                calls[i] = Call(tuple(_no_cache(a) for a in (args if "hidden_states" in kwargs else args[1:])), named)
                return (hidden,) if self._returns_tuple else hidden

            return forward

        for i, block in enumerate(self.blocks):
            block.forward = recorder(i)
        try:
            self._forward(ids)
        finally:
            for block in self.blocks:
                del block.forward
        if any(call is None for call in calls):
            raise NotQuantizable(
                f"{type(self.model).__name__} does not run all of its {len(calls)} blocks one after another.",
                "Such a model cannot be quantized block by block.",
            )
        return first[0], calls

    def _forward(self, ids: torch.Tensor) -> None:
        self.base(input_ids=ids.to(self.device), use_cache=False)


class _Names:
    """Names of transformers' parameters (inside the base model) to names of the checkpoint's tensors.

    Checkpoints differ in what stands in front (`model.`, `transformer.`, `language_model.model.`, nothing) and by the
    renames that transformers applies when it loads; the part from the list of blocks on is the same.
    """

    def __init__(self, checkpoint: Checkpoint, base_prefix: str, list_name: str, model_type: str):
        self._base = base_prefix
        self._given: dict[str, str] = {}
        self._by_name: dict[str, str] = {}
        self._blocks: dict[int, list[str]] = {}
        last = list_name.rpartition(".")[2]
        inside = re.compile(rf"(?:^|\.){re.escape(last)}\.(\d+)\.(.+)$")
        renames = _renames(model_type)
        for source in checkpoint.tensors:
            if NOT_TEXT.search(source):
                continue
            name = source
            for old, new in renames:
                name = name.replace(old, new)
            self._by_name.setdefault(name, source)
            match = inside.search(name)
            if match:
                self._by_name.setdefault(f"{list_name}.{match[1]}.{match[2]}", source)
                self._blocks.setdefault(int(match[1]), []).append(source)

    def give(self, name: str, source: str) -> None:
        self._given[name] = source

    def find(self, name: str) -> str | None:
        """The tensor of a parameter, None where the checkpoint has none."""
        if name in self._given:
            return self._given[name]
        outer = name.partition(".")[2]
        candidates = [
            name,
            f"{self._base}.{name}",
            outer,
            f"{self._base}.{outer}",
            f"language_model.{name}",
            f"language_model.{self._base}.{name}",
            f"{self._base}.language_model.{name}",
        ]
        return next((self._by_name[c] for c in candidates if c in self._by_name), None)

    def of_block(self, i: int) -> list[str]:
        return self._blocks.get(i, [])


def _renames(model_type: str) -> list[tuple[str, str]]:
    """Plain renames that transformers applies to this family's tensor names when it loads them."""
    try:
        from transformers.conversion_mapping import WeightRenaming, get_checkpoint_conversion_mapping
    except ImportError:  # transformers before 5 names its parameters as checkpoints do
        return []
    pairs = []
    for item in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(item, WeightRenaming):
            plain = [s.replace("\\.", ".") for s in item.source_patterns]
            pairs += [(s, t) for s, t in zip(plain, item.target_patterns) if re.fullmatch(r"[\w.]+", s)]
    return pairs


def build_model(checkpoint: Checkpoint, spec: ModelSpec) -> nn.Module:
    """transformers' causal language model for the checkpoint's config: eval mode, parameters on meta.

    Raises NotQuantizable for a model_type that transformers does not define: a checkpoint's own code is never run.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(f"{checkpoint.root}: config.json is absent or broken; quantizing needs the model's shape.")
    stated = config.get("quantization_config")
    if stated is not None:
        method = (
            stated.get("quant_method", "some method") if isinstance(stated, dict) else f"{stated!r}, which is no object"
        )
        raise NotQuantizable(
            f"config.json#/quantization_config: this checkpoint is quantized already ({method}).",
            "Quantize from the 16-bit original.",
        )
    block = {k: v for k, v in (config[spec.text_key] if spec.text_key else config).items() if k != "auto_map"}
    kind = str(block.get("model_type") or config.get("model_type") or "")
    if kind not in CONFIG_MAPPING:
        raise NotQuantizable(
            f"config.json#/model_type: {kind!r} is not defined in transformers {transformers.__version__}.",
            "Install a transformers that has it: code that comes with a checkpoint is never run.",
        )
    _require_finite_work(block)
    try:
        built = CONFIG_MAPPING[kind].from_dict(_numbers({k: v for k, v in block.items() if k != "quantization_config"}))
        built.use_cache = False
        with _parameters_on_meta(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                built, attn_implementation=attention(built), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever the library raises for a config it does not like is the reason
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise NotQuantizable(
            f"config.json: transformers {transformers.__version__} cannot build {kind}: {type(error).__name__}: {reason}.",
            "Run `doctor check`: rules C14x say what is wrong with config.json.",
        ) from error
    return model.eval()


def _numbers(value: object) -> object:
    """A config with {"__float__": "Infinity"}, transformers' spelling of what JSON has no number for, as that
    number.
    """
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if value.keys() == {"__float__"} else {k: _numbers(v) for k, v in value.items()}
        )
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def _require_finite_work(block: dict) -> None:
    """Raises NotQuantizable for a number of layers or experts that transformers would build one by one for hours."""
    for key, value in block.items():
        if (
            re.fullmatch(r"(num|n)_.*(layers?|experts)", key)
            and isinstance(value, (int, float))
            and not value <= MOST_MODULES
        ):
            raise NotQuantizable(
                f"config.json#/{key}: {value:,}; must be a whole number up to {MOST_MODULES:,}.",
                "Correct it in config.json.",
            )


def attention(config) -> str:
    """The attention that computes what the model defines: eager where it has a softcap, which sdpa does not know, or no
    sdpa at all.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    defined = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or not getattr(defined, "_supports_sdpa", True) else "sdpa"


def _find_blocks(base: nn.Module, spec: ModelSpec) -> tuple[str, nn.ModuleList]:
    found = [(name, m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == spec.n_layers]
    found = [(name, m) for name, m in found if not re.search(r"\.\d+\.", f".{name}.")]
    if not found:
        raise NotQuantizable(f"{type(base).__name__} has no list of {spec.n_layers} decoder blocks.")
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def _to_meta(module: nn.Module) -> None:
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                child._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(child is part for child in module.modules())


def _cast_output(dtype: torch.dtype):
    return lambda module, args, output: output.to(dtype)


def _no_cache(value: object) -> object:
    """A KV cache would grow with every pass over the same rows."""
    from transformers.cache_utils import Cache

    return None if isinstance(value, Cache) else value


def _share(call: Call, before: Call) -> Call:
    return Call(
        tuple(_same(a, b) for a, b in zip(call.args, before.args, strict=True)),
        {k: _same(v, before.kwargs.get(k)) for k, v in call.kwargs.items()},
    )


def _same(value: object, before: object) -> object:
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        return (
            before
            if value.shape == before.shape and value.dtype == before.dtype and torch.equal(value, before)
            else value
        )
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(_same(v, b) for v, b in zip(value, before))
    return value
