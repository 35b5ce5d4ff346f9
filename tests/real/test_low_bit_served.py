"""A real model of few bits, in vLLM and as it is trained: the same words come out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capgap.pipeline.cache.vllm_start import VNNI
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import layers_to_quantise, make_low_bit, scheme_of
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.device import cpu_has
from capgap.schemas.run_quantize import QuantizeSettings

TEXTS = ["To install the package, open a terminal and", "A database transaction is", "The capital of France is"]
NUM_NEW = 16
COMPLETE = f"""
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(
    model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=256 << 20, max_model_len=64, skip_tokenizer_init=True,
    dtype="bfloat16",
)
prompts = [{{"prompt_token_ids": ids}} for ids in json.loads(sys.argv[2])]
outputs = llm.generate(prompts, SamplingParams(max_tokens={NUM_NEW}, temperature=0.0, detokenize=False))
print("completed", json.dumps([list(one.outputs[0].token_ids) for one in outputs]))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
@pytest.mark.parametrize("settings", [{"format": "int8"}, {"format": "int4", "group_size": 32}], ids=str)
def test_vllm_completes_texts_as_the_trained_model_does(
    real_model: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if not (cpu_has("avx512f") if settings["format"] == "int4" else cpu_has(*VNNI)):
        pytest.skip("vLLM has no right product of this format for this processor")
    path, few = str(real_model("SmolLM2-135M-Instruct")), QuantizeSettings(**settings)
    tokenizer = load_tokenizer(path)
    model = load_model(path, "cpu", torch.float32)
    make_low_bit(model, layers_to_quantise(model, few), scheme_of(few))
    save_compressed(model, tmp_path)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    command = [sys.executable, "-P", "-c", COMPLETE, str(tmp_path), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    same = 0
    for prompt, served in zip(prompts, json.loads(done.stdout.split("completed ")[1]), strict=True):
        with torch.no_grad():
            logits_LV = model(torch.tensor([prompt + served])).logits[0, len(prompt) - 1 : -1].float()
        logprobs_LV = logits_LV.log_softmax(-1)
        behind_L = logprobs_LV.max(-1).values - logprobs_LV[torch.arange(NUM_NEW), served]
        print(
            few.format, tokenizer.decode(prompt), "|", tokenizer.decode(served), "| nats behind", float(behind_L.max())
        )
        same += int((behind_L == 0).sum())
        # bfloat16 keeps 8 bits: a logit of 20 is rounded by up to 0.04, and sums before it are rounded too
        assert float(behind_L.max()) < 0.25
    assert same >= 0.9 * NUM_NEW * len(TEXTS)
