"""Teachers that vLLM starts otherwise than a plain decoder, through the real engine on a CPU, each in a process of its
own: a class that also sees, a mixture of experts, a hybrid, the real head of Qwen3, a body of int8."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from capgap.pipeline.cache.vllm_start import VNNI
from capgap.pipeline.stage.device import cpu_has

ROOT = Path(__file__).parents[3]
HAS_VNNI = cpu_has(*VNNI)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU"),
]


def _scored(tmp_path: Path, kind: str, *more: str) -> dict[str, Any]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    paths = [str(ROOT / "src")]
    if importlib.util.find_spec("torchvision") is None:
        paths.append(str(ROOT / "tests" / "stand_ins"))
    script = ROOT / "tests" / "tiny" / "vllm_kinds.py"
    command = [sys.executable, "-P", str(script), kind, str(tmp_path / "model"), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(kind, found)
    return found


@pytest.mark.parametrize("kind", ["sees", "mixture", "hybrid", "padded"])
def test_the_text_of_every_kind_is_scored_as_transformers_scores_it(tmp_path: Path, kind: str) -> None:
    """Heads are padded, that of Qwen3 from 151,669 ids to 151,936 columns; a sequence of 48 takes steps of 32.

    The part of the class that sees which reads names no dtype in its configuration.
    """
    found = _scored(tmp_path, kind)
    assert found["runner"] != "public" and found["dtype"] == "float32"
    # float32 rounding of another order of sums; a sample may fall to the neighbour at an id's end
    assert found["apart"] < 1e-4 and found["same"] >= 6 * 48 - 3
    assert found["largest_id"] < (151_669 if kind == "padded" else 300)


@pytest.mark.skipif(not HAS_VNNI, reason="vLLM multiplies int8 wrongly on this processor, and is not asked to")
def test_a_body_of_int8_is_scored_as_its_numbers_say(tmp_path: Path) -> None:
    """Weights in int8 by channel, activations by token: the same steps in transformers, beside what bfloat16 does."""
    found = _scored(tmp_path, "int8", "bfloat16")
    assert found["dtype"] == "bfloat16" and found["runner"] != "public"
    # as the cross-check has it: an engine that is sound is about as far from float32 as the other in the same dtype
    assert found["rms"] < 4 * found["own_rms"] + 1e-3


@pytest.mark.parametrize(
    ("kind", "dtype", "said"),
    [
        pytest.param(
            "int8",
            "float32",
            "cache.dtype: vLLM multiplies int8 on a CPU in bfloat16 alone; found float32, expected",
            marks=pytest.mark.skipif(not HAS_VNNI, reason="without VNNI it is refused for that first"),
        ),
        pytest.param(
            "int8",
            "bfloat16",
            "vLLM multiplies int8 wrongly on this processor; found compressed-tensors, int-quantized, and no VNNI",
            marks=pytest.mark.skipif(HAS_VNNI, reason="this processor has what it needs"),
        ),
        ("nvfp4", "bfloat16", "quantised: compressed-tensors, nvfp4-pack-quantized; found"),
    ],
)
def test_what_a_cpu_cannot_run_is_one_line(tmp_path: Path, kind: str, dtype: str, said: str) -> None:
    found = _scored(tmp_path, kind, dtype)
    assert found["code"] == 3 and said in found["error"] and "\n" not in found["error"]
