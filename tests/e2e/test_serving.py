"""The student's folder is what other programs expect: transformers opens it, vLLM completes text with it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import capgap, run_of
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = "{% for m in messages %}import {{ m.content }} {% endfor %}"

CHAT = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
output = llm.chat([{"role": "user", "content": "os"}], SamplingParams(max_tokens=8, temperature=0.0))[0]
print("asked", list(output.prompt_token_ids), "answered", list(output.outputs[0].token_ids))
"""

COMPLETE = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
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
        [sys.executable, "-P", "-c", COMPLETE, folder], capture_output=True, text=True, timeout=600, check=False
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
        [sys.executable, "-P", "-c", CHAT, folder], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"asked {asked} answered {answer}" in done.stdout
