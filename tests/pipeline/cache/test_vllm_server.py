"""A real server of vLLM as the teacher: its cache is the one that vLLM makes in this process, within rounding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VLLM_HEAD_DIM, save_model, tiny_llama
from transformers import PreTrainedTokenizerFast
from vllm_server import vllm_server

from capgap.pipeline.cache.server_engine import ServerEngine
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.verify.rescore import rescore
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import SettingError
from capgap.schemas.run_endpoint import EndpointSettings
from capgap.schemas.run_file import RunFile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU"),
]

NAME, TOP_K, SEQ_LEN = "tiny-teacher", 16, 32

# All is float32; sums are taken in the order of other batches. Measured: an rms of 1e-7 nats.
RMS_NATS = 1e-5


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory) -> str:
    """A teacher with as many columns as its tokenizer has ids."""
    model = tiny_llama(2, vocab_size=300, head_dim=VLLM_HEAD_DIM, max_position_embeddings=64, initializer_range=0.2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["teacher"]["path"])
    return save_model(tmp_path_factory.mktemp("served"), model, tokenizer)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory) -> Iterator[str]:
    flags = ["--dtype", "float32", "--max-logprobs", str(TOP_K), "--max-model-len", str(SEQ_LEN + 2)]
    with vllm_server(folder, NAME, tmp_path_factory.mktemp("log") / "vllm.log", *flags) as url:
        yield url


def _run(inputs: dict[str, Any], out: Path, teacher: dict[str, Any], cache: dict[str, Any]) -> RunFile:
    cache = {"recording": "topk", "top_k": TOP_K, "profile": "lossless", "num_heldout_sequences": 0, **cache}
    shutil.copytree(Path(inputs["out"]) / "corpus", out / "corpus")
    run = {name: inputs[name] for name in ("name", "device", "corpus")} | {"teacher": teacher, "cache": cache}
    made = RunFile.model_validate(run | {"out": str(out)})
    carry_out(made, Instance("teacher"))
    carry_out(made, Instance("cache"))
    return made


def _rows(run: RunFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    folder = Path(run.out) / "cache"
    manifest = read_manifest(folder)
    assert manifest is not None
    reader = ShardReader(folder, manifest.shard_sets["topk"])
    found = [reader.read(index)[1] for index in range(reader.shard_set.num_members)]
    ids, logprobs, labels = (
        np.concatenate([getattr(one, name) for one in found])
        for name in ("ids_BLK", "logprobs_BLK", "label_logprobs_BL")
    )
    return ids, logprobs, labels


def test_its_cache_is_the_one_that_vllm_makes_here(inputs, url, folder, tmp_path) -> None:
    served = _run(inputs, tmp_path / "served", {"served": NAME}, {"engine": "server", "server": {"base_url": url}})
    here = _run(inputs, tmp_path / "here", {"path": folder}, {"engine": "vllm", "cross_check": "never"})
    (ids, logprobs, labels), (own_ids, own_logprobs, own_labels) = _rows(served), _rows(here)
    pairs = (logprobs, own_logprobs), (labels, own_labels)
    rms = [float(np.sqrt(((one - other).astype(np.float64) ** 2).mean())) for one, other in pairs]
    other = float((ids != own_ids).mean())
    print(f"rms of kept logprobs {rms[0]:.2g}, of labels {rms[1]:.2g} nats; {other:.2%} of ids at another rank")
    assert max(rms) < RMS_NATS and other < 0.005
    lines = list(rescore(Path(served.out) / "cache", 0.1, device="cpu"))
    assert "agrees with its teacher" in lines[-1]


def test_what_its_flags_do_not_allow_is_said_with_the_flag(url, recording, requests_of) -> None:
    settings = EndpointSettings(base_url=url)
    engine = ServerEngine(settings, NAME, recording("topk", TOP_K + 1), SEQ_LEN)
    requests = [type(one)(one.tokens_L1[: SEQ_LEN + 1]) for one in requests_of(1)]
    with pytest.raises(SettingError, match=rf"max allowed: {TOP_K}.*--max-logprobs {TOP_K + 1}"):
        engine.score(requests)
    with pytest.raises(SettingError, match=f"--max-model-len {SEQ_LEN + 3} or more"):
        ServerEngine(settings, NAME, recording("topk", TOP_K), SEQ_LEN + 1)
    with pytest.raises(SettingError, match=f"found {NAME}, expected another"):
        ServerEngine(settings, "another", recording("topk", TOP_K), SEQ_LEN)
