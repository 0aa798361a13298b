"""Finds out from transformers' classes what a family's files hold, and writes rules/tables/architectures/FAMILY.toml.

    python tools/probe_architecture.py qwen3_next lfm2     write these families
    python tools/probe_architecture.py --all               write every family whose table says verified = "executed"
    python tools/probe_architecture.py --check qwen3_next  say where a file differs from a fresh probe; then exit 1

A family is built twice, with random weights and two sets of small sizes, with enough decoder layers for every kind it
has (full and linear attention, dense and experts, convolution). What is observed, not read from source:

- names and shapes: from the files that save_pretrained writes, so that they are the names of files, not of modules;
- sizes as expressions over config keys: those that give both models' numbers;
- kinds of decoder layers: conditions on config keys that hold for exactly the layers with a tensor, in both models;
- only_with, only_without: what a model lacks, or has instead, when a key of OPTIONAL is null, 0 or false;
- norm_before: the norm whose output tensor (the same storage) a linear reads in one forward pass;
- norm: whether the output is 0 with a weight of 0 ("weight * xhat") or grows from 1 ("(1 + weight) * xhat");
- linear_paths: whether twice the rows of v (of up) doubles the input of o (of down).

An expression, condition or role that the file has is kept where it fits what was observed: people choose better names
than a search does. One fact is taken from the file without proof: defaults of keys that the class does not keep.
"""

import argparse
import difflib
import itertools
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from architecture_file import notes_of, render
from probe_families import ALIASES, FAMILIES, GENERIC, MIXERS, OPTIONAL, ROLES
from probe_fit import fit_kind, fit_size
from probe_model import (
    Model,
    ProbeError,
    build,
    build_without,
    ends_of,
    find_sources,
    known_class,
    layer_of,
    linear_paths,
    norms_before,
    norms_of,
    run,
    template_of,
)

from doctor.core.tables import family_names, parse_family, tables_folder
from doctor.model.expressions import keys_of


def grouped(model: Model) -> dict[str, dict[str, tuple[int, ...]]]:
    """template -> name in the file -> shape. Biases beside a weight are left out."""
    found: dict[str, dict] = {}
    for name, tensor in sorted(model.tensors.items()):
        weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name.removesuffix("_bias")
        if weight == name or weight not in model.tensors:
            found.setdefault(template_of(name), {})[name] = tuple(tensor.shape)
    return found


def role_by_name(template: str, dims: int) -> str | None:
    """What a linear is by its module's name; None for what is no linear."""
    module = template.removesuffix(".weight")
    parent, _, tail = module.rpartition(".")
    if "{i}" not in template or dims < 2 or (module == template and dims < 3) or "conv1d" in tail:
        return None
    if tail == "gate" or parent.endswith(".router"):
        return "router"
    if "indexer" in parent:
        return "indexer"
    if tail == "gate_proj" and parent.endswith("attn"):  # a gate of attention's output, not of an MLP
        return "linear_attn_in"
    if tail == "out_proj" and MIXERS.search(parent):
        return "linear_attn_out"
    return ROLES.get(tail)


