"""A family's tiny model, and what one forward pass through it shows: which norm feeds a linear, what a path does."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from probe_families import ALIASES, FAMILIES, MODEL_TYPE, SIZES


class ProbeError(Exception):
    """The class does something that the table cannot say; the text names it."""


@dataclass
class Model:
    """One model as it was built and saved. tensors: name in the file -> float32 values; config: config.json and what
    the class was given.
    """

    module: object
    config: dict
    tensors: dict
    layers: int
    sources: dict = field(default_factory=dict)  # name in the file -> (parameter's name, index in it)

    def size(self, key: str) -> object:
        """Value of a config key, as doctor would derive an absent one."""
        value = self.config.get(key)
        if value is None and key == "head_dim":
            hidden, heads = (
                next((self.config[n] for n in (k, *ALIASES[k]) if n in self.config), None)
                for k in ("hidden_size", "num_attention_heads")
            )
            return hidden // heads if hidden and heads else None
        return value


def known_class(family: str):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[MODEL_TYPE.get(family, family)]


def sizes_for(family: str, which: int) -> dict:
    """Arguments of the config class for the first (0) or second (1) model."""
    known, own = known_class(family), FAMILIES[family]
    fields = set(vars(known())) | set(getattr(known, "attribute_map", {}))
    mapped = getattr(known, "attribute_map", {})
    names = {}
    for key, values in SIZES.items():
        name = next((n for n in (key, *ALIASES.get(key, ())) if n in fields), None)
        if name is not None:
            names[mapped.get(name, name)] = values[which]
    for key, values in own.items():
        names.pop(key, None)
        if values is not None and values[which] is not None:
            names[key] = values[which]
    return names


def build(family: str, which: int, folder: Path, **changes) -> Model:
    """A model with random weights, saved to `folder` and read back by the names of its file."""
    import torch
    import transformers
    from safetensors import safe_open

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(which)
    given = sizes_for(family, which) | changes
    config = known_class(family)(**given, tie_word_embeddings=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                middle = 1.0 if parameter.dim() == 1 and "norm" in name.lower() else 0.0
                parameter.normal_(middle, 0.2 if parameter.dim() == 1 else 0.08)
        module.save_pretrained(folder)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file handle, not a dict
    tensors = {name: t for name, t in tensors.items() if t.numel()}  # 0 shared experts: a matrix without rows
    stated = {k: v for k, v in config.to_dict().items() if v is not None}
    numbers = {int(m[1]) for m in map(re.compile(r".*?\.(\d+)\.").match, tensors) if m}
    return Model(module, stated | given, tensors, max(numbers) + 1)


def build_without(family: str, which: int, folder: Path, key: str) -> Model:
    """The same with a key set to null, to 0 or to false, whichever the class takes first."""
    for nothing in (None, 0, False):
        try:
            return build(family, which, folder, **{key: nothing})
        except Exception as error:
            refused = error
    raise ProbeError(f"the class takes no null, 0 or false for {key}: {refused}")


def template_of(name: str) -> str:
    """A file's name with {i} for the decoder layer and {e} for the expert."""
    name = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
    return re.sub(r"(experts)\.\d+\.", r"\1.{e}.", name)


def layer_of(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


@dataclass
class Trace:
    """inputs: module -> first argument of its first call. outputs likewise. calls: norm -> (args, kwargs)."""

    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)


