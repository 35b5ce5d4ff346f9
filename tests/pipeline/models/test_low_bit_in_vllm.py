"""vLLM serves the checkpoint of a student of few bits: its tokens are those of the model that was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from capgap.pipeline.cache.vllm_start import VNNI
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import layers_to_quantise, make_low_bit, scheme_of
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.stage.device import cpu_has
from capgap.schemas.run_quantize import QuantizeSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU"),
]

PROMPT, NUM_NEW = [5, 9, 2, 7, 1], 12
COMPLETE = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(
    model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64, skip_tokenizer_init=True,
    dtype="bfloat16",
)
prompt = {"prompt_token_ids": [5, 9, 2, 7, 1]}
output = llm.generate([prompt], SamplingParams(max_tokens=12, temperature=0.0, detokenize=False))[0].outputs[0]
print("completed", list(output.token_ids))
"""
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


GIVEN: list[dict[str, Any]] = [
    {"format": "int8"},
    {"format": "int8", "head": True},
    {"format": "int4", "group_size": 32},
    {"format": "int4", "group_size": 32, "head": True},
]


@pytest.mark.parametrize("settings", GIVEN, ids=lambda given: given["format"] + " with its head" * ("head" in given))
def test_vllm_completes_as_the_trained_model_does(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if not (cpu_has("avx512f") if settings["format"] == "int4" else cpu_has(*VNNI)):
        pytest.skip("vLLM has no right product of this format for this processor")
    few = QuantizeSettings(**settings)
    model = tiny_llama(1, **SIZES).eval()
    make_low_bit(model, layers_to_quantise(model, few), scheme_of(few))
    save_compressed(model, tmp_path)
    command = [sys.executable, "-P", "-c", COMPLETE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout.split("completed ")[1])
    ids, trained = list(PROMPT), list[int]()
    for number in range(NUM_NEW):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        trained.append(int(logits_V.argmax()))
        # where two tokens are as near as bfloat16 rounds, either is right
        assert logits_V[trained[-1]] - logits_V[served[number]] < 0.05 * float(logits_V.std())
        ids.append(served[number])
    print(few.format, "served", served, "trained", trained)
    assert sum(a == b for a, b in zip(served, trained, strict=True)) >= NUM_NEW - 1
    # and transformers opens the same folder
    assert load_model(str(tmp_path), "cpu").dtype == torch.bfloat16