def probe(family: str, committed: Mapping | None = None) -> dict:
    """The table of a family, with the committed one's words where they fit.

    Raises ProbeError where the table cannot say what was seen.
    """
    committed = committed or {}
    known = known_class(family)
    with tempfile.TemporaryDirectory() as folder:
        models = tuple(build(family, which, Path(folder) / str(which)) for which in (0, 1))
        without = {
            key: tuple(build_without(family, which, Path(folder) / f"{key}{which}", key) for which in (0, 1))
            for key in OPTIONAL.get(family, ())
        }
    for model in models:
        find_sources(model)
    trace = run(models[0])
    old = {}
    for item in committed.get("tensor", ()):
        old[item["name"], item.get("only_without"), item.get("layers")] = item
        old.setdefault((item["name"], item.get("only_without")), item)
    groups = tuple(grouped(m) for m in models)
    if groups[0].keys() != groups[1].keys():
        raise ProbeError(f"only one of the two models has {sorted(groups[0].keys() ^ groups[1].keys())}")
    before = norms_before(models[0], trace)
    norms = norms_of(models[0], trace)
    lost, instead, reshaped = {}, {}, {}
    for key, pair in without.items():
        find_sources(pair[0])
        other = tuple(grouped(m) for m in pair)
        lost |= dict.fromkeys(groups[0].keys() - other[0].keys(), key)
        instead |= dict.fromkeys(other[0].keys() - groups[0].keys(), key)
        for template in other[0].keys() - groups[0].keys():
            for g, o in zip(groups, other, strict=True):
                g[template] = o[template]
        reshaped |= {
            t: (key, other, pair)
            for t in groups[0].keys() & other[0].keys()
            if set(groups[0][t].values()) != set(other[0][t].values())
        }
        before = norms_before(pair[0], run(pair[0])) | before
    modules = dict(models[0].module.named_modules())
    kinds: dict[str, tuple[str, ...]] = {}
    tensors = []
    for template, own in _by_shape(groups, models):
        kind = None
        layers = tuple({layer_of(n) for n in g[template]} for g in own)
        if "{i}" in template and any(held != set(range(m.layers)) for held, m in zip(layers, models, strict=True)):
            try:
                kind, conditions = fit_kind(
                    layers, models, {k: committed["kinds"][k] for k in committed.get("kinds", ())} | kinds
                )
            except ProbeError as error:
                raise ProbeError(f"{template}: {error}") from None
            kinds[kind] = conditions
        was = old.get((template, instead.get(template), kind)) or old.get((template, instead.get(template)), {})
        item = {"name": template, "shape": _fit_shape(template, own, models, was)}
        role = was.get("role") or role_by_name(template, len(item["shape"]))
        if role:
            item["role"] = role
        names = list(own[0][template])
        item |= {"only_with": lost.get(template), "only_without": instead.get(template)}
        sources = [modules.get(models[0].sources[n][0].rpartition(".")[0]) for n in names if n in models[0].sources]
        item["transposed"] = any(type(module).__name__ == "Conv1D" for module in sources)
        biases = (b for n in names for b in (n.removesuffix("weight") + "bias", f"{n}_bias"))
        item["bias"] = role is not None and any(b in models[0].tensors for b in biases)
        norm = {template_of(before[n] + ".weight") if n in before else None for n in names}
        if (
            role
            and len(norm) == 1
            and None not in norm
            and not (role == "down" and ("{e}" in template or len(item["shape"]) > 2))
        ):
            item["norm_before"] = norm.pop().partition("{i}.")[2].removesuffix(".weight")
        if template in norms:
            item["norm"] = norms[template]
        if kind:
            item["layers"] = kind
        tensors.append(item)
        if template in reshaped:
            key, other, pair = reshaped[template]
            item["only_with"] = key
            shape = _fit_shape(template, other, pair, old.get((template, key), {}))
            tensors.append(item | {"shape": shape, "only_with": None, "only_without": key})
    usual = Counter(i["norm"] for i in tensors if "norm" in i).most_common(1)
    usual = usual[0][0] if usual else "no weight"
    for item in tensors:
        if item.get("norm") == usual:
            del item["norm"]
    tensors.sort(key=lambda t: ("role" not in t, t["name"], t.get("only_without") is not None, t.get("layers", "")))
    keys, renamed = config_keys(family, committed)
    paths = linear_paths(models[0], tensors)
    return {
        "model_type": known.model_type,
        "architecture": type(models[0].module).__name__,
        "verified": "executed",
        "tie_word_embeddings": bool(known().tie_word_embeddings),
        "norm": usual,
        "linear_paths": paths,
        "config_keys": keys,
        "renamed_keys": renamed,
        **ends_of(models[0]),
        "defaults": defaults(family, tensors, kinds, committed, {*keys, *renamed.values()}),
        "kinds": kinds,
        "tensor": tensors,
    }


