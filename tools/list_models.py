"""Writes docs/models.md: what becomes of each model family, beside the families that other quantizers name.

    python tests/coverage.py --json rows.json && python tests/coverage.py --families --json families.json
    python tools/list_models.py rows.json families.json

Numbers are those of tests/coverage.py on tiny random checkpoints; a name of another program is a key of its own table.
Sources, read: ModelCloud/GPTQModel gptqmodel/models/auto.py (MODEL_MAP, commit 000d41b); vllm-project/llm-compressor
src/llmcompressor/modeling (the families that have code of their own there; it takes others by transformers' classes).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from healthy_models import FAMILIES, UNKNOWN  # noqa: E402
from tiny_classes import CLASSES  # noqa: E402

GPTQMODEL = """
apertus baichuan bloom chatglm codegen cohere cohere2 dbrx dbrx_converted deci deepseek_v2 deepseek_v3 dream ernie4_5
ernie4_5_moe exaone falcon falcon_h1 gemma gemma2 gemma3 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_oss gpt_pangu gptj granite grinmoe hymba instella internlm internlm2 kimi_k2 klear llama llama4 llava_qwen2
longcat_flash longllama mimo minicpm minicpm3 mistral mixtral mllama mobilellm moss mpt nemotron-nas nemotron_h olmo2
opt ovis phi phi3 phi4mm phimoe qwen qwen2 qwen2_5_omni qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_next
qwen3_omni_moe refinedWeb refinedWebModel seed_oss stablelm stablelm_epoch starcoder2 telechat xverse yi
"""
LLM_COMPRESSOR = """
afmoe cohere2_moe deepseek_v3 deepseek_v32 deepseek_v4 gemma4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe
granitemoehybrid hy_v3 kimi_linear llama4 minimax_m2 mistral4 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl_moe whisper
"""
HEAD = """# Models

What `quantize` does with each family, as `python tests/coverage.py` and `python tests/coverage.py --families` measured
it: a tiny random checkpoint of the class, GPTQ in 4 bits and groups of 32 in the compressed-tensors format, loaded in
the class that config.json names. Written by `tools/list_models.py`.

**works**: written, loads whole, computes what the source does. **other client**: written, and read by another engine
than transformers. **refusal**: `check` says that it cannot be quantized, and why. **unloadable**: the class does not
load what was written whole, or its outputs correlate less than 0.8 with the source's. **not built**: transformers
builds the class only with a library that was absent. **not run**: a family of the rules' tests without a measurement.
Packed and kept count linears; the correlation is that of outputs with the source's; the last column is the commit that
was measured.
"""


def model_type(row: dict) -> str:
    import transformers

    stated = CLASSES[row["name"]].architecture if row["name"] in CLASSES else row.get("class", "")
    known = getattr(transformers, stated, None)
    found = getattr(getattr(known, "config_class", None), "model_type", "")
    return found or row["name"]


def main() -> int:
    found = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())]
    rows = list({row["name"]: row for row in found}.values())  # of two measurements the later file's
    if not rows:
        print(__doc__)
        return 2
    theirs = {"GPTQModel": set(GPTQMODEL.split()), "llm-compressor": set(LLM_COMPRESSOR.split())}
    lines, seen, counts = [HEAD], set(), {}
    ours: set[str] = set()
    lines += ["| model | model_type | outcome | packed | kept | correlation | GPTQModel | llm-compressor | commit |"]
    lines += ["|---|---|---|---:|---:|---:|---|---|---|"]
    measured = {row["name"] for row in rows} | {model_type(row) for row in rows}
    rows += [{"name": kind, "outcome": "not run"} for kind in (*FAMILIES, *UNKNOWN) if kind not in measured]
    for row in rows:
        kind = model_type(row)
        if (row["name"], kind) in seen or (row["name"] == kind and any(kind == k for _n, k in seen)):
            continue
        seen.add((row["name"], kind))
        if row["outcome"] != "not run":
            ours |= {kind, kind.removesuffix("_text")}
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        cells = [str(row.get(key, "")) for key in ("packed", "kept", "correlation")]
        named = ["yes" if {kind, kind.removesuffix("_text")} & names else "" for names in theirs.values()]
        cells = [row["name"], kind, row["outcome"], *cells, *named, row.get("commit", "")]
        lines.append("| " + " | ".join(cells) + " |")
    total = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    lines += ["", f"{sum(counts.values())} rows: {total}."]
    for name, names in theirs.items():
        absent = sorted(names - ours)
        rows_here = len(names) - len(absent)
        lines += [
            "",
            f"{name} names {len(names)} families, of which {rows_here} were run. Not: {', '.join(absent)}.",
        ]
    (ROOT / "docs" / "models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-5], lines[-3], lines[-1], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
