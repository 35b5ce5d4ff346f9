"""The student's folder is what other programs expect: transformers opens it, vLLM completes text with it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import capgap, run_of
from huggingface_hub import ModelCard
from tiny_models import SIZES, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from capgap.pipeline.student.cut import cut
from capgap.pipeline.student.kept import choose, random_scores
from capgap.pipeline.student.shapes import shape_of

TEMPLATE = "{% for m in messages %}import {{ m.content }} {% endfor %}"

CHAT = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
output = llm.chat([{"role": "user", "content": "os"}], SamplingParams(max_tokens=8, temperature=0.0))[0]
print("asked", list(output.prompt_token_ids), "answered", list(output.outputs[0].token_ids))
"""

COMPLETE_IDS = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(
    model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64, skip_tokenizer_init=True
)
prompt = {"prompt_token_ids": [5, 9, 2, 7, 1]}
output = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0, detokenize=False))[0].outputs[0]
print("completed", list(output.token_ids))
"""

COMPLETE = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
output = llm.generate(["import os"], SamplingParams(max_tokens=8, temperature=0.0))[0].outputs[0]
print("completed", list(output.token_ids))
"""


def test_the_student_loads_in_transformers_and_completes_text_in_vllm_alike(finished: Path) -> None:
    folder = str(finished / "train" / "distilled" / "seed-0" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("import os", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE, folder], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"completed {generated.tolist()}" in done.stdout


def test_the_students_card_is_one_that_the_hub_reads(finished: Path) -> None:
    card = ModelCard.load(finished / "train" / "distilled" / "seed-0" / "model" / "README.md")
    card.data.to_yaml()
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert "validation_loss" in {result.metric_type for result in card.data.eval_results}
    assert "| made by | capgap " in card.text


@pytest.mark.slow
def test_a_student_with_a_teachers_chat_template_answers_in_vllm_as_in_transformers(
    finished: Path, tmp_path: Path
) -> None:
    """The tiny run again over its corpus and weights; what is new is a teacher with a chat template."""
    teacher = tmp_path / "teacher"
    shutil.copytree(finished / "teacher" / "model", teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(teacher)
    out, more = tmp_path / "run", ["--teacher.path", str(teacher), "--cache.engine", "transformers"]
    reuse = ["--reuse.corpus", str(finished / "corpus"), "--teacher.model", "null", "--teacher.training", "null"]
    for stage in ("teacher", "cache", "student/seed-0", "train/distilled/seed-0"):
        done = capgap(*run_of(out, *reuse, *more, "--only", stage))
        assert done.returncode == 0, done.stderr
    folder = str(out / "train" / "distilled" / "seed-0" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "os"}]
    prompt = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    asked = prompt["input_ids"][0].tolist()
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, len(asked) :].tolist()
    done = subprocess.run(
        [sys.executable, "-c", CHAT, folder], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"asked {asked} answered {answer}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama with groups", "qwen2 tied", "qwen3 tied"])
def test_a_pruned_teacher_is_served_by_vllm_as_by_transformers(name: str, tmp_path: Path) -> None:
    """Heads stay 32 wide beside a width that they no longer divide: what each of the two makes of that is compared."""
    sizes = SIZES | {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"initializer_range": 0.2}  # far from ties
    config = {
        "llama with groups": LlamaConfig(**sizes, tie_word_embeddings=False),
        "qwen2 tied": Qwen2Config(**sizes, tie_word_embeddings=True),
        "qwen3 tied": Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True),
    }[name]
    teacher = tiny_model(config)
    shape = shape_of(config, name)
    target = replace(shape, num_layers=2, hidden_size=96, num_heads=2, intermediate_size=64)
    energy_NH = torch.full((7, 128), 1 / 128, dtype=torch.float64)
    student = cut(teacher, target, choose(random_scores(shape, 0), target, "random"), energy_NH)
    student.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 9, 2, 7, 1]])
    generated = student.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE_IDS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"completed {generated[0, 5:].tolist()}" in done.stdout
