"""O623 exclude-list: list of excluded modules does not match what is packed.

Why: engines go by the list: they build a plain linear for each module on it and a quantized one for every other. A
packed module on the list has tensors that the plain one has no parameters for. A plain module that is not on it is read
as codes without scales, or stops the load. An entry that matches nothing often has another prefix than the tensors.

Seen as:
- vLLM: `There is no module or parameter named 'lm_head.input_scale'`
- vLLM: `KeyError: 'model.layers.0.mlp.gate_up_proj.weight'`
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.weight_scale'`
- vLLM: `KeyError: 'model.layers.0.self_attn.qkv_proj.weight'`

Do: make the list name exactly the linears that are stored in 16 bits, or quantize again with that list.

False alarms: an engine that goes by the tensors and not by the list. GPTQ and AWQ readers do so for modules that are
not listed, so only listed ones are judged there.

Fix safety: no fix: whether the list or the tensors are right is not in the files.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py (is_layer_excluded), compressed_tensors,
fp8.py; huggingface/transformers src/transformers/quantizers/quantizers_utils.py (should_convert_module),
quantizers/base.py (get_modules_to_not_convert);
compressed-tensors src/compressed_tensors/utils/match.py.
"""

import re

from doctor.lint.rule import KNOWN, Place, _, finding, is_router, plural, rule, word_tails
from doctor.lint.testing import np, tiny

# Linears that vLLM joins, and the name by which it also takes an entry of the list.
JOINED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
# Families whose routers vLLM 0.32 builds with the model's quantization: qwen3_moe.py and lfm2_moe.py (GateLinear).
ROUTERS_PACKED = ("qwen3_moe", "lfm2_moe")
# Entries of a recipe that many models have no module for: a head that is the embedding, towers, further layers.
OFTEN_ABSENT = re.compile(
    r"head|embed|vis|audio|image|projector|merger|modal|mtp|nextn|norm|gate|router|proj_out|output_proj"
)


@rule("O623", "error", implied_by=("O620", "O621", "O619", "O613"))
def exclude_list(checkpoint, quantization_block, tensors, stored_weights, spec, recipe):
    if quantization_block is None:
        return
    raw, file, pointer = quantization_block
    form = next((f for f in KNOWN.values() if f.claims(raw)), None)
    if form is None or not (form.packs(raw) or form.at_load):  # at_load: saved after it was loaded so
        return
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(word_tails())}
    packed |= {weight.module for weight in stored_weights.values()}
    if not packed:
        return
    entries = form.exclusions(raw)
    for entry in entries:
        wrong = sorted(module for module in packed if entry.entry and entry.names(module))
        if wrong:
            yield finding(
                plural(
                    "{module} is packed, but {entry!r} excludes it from quantization",
                    "{n:,} modules are packed, but {entry!r} excludes them from quantization (first {module})",
                    len(wrong),
                    module=wrong[0],
                    entry=entry.entry,
                ),
                at=Place(file, pointer=pointer + entry.pointer),
                evidence={"entry": entry.entry, "modules": wrong[:100]},
                advice=_("make the list name exactly the linears that are stored in 16 bits"),
            )
    absent = _absent(entries, tensors)
    takes = form.takes(raw)
    plain = [
        linear
        for linear in spec.linears
        if takes is not None
        and linear.name not in packed
        and takes(linear.name)
        and tensors[linear.tensor].dtype.bits >= 16
        and not (recipe.runtime == "vllm" and _joined(linear.name) in {entry.entry for entry in entries})
    ]
    if recipe.runtime in form.whole_names:
        yield from _in_part(
            entries, [x for x in spec.linears if x.name not in packed], recipe, Place(file, pointer=pointer)
        )
    if recipe.runtime == "vllm" and spec.family in ROUTERS_PACKED and takes is not None:
        yield from _routers(tensors, packed, takes, Place(file, pointer=pointer or None))
    if takes is not None and (head := _own_head(form, spec, tensors, recipe)) and head not in packed and takes(head):
        yield finding(
            _("{head} is stored in 16 bits, but no entry excludes it; transformers takes it as packed", head=head),
            at=Place(file, pointer=pointer or None),
            severity="error" if recipe.runtime else "warning",
            evidence={"head": head, "entries_without_module": [entry.entry for entry in absent][:100]},
            advice=_("add them to the list, as the format's readers match names"),
        )
    if plain:
        yield finding(
            plural(
                "{first} is stored in 16 bits, but no entry excludes it from quantization",
                "{n:,} linears are stored in 16 bits, but no entry excludes them from quantization (first {first})",
                len(plain),
                first=plain[0].name,
            ),
            at=Place(file, pointer=pointer or None),
            severity="warning",
            evidence={"linears": len(plain), "entries_without_module": [entry.entry for entry in absent][:100]},
            facts_table=((_("entries that match no module"), *(entry.entry for entry in absent[:4])),)
            if absent
            else (),
            advice=_("add them to the list, as the format's readers match names"),
        )
    elif strange := [entry for entry in absent if not OFTEN_ABSENT.search(entry.entry)]:
        yield finding(
            plural(
                "{n:,} entry of excluded modules matches no module ({first})",
                "{n:,} entries of excluded modules match no module (first {first})",
                len(strange),
                first=strange[0].entry,
            ),
            at=Place(file, pointer=pointer + strange[0].pointer),
            severity="info",
            evidence={"entries": [entry.entry for entry in strange][:100]},
            advice=_("make sure that the prefix is the one that the tensors have"),
        )