def run(model: Model) -> Trace:
    """One forward pass over 12 tokens. Every tensor is kept, so that no two storages share an address."""
    import torch

    trace, handles = Trace(), []

    def hook(name: str):
        def seen(module, args, kwargs, output):
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
            out = output[0] if isinstance(output, tuple) else output
            if name not in trace.inputs and first is not None and isinstance(out, torch.Tensor):
                trace.inputs[name], trace.outputs[name] = first, out
                trace.calls[name] = (args, kwargs)

        return seen

    for name, module in model.module.named_modules():
        handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        model.module(torch.arange(3, 15)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return trace


def find_sources(model: Model) -> None:
    """Which parameter, or which part of one, each tensor of the file is: by its values, since saving renames and
    unstacks.
    """
    import torch

    def key(t) -> tuple:
        return tuple(t.shape), t.contiguous().numpy().tobytes()

    parts: dict[tuple, tuple] = {}

    def offer(name: str, t, index: tuple) -> None:
        parts.setdefault(key(t), (name, index))
        if t.dim() == 2:
            parts.setdefault(key(t.T), (name, index))

    for name, parameter in model.module.state_dict().items():
        t = parameter.detach()
        if t.dtype != torch.float32:
            continue
        offer(name, t, ())
        if t.dim() == 3:
            parts.setdefault(key(t.transpose(1, 2)), (name, ()))
            for e in range(t.shape[0]):
                offer(name, t[e], (e,))
                for axis in (0, 1):
                    half = t.shape[1 + axis] // 2
                    for cut in (slice(0, half), slice(half, None), slice(0, None, 2), slice(1, None, 2)):
                        index = (e, cut) if axis == 0 else (e, slice(None), cut)
                        offer(name, t[index], index)
    model.sources = {
        name: parts[key(t)] for name, t in model.tensors.items() if t.dtype == torch.float32 and key(t) in parts
    }


def is_norm(module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        "norm" in type(module).__name__.lower()
        and (weight is None or weight.dim() == 1)
        and not list(module.children())
    )


def norms_before(model: Model, trace: Trace) -> dict[str, str]:
    """name in the file -> name in the file of the norm (without ".weight") whose output it reads."""
    in_file = {source: name for name, (source, index) in model.sources.items() if not index}
    modules = dict(model.module.named_modules())
    norm_at = {}
    for name, module in modules.items():
        if is_norm(module) and name in trace.outputs and f"{name}.weight" in in_file:
            norm_at[trace.outputs[name].untyped_storage().data_ptr()] = in_file[f"{name}.weight"].removesuffix(
                ".weight"
            )
    found = {}
    for name, (source, _) in model.sources.items():
        module = source.rpartition(".")[0]
        if module in trace.inputs and not is_norm(modules[module]):
            norm = norm_at.get(trace.inputs[module].untyped_storage().data_ptr())
            if norm is not None:
                found[name] = norm
    return found


def norm_kind(module, call: tuple) -> str:
    """How a norm applies its weight, from calls with the arguments it was called with."""
    import torch

    args, kwargs = call
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        bare = module(*args, **kwargs)
        module.weight.copy_(state["weight"])
        full = module(*args, **kwargs)
        for name, p in module.named_parameters():
            p.copy_(state[name])
    if not bare.abs().max() > 0:
        return "weight * xhat"
    if torch.allclose(full, bare * (1 + state["weight"]), rtol=1e-4, atol=1e-5):
        return "(1 + weight) * xhat"
    raise ProbeError(f"a norm of class {type(module).__name__} applies its weight in a way of its own")


def norms_of(model: Model, trace: Trace) -> dict[str, str]:
    """template of a norm's weight -> how the norm applies it."""
    in_file = {source: name for name, (source, index) in model.sources.items() if not index}
    found: dict[str, set[str]] = {}
    for name, module in model.module.named_modules():
        if is_norm(module) and name in trace.calls and f"{name}.weight" in in_file:
            found.setdefault(template_of(in_file[f"{name}.weight"]), set()).add(norm_kind(module, trace.calls[name]))
    if any(len(kinds) > 1 for kinds in found.values()):
        raise ProbeError(f"a norm applies its weight in two ways: {found}")
    return {template: kinds.pop() for template, kinds in found.items()}


def is_linear_path(model: Model, first: list[str], second: str, experts: bool) -> bool:
    """Whether doubling the rows of `first` (weight and bias) doubles what `second` reads; the module's output, where it
    is of experts.
    """
    import torch

    module = model.sources[second][0].rpartition(".")[0]
    state = model.module.state_dict()
    parts = [state[name][index] if index else state[name] for name, index in (model.sources[n] for n in first)]
    before = run(model)
    with torch.no_grad():
        for part in parts:
            part.mul_(2)
        after = run(model)
        for part in parts:
            part.mul_(0.5)
    at = "outputs" if experts else "inputs"
    return torch.allclose(getattr(after, at)[module], 2 * getattr(before, at)[module], rtol=1e-3, atol=1e-6)


def linear_paths(model: Model, tensors: list[dict]) -> list[str]:
    """Of "v->o" and "up->down", those that are linear in every module that has both."""
    found = []
    for first, second in (("v", "o"), ("up", "down")):
        answers = []
        for item in tensors:
            parent = item["name"].removesuffix(".weight").rpartition(".")[0]
            partner = next(
                (
                    t
                    for t in tensors
                    if t.get("role") == first and t["name"].removesuffix(".weight").rpartition(".")[0] == parent
                ),
                None,
            )
            if item.get("role") != second or partner is None:
                continue
            experts = "{e}" in item["name"]
            for name in [n for n in model.tensors if template_of(n) == item["name"]][:1]:
                own = [n for n in model.tensors if template_of(n) == partner["name"] and layer_of(n) == layer_of(name)]
                own += [
                    n.removesuffix("weight") + "bias" for n in own if n.removesuffix("weight") + "bias" in model.tensors
                ]
                if all(n in model.sources for n in (*own, name)):
                    answers.append(is_linear_path(model, own, name, experts))
        if answers and all(answers):
            found.append(f"{first}->{second}")
    return found


def ends_of(model: Model) -> dict:
    """Where the file has the embedding and the head."""

    def name(module) -> str:
        parameter = next(n for n, p in model.module.state_dict().items() if p.data_ptr() == module.weight.data_ptr())
        return next(n for n, (source, _) in model.sources.items() if source == parameter).removesuffix(".weight")

    return {
        "embed_tokens": name(model.module.get_input_embeddings()),
        "lm_head": name(model.module.get_output_embeddings()),
    }
