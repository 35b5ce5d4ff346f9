"""The student's folder is what other programs expect: transformers opens it, vLLM completes text with it."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

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