def _own_head(form, spec, tensors, recipe):
    """The module of a head of its own in 16 bits or more, where a runtime that may be meant packs heads; else ""."""
    name = spec.head_tensor or ""
    if spec.tied or name not in tensors or tensors[name].dtype.bits < 16 or not form.packs_heads:
        return ""
    return name.removesuffix(".weight") if recipe.runtime in ("", *form.packs_heads) else ""


def _routers(tensors, packed, takes, at):
    """Routers in 16 bits that no entry excludes."""
    modules = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
    if routers := [m for m in modules if is_router(m) and m not in packed and takes(m)]:
        yield finding(
            plural(
                "{first} is a router in 16 bits that no entry excludes; vLLM takes it as packed",
                "{n:,} routers in 16 bits are excluded by no entry; vLLM takes them as packed (first {first})",
                len(routers),
                first=routers[0],
            ),
            at=at,
            evidence={"routers": routers[:100]},
            advice=_("add them to the list, as the format's readers match names"),
        )


def _joined(name):
    """The name under which vLLM has a linear that it joins with others; its own where it joins it with none."""
    owner, dot, last = name.rpartition(".")
    return f"{owner}{dot}{JOINED.get(last, last)}"


def _in_part(entries, linears, recipe, at):
    """Linears that an entry excludes by a part of their names, for a runtime that asks for whole ones. It also takes the
    name under which it joins linears, and experts by the module that holds them.
    """
    texts = {entry.entry for entry in entries}
    found = [
        (linear, entry)
        for linear in linears
        if not {linear.name, _joined(linear.name)} & texts
        and not (linear.expert is not None and any("experts" in text for text in texts))
        for entry in entries
        if entry.entry and entry.matches(linear.name)
    ]
    if found:
        linear, entry = found[0]
        yield finding(
            plural(
                "{entry!r} excludes {n:,} linear ({first}) by a part of its name: {runtime} asks for the whole name",
                "{entry!r} excludes {n:,} linears (first {first}) by a part of their names: {runtime} asks for whole names",
                len({x.name for x, _entry in found}),
                entry=entry.entry,
                first=linear.name,
                runtime=recipe.runtime,
            ),
            at=at,
            evidence={"entry": entry.entry, "linears": sorted({x.name for x, _entry in found})[:100]},
            advice=_("write the names of the linears in full"),
        )


def _absent(entries, tensors):
    """Entries that match no module of the files."""
    modules: set[str] = set()
    for name in tensors:
        module = name.rpartition(".")[0]
        while module and module not in modules:  # whose parents are there then
            modules.add(module)
            module = module.rpartition(".")[0]
    modules |= set(map(_joined, modules))
    return [entry for entry in entries if entry.entry and not any(map(entry.matches, modules))]


def bad():
    case = tiny()
    rng = np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        case.tensors[linear.tensor] = rng.integers(1, 0x78, (n, k), np.uint8)
        case.tensors[f"{linear.tensor}_scale"] = np.full((n, 1), 0.01, np.float32)
        case.dtypes |= {linear.tensor: "F8_E4M3", f"{linear.tensor}_scale": "F32"}
    name = case.name("down").removesuffix(".weight")
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", name],
    }
    return case, f"{name} is packed, but {name!r} excludes it from quantization"


def good():
    return tiny()
