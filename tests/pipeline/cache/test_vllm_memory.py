"""A sequence of 32k tokens in steps of 2k: what the process takes beside the engine is what is stated of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]

LONG = """
import json, sys
from pathlib import Path
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM
from capgap.pipeline.cache.held import held_bytes
from capgap.pipeline.cache.scoring import Recording, Request
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.pipeline.cache.vllm_start import chunk_bytes, memory_settings
from capgap.schemas.run_cache import CacheSettings

SEQ_LEN, STEP, NUM_COLUMNS, CHUNK_ROWS = 32768, 2048, 32000, 256

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

config = LlamaConfig(
    vocab_size=NUM_COLUMNS, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=SEQ_LEN,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
settings = CacheSettings(recording="both", num_samples=50, top_k=64, chunk_rows=CHUNK_ROWS, batch_tokens=STEP)
recording = Recording(50, 64, 1.0, 0, NUM_COLUMNS, CHUNK_ROWS)
engine = VllmEngine(sys.argv[1], recording, SEQ_LEN, "auto", STEP, 0.5, "cpu")
tokens = np.random.default_rng(0).integers(0, NUM_COLUMNS, SEQ_LEN + 1, dtype=np.int32)
engine.score([Request(tokens[: STEP + 1])])  # whatever is made once, is made now
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak_bytes()
(scored,) = engine.score([Request(tokens)])
found = peak_bytes() - before
engine.close()
cache = memory_settings(config, "cpu", STEP, SEQ_LEN, 0.5, CHUNK_ROWS, 1)["kv_cache_memory_bytes"]
print(json.dumps({
    "rows": len(scored.ids_LK), "found": found, "held": held_bytes(settings, SEQ_LEN, SEQ_LEN),
    "chunk": chunk_bytes(NUM_COLUMNS, CHUNK_ROWS, 1), "kv_cache": cache, "logits": 4 * SEQ_LEN * NUM_COLUMNS,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
def test_a_sequence_of_32k_tokens_takes_what_is_stated(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", LONG, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / 1e6:,.0f} MB" for name, value in found.items() if name != "rows"})
    assert found["rows"] == 32768
    # `held` is of three shards, of which one is at the engine here; its rows exist twice while they are put together.
    # Measured: 126 MB of 71 + 147 + 134.
    assert found["found"] < found["held"] + found["chunk"] + found["kv_cache"]
    # all of a sequence's logits would be 4.2 GB
    assert found["found"] < found["logits"] / 8
