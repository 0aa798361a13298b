"""All that rule files and tests import to make examples: healthy checkpoints, and the facts that a run would
produce.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from doctor.core.lazy_numpy import np  # noqa: F401 - rule files import it from here
from doctor.core.machine import Machine
from doctor.core.recipe import Recipe  # noqa: F401 - rule files import it from here
from doctor.core.records import (
    Allocation,  # noqa: F401 - rule files import them from here
    CalibrationFacts,
    ClientRun,
    Comparison,
    Fp16Range,
    HessianFacts,
    LoadProof,
    MergedLinear,  # noqa: F401
    MergeProof,  # noqa: F401
    OwnMeasure,
    SolveRecord,
)
from doctor.core.rehearsal import Rehearsal
from doctor.lint.tiny import (  # noqa: F401 - rule files import them from here
    FAMILIES,
    VOCAB,
    Case,
    NotHere,
    encode,
    never_in,
    only_in,
    shard_bytes,
    tiny,
    tiny_gptq,
    tiny_packed,
    use_family,
)
from doctor.lint.tiny_gguf import GgufCase, tiny_gguf, w  # noqa: F401
from doctor.model.spec import build_spec


def measured(family: str | None = None) -> Case:
    """tiny() with the facts of a sound calibration and run: every linear saw 4,096 tokens and lost less than rounding
    would.
    """
    case = tiny(family)
    tokens = 4096
    case.put(
        "checkpoint:",
        "calibration",
        CalibrationFacts("text.jsonl", False, 16, tokens, 256, 256, 256, VOCAB - 6, 0, 0, 0),
    )
    for linear in build_spec(case.config, case.infos()).linears:
        hessian = HessianFacts(tokens, linear.in_features, 0, None, True, 0, 1.0, 8.0, 4.8e-6, 801.0)
        case.put(f"linear:{linear.name}", "hessian", hessian)
        case.put(
            f"linear:{linear.name}",
            "solve",
            SolveRecord("gptq", 0.01, 0.01, "float32", 0.004, 0.01, ((0.01, "float32", "ok"),)),
        )
    return case


def rehearsed(**fields: Any) -> Case:
    """tiny() with a rehearsal that ended well, but for these fields of the load proof of its output."""
    case = tiny()
    proof = replace(LoadProof("transformers 5", "LlamaForCausalLM", packed=14), **fields)
    whole = LoadProof("transformers 5", "LlamaForCausalLM")
    case.put("checkpoint:", "given_rehearsal", Rehearsal(proof=proof, source=whole))
    return case


def with_capacity(family: str | None = None) -> Case:
    """tiny() with a machine that has enough disk and memory for it."""
    case = tiny(family)
    case.put("checkpoint:", "given_machine", Machine("OUT", 64 << 30, 1 << 30, 64 << 30, 1 << 20))
    return case


def change(case: Case, subject: str, name: str, **values: Any) -> None:
    """Replace fields of a fact that `measured`, `with_capacity` or `compared` put into a case."""
    fact: Any = case.facts[subject, name]
    case.put(subject, name, replace(fact, **values))


def ran_by_client(**changes) -> ClientRun:
    """A client that computes with the files what doctor does."""
    run = ClientRun("vllm 0.32.0", tokens=8192, perplexity=12.31, perplexity_doctor=12.3, apart=0.02, apart_p99=0.1)
    return replace(run, **changes)


def measured_by_its_own() -> Case:
    """tiny() with a comparison of embeddings in which the quantized model is as good as its original."""
    case = tiny()
    case.put("checkpoint:", "own_measure", OwnMeasure("embedding", 24, 12288, 0.992, 0.95, 0.998, 0, 0))
    return case


def compared() -> Case:
    """tiny() with a comparison in which the quantized model is as good as its original."""
    case = tiny()
    case.put(
        "checkpoint:",
        "comparison",
        Comparison(
            tokens=8192,
            context=512,
            perplexity_original=12.0,
            perplexity_quantized=12.3,
            kl_mean=0.02,
            kl_p99=0.2,
            top1_agreement=0.93,
            nonfinite_original=0,
            nonfinite_quantized=0,
            token0_share=0.0,
            longest_repeat=2,
            generated=256,
            replies=(("Once", "upon a time", "upon a time"),),
            block_errors=(0.01, 0.02),
            own_errors=(0.05, 0.06),
            entropy_original=2.4,
            entropy_quantized=2.5,
            one_choice=0.06,
            one_choice_token=17,
            one_choice_original=0.05,
            half=Fp16Range(
                absmax=600.0,
                place="the residual stream after model.layers.1",
                first=None,
                residual=(30.0, 600.0),
                blocks=(
                    ("the input of model.layers.0.mlp.down_proj", 31.0),
                    ("the residual stream after model.layers.1", 600.0),
                ),
                tokens=1022,
                kl_float16=0.0001,
                kl_bfloat16=0.004,
                nonfinite_float16=0,
                nonfinite_bfloat16=0,
            ),
        ),
    )
    case.put("checkpoint:", "load_proof", LoadProof("transformers 5", "LlamaForCausalLM"))
    return case


def rename_parts(*numbers: str) -> Callable[[Path], None]:
    """Damage that renames the shards of a checkpoint, in files and index: "3-of-7" for the first, and so on."""

    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        for at, number in enumerate(numbers, 1):
            part, _, total = number.partition("-of-")
            old, new = (
                f"model-{at:05d}-of-{len(numbers):05d}.safetensors",
                f"model-{int(part):05d}-of-{int(total):05d}.safetensors",
            )
            if new != old:
                (folder / old).rename(folder / new)
                index.write_text(index.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    return damage


def shown_by(module: ModuleType | Any) -> Iterator[tuple[Case, Case | None]]:
    """(case, donor) of each state that shows a rule's fixes: its `bad()` and each of `more()`, without and with a
    donor.

    The donor is `good()`, or `donor()` if the rule file has one.
    """
    count = 1 + (len(list(module.more())) if hasattr(module, "more") else 0)
    for i in range(count):
        for with_base in (False, True):
            case = module.bad()[0] if i == 0 else list(module.more())[i - 1]
            yield case, getattr(module, "donor", module.good)() if with_base else None
