"""`doctor advise`: which scheme, groups, GPUs and cache a model can be served with in so much memory, best first.

Everything comes from headers and tables: sizes of tensors, the cache's layout, what an engine takes (engines.toml),
what the rules of geometry say of each recipe, and what is known of each scheme's quality (quality.toml). No weight is
read and no model is run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.facts import COSTS, closure
from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe
from doctor.core.store import Store, Variant
from doctor.core.tables import table
from doctor.edits.decoding import coarser
from doctor.evaluate.advise.advice import Advice, Option
from doctor.evaluate.advise.candidates import (
    OWN_FILES,
    STORED,
    Candidate,
    candidates,
    expected,
    needs_capability,
    on,
    served,
)
from doctor.evaluate.advise.footprint import cache_bytes, cache_share, engine_of, weights
from doctor.evaluate.advise.kinds import Kinds, as_floats, of_gguf, one_of_each
from doctor.evaluate.kvcache.layer_sizes import read_cache_layout
from doctor.evaluate.kvcache.layout import CacheLayout
from doctor.evaluate.kvcache.schemes import Scheme as CacheScheme
from doctor.lint.engine import judge, load_rules
from doctor.lint.rule import Rule
from doctor.model.quantization_config import holds_quantized, stored_recipe
from doctor.model.spec import ModelSpec, build_spec
from doctor.plan.launch import launch
from doctor.scan.header import RECIPE, header_facts

USUAL_CONTEXT = 8192


def advise(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    memory: int | None = None,
    gpus: int = 1,
    context: int | None = None,
    batch: int = 1,
    gpu: str = "",
    runtime: str = "",
) -> Advice:
    """Advice on serving a checkpoint with `runtime` on `gpus` GPUs of `memory` bytes each.

    path: a directory, a .gguf file, or org/name[@revision] on the Hub, of which only headers are read. memory: of one
    GPU; None takes that of `gpu`, a name in rules/tables/gpus.toml. context: tokens a sequence keeps (8,192, or what
    the model is made for where that is less); batch: sequences at a time. runtime: "" is vllm, of a GGUF model
    llama.cpp. Raises DoctorError for impossible options, BadCheckpoint where config.json or the metadata of a GGUF
    model are absent or do not give the sizes.
    """
    _engine, memory, capability = _machine(runtime or "vllm", gpu, memory, gpus)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    runtime = runtime or ("llama.cpp" if checkpoint.gguf else "vllm")
    entry = table("engines")[runtime]
    kinds, floats, bits = _kinds_of(checkpoint)
    spec = build_spec(floats.view.value("config.json") or {}, floats.view.tensors)
    layout, notes = read_cache_layout(spec), []
    context = context or min(USUAL_CONTEXT, spec.max_positions or USUAL_CONTEXT)
    for name, value in (("--context", context), ("--batch", batch)):
        if value < 1:
            raise DoctorError(_("{option} {value}: must be 1 or more.", option=name, value=value))
    if spec.max_positions and context > spec.max_positions:
        notes.append(
            _(
                "{n:,} tokens are more than the {positions:,} positions the model is made for",
                n=context,
                positions=spec.max_positions,
            )
        )
    here = str(path) if not isinstance(path, Checkpoint) else str(path.root)
    work = _Work(
        kinds,
        spec,
        layout,
        entry,
        runtime,
        capability,
        memory,
        context,
        batch,
        gpus,
        here,
        _file(checkpoint),
        checkpoint.name,
    )
    if bits is None:
        options = list(work.options(candidates(runtime), "quantize"))
    elif kinds.decoding is not None and runtime not in OWN_FILES:
        found = kinds.decoding
        again = [one for one in candidates(runtime) if one.recipe is None or coarser(found, one.recipe) is None]
        options = list(replace(work, kinds=floats).options(again, "quantize"))
        notes.append(_numbers_note(runtime, bits))
    else:
        options = list(work.options([Candidate(STORED, None)], "serve"))
        fewer = [one for one in candidates(runtime) if one.recipe is not None and one.recipe.bits < bits]
        options += replace(work, kinds=floats).options(fewer, "quantize")
        if bits < 16:
            notes.append(_stored_note(bool(bits), bool(fewer), bits))
    options.sort(key=lambda o: o.rank)
    return Advice(
        checkpoint=checkpoint.name,
        path=here,
        architecture=spec.architecture or spec.model_type,
        parameters=kinds.numel,
        stored_bytes=kinds.stored_bytes,
        runtime=runtime,
        engine_version=str(table("served").get(runtime, {}).get("version", "")),
        gpu=gpu,
        gpus=gpus,
        memory=memory,
        context=context,
        batch=batch,
        engine=engine_of(entry, memory, context, spec, 1),
        options=options,
        notes=[*notes, *layout.notes],
    )


def _kinds_of(checkpoint: Checkpoint) -> tuple[Kinds, Kinds, int | None]:
    """(kinds of tensors as stored, the plain numbers that they stand for, fewest bits of their codes) of a checkpoint;
    None bits of one that is not quantized, 0 where its codes are not read. Raises BadCheckpoint.
    """
    if checkpoint.gguf:
        return of_gguf(checkpoint)
    if checkpoint.value("config.json") is None or not checkpoint.tensors:
        raise BadCheckpoint(
            _("{name}: no config.json and safetensors headers to work from.", name=checkpoint.name),
            _("Give a model's directory, a GGUF file, or org/name on the Hub."),
        )
    kinds = one_of_each(checkpoint)
    if not holds_quantized(kinds.view):
        return kinds, kinds, None
    return as_floats(kinds) or (kinds, kinds, 0)


def _file(checkpoint: Checkpoint) -> str:
    """What llama.cpp is given of a GGUF model, its first file; "" for another checkpoint."""
    return str(checkpoint.path(checkpoint.gguf[0].files[0].name)) if checkpoint.gguf else ""


def _numbers_note(runtime: str, bits: int) -> Message:
    """What is compared where a GGUF model is to be served by an engine that does not read it."""
    if bits >= 16:
        return _("{runtime} reads no GGUF file: every row starts from its numbers", runtime=runtime)
    return _(
        "{runtime} reads no GGUF file: every row starts from its numbers, in which {bits} bits were the fewest; what "
        "would round as many bits more coarsely is left out; KL and perplexity are those of schemes made from 16 bits",
        runtime=runtime,
        bits=bits,
    )


def _stored_note(read: bool, again: bool, bits: int) -> Message:
    """What of a quantized checkpoint is compared."""
    if not read:
        return _("quantized already, in codes that are not read here: counted as stored, linears whole on each GPU")
    if not again:
        return _(
            "quantized already, to {bits} bits: judged as it is; the original model would have more schemes", bits=bits
        )
    return _(
        "quantized already, to {bits} bits: schemes of fewer bits are made from that; KL and perplexity are those of "
        "schemes made from 16 bits",
        bits=bits,
    )


def _machine(runtime: str, gpu: str, memory: int | None, gpus: int) -> tuple[dict[str, Any], int, int]:
    """(the engine's row, bytes of one GPU, compute capability or 0)."""
    from doctor.core.near import nearest

    engines, known = table("engines"), table("gpus")
    if runtime not in engines:
        raise DoctorError(
            _("--runtime {name}: must be one of {names}.", name=runtime, names=", ".join(engines)),
            nearest(runtime, engines),
        )
    if gpu and gpu.lower() not in known:
        raise DoctorError(
            _("--gpu {name}: is not in the table; must be one of {names}.", name=gpu, names=", ".join(known)),
            nearest(gpu.lower(), known) or _("Give --memory instead."),
        )
    card = known.get(gpu.lower(), {})
    if memory is None and not card:
        raise DoctorError(_("advise: no --memory and no --gpu; one of them must say what there is."))
    if gpus < 1:
        raise DoctorError(_("{option} {value}: must be 1 or more.", option="--gpus", value=gpus))
    if memory is not None and memory < 1 << 28:
        raise DoctorError(_("--memory {value:,}: must be 256 MiB or more, as 24GB.", value=memory))
    return engines[runtime], memory if memory is not None else card["mib"] << 20, card.get("capability", 0)


@dataclass(frozen=True)
class _Work:
    kinds: Kinds
    spec: ModelSpec
    layout: CacheLayout
    entry: dict[str, Any]
    runtime: str
    capability: int
    memory: int
    context: int
    batch: int
    gpus: int
    path: str
    file: str  # of a GGUF model, "" of others
    name: str

    def options(self, chosen: Iterable[Candidate], goal: str) -> Iterator[Option]:
        """Every scheme, on every number of GPUs, with every cache of the engine."""
        rules = [r for r in load_rules() if r.code[0] == "G" and COSTS.index(r.cost) <= COSTS.index("header")]
        rules = [r for r in rules if "recipe" in closure(r.facts) and r.severity == "error"]
        plan = Recipe(runtime=self.runtime, goal=goal)
        store = header_facts(self.kinds.view, stored_recipe(self.kinds.view, plan) if goal == "serve" else plan)
        for one in chosen:
            for gpus in self._counts():
                yield from self._options(one, gpus, store, rules)

    def _counts(self) -> list[int]:
        """Powers of two up to the GPUs that there are, and that number itself."""
        if self.entry["split"] == "layers":
            return sorted({1, self.gpus})
        return sorted({1 << i for i in range(self.gpus.bit_length())} | {self.gpus})

    def _options(self, one: Candidate, gpus: int, store: Store, rules: list[Rule]) -> Iterator[Option]:
        split = self.entry["split"]
        here, bits, total = weights(self.kinds, self.spec, one.recipe, gpus, split)
        engine = engine_of(self.entry, self.memory, self.context, self.spec, gpus)
        blocked, notes = self._blocked(one, gpus if split == "tensor" else 1, store, rules)
        known = expected(one.key) if one.name != STORED else {}
        for name, key_bits, value_bits, flag in self.entry["caches"]:
            scheme = CacheScheme(name, key_bits, value_bits)
            cache = cache_bytes(self.layout, scheme, self.context, self.batch, self.spec, gpus, split)
            room = engine.usable - engine.own - here
            one_more = cache_bytes(self.layout, scheme, self.context, 1, self.spec, gpus, split)
            share = cache_share(self.layout, self.spec, gpus, split)
            held = self.layout.largest_context(scheme, max(room, 0) * share, self.batch)
            most = [tokens for tokens in (held, self.spec.max_positions) if tokens is not None]
            yield Option(
                scheme=one.name,
                gpus=gpus,
                cache=name,
                weight_bytes=here,
                cache_bytes=round(cache),
                engine_bytes=engine.own,
                usable_bytes=engine.usable,
                free_bytes=round(room - cache),
                bits=bits,
                total_bytes=total,
                fits=room - cache >= 0,
                longest=min(most) if most else None,
                sequences=max(0, int(room // one_more)) if one_more else 0,
                order=known.get("order", 0),
                kl=known.get("kl"),
                perplexity=known.get("perplexity"),
                measured_on=known.get("model", ""),
                weights_alone=bool(known.get("weights_alone")),
                published=known.get("published", ""),
                blocked=tuple(blocked),
                notes=tuple(notes),
                quantize=self._quantize(one, gpus if split == "tensor" else 1),
                serve=self._serve(one, gpus, flag),
            )

    def _blocked(self, one: Candidate, tp: int, store: Store, rules: list[Rule]) -> tuple[list, list]:
        """(codes and reasons why it would not run, notes)."""
        reasons: list[tuple[str, str]] = []
        notes: list[str] = []
        if one.recipe is not None:
            plan = on(one.recipe, tp)
            found, _runs = judge(Variant(store, RECIPE, plan), rules)
            reasons = [(f.code, f.message) for f in found if f.severity == "error" and not f.consequence_of]
            if served(one.recipe, self.runtime) is False:
                reasons.append(("G332", _("{runtime} has no kernel for this scheme", runtime=self.runtime)))
            lowest, exact = needs_capability(one.recipe, self.runtime)
            own = self.capability
            if own and lowest and (own != lowest if exact else own < lowest):
                must = _("exactly {n:.1f}", n=lowest / 10) if exact else _("{n:.1f} or more", n=lowest / 10)
                reasons.append(("", _("compute capability {own:.1f}; must be {must}", own=own / 10, must=must)))
        elif tp > 1 or one.name == STORED:
            plan = on(store.get(RECIPE), tp)
            found, _runs = judge(
                Variant(store, RECIPE, plan), [r for r in rules if one.name == STORED or r.code == "G304"]
            )
            reasons = [(f.code, f.message) for f in found if f.severity == "error" and not f.consequence_of]
        return list(dict.fromkeys(reasons)), notes

    def _quantize(self, one: Candidate, tp: int) -> str:
        here, first = self.path, ""
        if one.recipe is None:
            plain = f"doctor convert {shlex.quote(here)} -o {shlex.quote(self._out(one))} --format bf16"
            return plain if self.file and one.name != STORED else ""
        if self.kinds.view.unread:  # a repository: quantize reads a directory
            repo, _at, revision = self.name.partition("@")
            here, asked = self._short(), f" --revision {shlex.quote(revision)}" if revision else ""
            first = f"hf download {shlex.quote(repo)}{asked} --local-dir {shlex.quote(here)} && "
        words = [f"{first}doctor quantize", shlex.quote(here), "-o", shlex.quote(self._out(one)), one.flags]
        words += [f"--tp {tp}"] if tp > 1 else []
        return " ".join([*words, f"--runtime {self.runtime}"])

    def _out(self, one: Candidate) -> str:
        return f"{self._short()}-{one.name.replace(' ', '-')}"

    def _short(self) -> str:
        """The model's name as a directory's."""
        return self.name.partition("@")[0].rpartition("/")[2].removesuffix(".gguf")

    def _serve(self, one: Candidate, gpus: int, flag: str) -> str:
        """The engine's own command; "" where it has none."""
        made = one.recipe is not None or (self.file and one.name != STORED)
        model = self._out(one) if made else self.path
        if self.runtime == "llama.cpp":
            if not (made or self.file):
                return ""
            model = f"{model}/model-{one.name}.gguf" if made else self.file
        return launch(self.runtime, shlex.quote(model), gpus=gpus, context=self.context, flags=flag)