def _by_shape(groups: tuple[dict, dict], models: tuple[Model, Model]) -> Iterable[tuple[str, tuple[dict, dict]]]:
    """(template, what both models have of it), sorted. One with several shapes comes once for each pair of shapes that
    belongs to one kind of layer.
    """
    for template in sorted(groups[0]):
        shapes = [sorted(set(g[template].values())) for g in groups]
        if max(map(len, shapes)) == 1:
            yield template, groups
            continue
        for pair in itertools.product(*shapes):
            parts = tuple(
                {template: {n: s for n, s in g[template].items() if s == shape}}
                for g, shape in zip(groups, pair, strict=True)
            )
            try:
                fit_kind(tuple({layer_of(n) for n in p[template]} for p in parts), models, {})
                _fit_shape(template, parts, models, {})
            except ProbeError:
                continue
            yield template, parts


def _fit_shape(template: str, groups, models, was: Mapping) -> list[str]:
    shapes = [set(g[template].values()) for g in groups]
    if any(len(s) > 1 for s in shapes):
        raise ProbeError(f"{template} has several shapes: {shapes}")
    first, second = (s.pop() for s in shapes)
    hints = was.get("shape", [None] * len(first))
    try:
        heads = {"q_proj": 0, "o_proj": 1, "out_proj": 1}.get(
            template.split(".")[-2] if ".self_attn." in template else ""
        )
        return [
            fit_size((a, b), models, hint, axis == heads)
            for axis, (a, b, hint) in enumerate(zip(first, second, hints, strict=True))
        ]
    except ProbeError as error:
        raise ProbeError(f"{template}: {error}") from None


def config_keys(family: str, committed: Mapping) -> tuple[list[str], dict[str, str]]:
    """(generic names that are this family's own keys, generic name -> another key)."""
    known = known_class(family)
    attributes, mapped = set(vars(known())), getattr(known, "attribute_map", {})
    same, other = [], {}
    for key in GENERIC:
        names = (committed.get("config_keys", {}).get(key), key, mapped.get(key), *ALIASES.get(key, ()))
        name = next((n for n in names if n in attributes and n not in mapped), None)
        if name == key:
            same.append(key)
        elif name is not None:
            other[key] = name
    return same, other


def defaults(
    family: str, tensors: list[dict], kinds: Mapping[str, tuple[str, ...]], committed: Mapping, stated: set[str]
) -> dict:
    """What the class takes for keys of expressions and conditions that a config.json may leave out.

    stated: keys that none leaves out.
    """
    known, new = known_class(family), known_class(family)()
    expressions = [*(e for t in tensors for e in t["shape"]), *(c for conditions in kinds.values() for c in conditions)]
    found = {}
    for key in dict.fromkeys((*(n for e in expressions for n in keys_of(e)), "head_dim")):
        value = getattr(known, key, None)
        if value is None and getattr(new, key, None) == []:
            value = []
        if not isinstance(value, (int, list)):
            value = committed.get("defaults", {}).get(key) if not hasattr(known, key) else None
        if value is not None and key not in stated - {"head_dim"}:
            found[key] = value
    return found


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", nargs="*")
    parser.add_argument("--all", action="store_true", help="every family whose table was made by this program")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a committed file differs")
    options = parser.parse_args(arguments)
    folder = tables_folder() / "architectures"
    names = [n for n in FAMILIES if n in family_names()] if options.all else options.family
    bad = 0
    for name in names:
        path = folder / f"{name}.toml"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        try:
            fresh = render(probe(name, parse_family(text) if text else None), notes_of(text))
        except Exception as error:  # one family must not stop the others
            if not isinstance(error, ProbeError):
                traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}")
            bad += 1
            continue
        if fresh == text:
            print(f"{name}: as committed")
        elif options.check:
            print(f"{name}: differs\n{difference(text, fresh)}")
            bad += 1
        else:
            path.write_text(fresh, encoding="utf-8")
            print(f"{name}: written")
    return 1 if bad else 0


def difference(old: str, new: str) -> str:
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), "committed", "probed", lineterm="", n=1))


if __name__ == "__main__":
    sys.exit(main())
