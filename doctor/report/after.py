"""What to type once a quantized checkpoint is there: compare it, serve it, run tasks on it."""

import json
import shlex
from pathlib import Path

from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.formats.registry import format_of
from doctor.plan.launch import cache_flags, launch, run_in_exllamav2
from doctor.plan.runtimes import in_force, reads
from doctor.plan.serving import groups_of, schemes, serves, stated
from doctor.report.screen import Steps

_NOT_WRITERS = ("encoder", "encoder-decoder", "audio")  # kinds of models that write no text of their own


def commands(original: str, output: Path, recipe: Recipe, gguf: str = "", kind: str = "decoder") -> Steps:
    """The next commands, cheapest first. gguf: the file inside the output, where it is one. kind: what the original is,
    a key of directory_kind.KINDS.
    """
    out, form = shlex.quote(str(output)), format_of(recipe)
    if kind in _NOT_WRITERS:
        verify = (f"doctor verify {shlex.quote(original)} {out}", _("hidden states of both"))
        return [verify, *_for_two_halves(output, ", ".join(form.libraries), kind)]
    found = [(f"doctor verify {shlex.quote(original)} {out}", _("perplexity, divergence and replies of both"))]
    if form.in_blocks:
        file = shlex.quote(str(output / gguf))
        return [*found, (f"llama-server -m {file}", _("serve it in llama.cpp"))]
    if not form.client or recipe.runtime == "exllamav2":
        what = _("run it in ExLlamaV2, on a GPU; TabbyAPI serves it")
        return [*found, *([(run_in_exllamav2(str(output)), what)] if served_by("exllamav2", recipe) else [])]
    name = recipe.runtime if recipe.runtime == "sglang" else "vllm"
    if served_by(name, recipe):
        what = _("serve it in SGLang") if name == "sglang" else _("serve it in vLLM")
        flags = cache_flags(name, "fp8") if recipe.kv_cache else ""
        found.append((launch(name, out, gpus=recipe.tp, flags=flags), what))
    folder = json.dumps(str(output), ensure_ascii=False)
    code = f'from transformers import pipeline; print(pipeline("text-generation", {folder})("Hello"))'
    needed = ", ".join(form.libraries)
    found.append((f"python -c {shlex.quote(code)}", _("run it in transformers, with {libraries}", libraries=needed)))
    reader, arguments = "hf", f"pretrained={out}"
    if recipe.runtime == "vllm":
        reader = "vllm"
        arguments += f",tensor_parallel_size={recipe.tp}" if recipe.tp > 1 else ""
        arguments += ",kv_cache_dtype=fp8" if recipe.kv_cache else ""
    task = f"lm_eval --model {reader} --model_args {arguments} --tasks gsm8k"
    return [*found, (task, _("a task, with lm-evaluation-harness"))]


def _for_two_halves(output: Path, libraries: str, kind: str) -> Steps:
    """How transformers runs a model of an encoder and a decoder; [] for an encoder, which has many uses."""
    folder = json.dumps(str(output), ensure_ascii=False)
    # compressed-tensors unpacks at the first call of the whole model, and generate calls the encoder alone before that.
    if kind == "encoder-decoder":
        code = (
            "from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T, CompressedTensorsConfig as C; "
            f"t, m = T.from_pretrained({folder}), M.from_pretrained({folder}, "
            "quantization_config=C(run_compressed=False)); "
            'print(t.decode(m.generate(**t("Hello", return_tensors="pt"))[0]))'
        )
    elif kind == "audio":
        code = (
            "from transformers import CompressedTensorsConfig as C, pipeline; "
            f'print(pipeline("automatic-speech-recognition", {folder}, '
            'model_kwargs={"quantization_config": C(run_compressed=False)})("speech.wav"))'
        )
    else:
        return []
    return [(f"python -c {shlex.quote(code)}", _("run it in transformers, with {libraries}", libraries=libraries))]


def served_by(name: str, recipe: Recipe) -> bool:
    """Whether a table of kernels or of schemes says that a runtime computes with what the recipe writes."""
    form, known = format_of(recipe), schemes(name, "") or []
    groups = list(groups_of(form.config(recipe))) if form.groups_of_modules else []
    if groups and all(
        any(serves(row, stated(g["weights"]) or {}, stated(g.get("input_activations")), kind) for row in known)
        for _name, g, kind in groups
    ):
        return True
    rows = [row for row in table("kernels")[name] if in_force(row, "")]
    return bool(reads(rows, form.name, *recipe.scheme[:3]))
