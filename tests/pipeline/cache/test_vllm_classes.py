"""Teachers that vLLM starts otherwise than a plain decoder: a class that also sees, steps smaller than a sequence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SEES = """
import json, sys
import numpy as np, torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig
from capgap.pipeline.cache.scoring import Recording, Request
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache.vllm_engine import VllmEngine

torch.manual_seed(0)
text = Gemma3TextConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=128, sliding_window=16,
)
vision = SiglipVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
config = Gemma3Config(
    text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=319, boi_token_index=317,
    eoi_token_index=318,
)
Gemma3ForConditionalGeneration(config).save_pretrained(sys.argv[1])
rng = np.random.default_rng(0)
requests = [Request(rng.integers(0, 300, 49, dtype=np.int32)) for _ in range(6)]
recording = Recording(50, 16, 1.0, 0, 300, 64)
reference = TransformersEngine(sys.argv[1], recording, "auto", 4096, "cpu").score(requests)
engine = VllmEngine(sys.argv[1], recording, 48, "auto", 32, 0.5, "cpu")
scored = engine.score(requests)
engine.close()
apart = max(np.abs(a.logprobs_LK - b.logprobs_LK).max() for a, b in zip(scored, reference))
same = sum(int((a.samples_Ln == b.samples_Ln).all(1).sum()) for a, b in zip(scored, reference))
print(json.dumps({"runner": engine.runner, "dtype": engine.dtype, "apart": float(apart), "same": same}))
"""


@pytest.mark.slow
def test_of_a_class_that_also_sees_the_text_is_scored(tmp_path: Path) -> None:
    """Its part of the configuration names no dtype; the head is padded; a sequence of 48 takes steps of 32."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    paths = [str(ROOT / "src")]
    if importlib.util.find_spec("torchvision") is None:
        paths.append(str(ROOT / "tests" / "stand_ins"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-c", SEES, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runner"] != "public" and found["dtype"] == "float32"
    # float32 rounding of another order of sums; a sample may fall to the neighbour at an id's end
    assert found["apart"] < 1e-4 and found["same"] >= 6 * 48 - 3
