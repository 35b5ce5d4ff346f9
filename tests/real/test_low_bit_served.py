"""A real model of few bits, in vLLM and as it is trained: the same logprobs come out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.pipeline.cache.vllm_start import VNNI
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import layers_to_quantise, make_low_bit, scheme_of
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.device import cpu_has
from capgap.schemas.run_quantize import QuantizeSettings

TEXTS = [
    "To install the package, open a terminal and go to the directory that you downloaded. Then run the installer.",
    "A database transaction is a set of operations that either all take place or not at all.",
    "The capital of France is Paris, and the largest city of Germany is Berlin.",
]
NUM_LARGEST = 10
SCORE = f"""
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(
    model=sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=256 << 20, max_model_len=64, skip_tokenizer_init=True,
    dtype="bfloat16", max_logprobs={5 * NUM_LARGEST},
)
prompts = [{{"prompt_token_ids": ids}} for ids in json.loads(sys.argv[2])]
settings = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs={5 * NUM_LARGEST})
outputs = llm.generate(prompts, settings)
rows = [[{{id: one.logprob for id, one in row.items()}} for row in output.prompt_logprobs[1:]] for output in outputs]
print("scored", json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
@pytest.mark.parametrize("settings", [{"format": "int8"}, {"format": "int4", "group_size": 32}], ids=str)
def test_vllm_is_as_near_to_the_trained_model_as_that_model_in_bfloat16(
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
    command = [sys.executable, "-P", "-c", SCORE, str(tmp_path), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    served = [
        {int(id): logprob for id, logprob in row.items()}
        for rows in json.loads(done.stdout.split("scored ")[1])
        for row in rows
    ]
    trained_TV = _logprobs(model, prompts)
    in_bfloat16 = [dict(enumerate(row_V.tolist())) for row_V in _logprobs(model.to(torch.bfloat16), prompts)]
    by_vllm, by_bfloat16 = _away(trained_TV, served), _away(trained_TV, in_bfloat16)
    print(f"{few.format}, nats rms: vLLM {by_vllm:.3f}, bfloat16 {by_bfloat16:.3f}")
    # both compute in bfloat16 but round in other places, which gave 0.47 and 0.52 at int8, 0.08 and 0.09 at int4;
    # scales of each down projection that are wrong by half give 1.4 and more, queries' rows in wrong places 6.6
    assert by_vllm < 1.5 * by_bfloat16


def _logprobs(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """Of every token [T, V] that follows one of the prompts' tokens, in one row after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1) for ids in prompts])


def _away(wanted_TV: Tensor, found: list[dict[int, float]]) -> float:
    """By how many nats, root mean square, the largest logprobs of each row differ, where their ids were found."""
    assert len(wanted_TV) == len(found)
    away = [
        row[id] - float(wanted_V[id])
        for wanted_V, row in zip(wanted_TV, found, strict=True)
        for id in wanted_V.topk(NUM_LARGEST).indices.tolist()
        if id in row
    ]
    assert len(away) > 0.8 * NUM_LARGEST * len(found)
    return float(torch.tensor(away).square().mean().sqrt())
