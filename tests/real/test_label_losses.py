"""Real models from text to a cache, through both engines: complete, read right, and begun as they were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.tokenizer_files import PROBES
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import read_blocks
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.records import FloatArray, IntArray
from capgap.schemas.run_file import RunFile

RealModel = Callable[[str], Path]
NAMES = ("SmolLM2-135M-Instruct", "gemma-3-270m")
SEQ_LEN, NUM_TARGETS = 128, 1024


@pytest.mark.parametrize("name", NAMES)
def test_a_real_model_is_complete_and_its_ids_are_those_of_its_file(real_model: RealModel, name: str) -> None:
    folder = real_model(name)
    require_complete(str(folder))
    tokenizer, reference = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text, add_special_tokens=False).ids and tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "begins", "least", "most"),
    [
        # nats/token that the beginning saves; measured 1.9 to 2.4 for Gemma, and -0.05 to -0.01 for SmolLM2
        ("gemma-3-270m", True, 0.5, 4.0),
        ("SmolLM2-135M-Instruct", False, -0.1, 0.1),
    ],
)
def test_both_engines_lose_what_transformers_alone_does_and_a_beginning_saves_what_it_should(
    real_model: RealModel, tmp_path: Path, name: str, begins: bool, least: float, most: float
) -> None:
    text, losses = _texts(tmp_path / "text"), {}
    for bos in ("auto", "never") if begins else ("auto", "always"):
        found = {}
        for engine in ("transformers", "vllm"):
            run = _run(real_model(name), text, tmp_path / bos / engine, bos, engine)
            corpus = CorpusFacts.model_validate(carry_out(run, Instance("corpus")).facts)
            assert bool(corpus.bos_ids) == (bos == "always" or (bos == "auto" and begins))
            carry_out(run, Instance("teacher"))
            cache = carry_out(run, Instance("cache"))
            blocks = list(read_blocks(Path(run.out) / "cache", cache.shard_sets["topk"]))
            tokens_BL1, mask_BL1 = (
                np.concatenate([getattr(one, field) for one, _ in blocks]) for field in ("tokens_BL1", "mask_BL1")
            )
            counts_BL = mask_BL1[:, 1:]
            found[engine] = np.concatenate([block.label_logprobs_BL for _, block in blocks])[counts_BL]
            assert cache.facts["mean_label_loss"] == pytest.approx(-found[engine].mean(dtype=np.float64), abs=1e-4)
        alone, halved = (
            _alone(real_model(name), tokens_BL1, dtype)[counts_BL] for dtype in (torch.float32, torch.bfloat16)
        )
        noise = _rms(halved - alone)
        losses[bos] = {"transformers alone": -alone.mean()} | {engine: -found[engine].mean() for engine in found}
        print(f"{name}, bos {bos}, {len(alone)} labels:", {key: f"{value:.4f}" for key, value in losses[bos].items()})
        print(
            "rms of label logprobs against transformers alone:",
            {key: f"{_rms(one - alone):.5f}" for key, one in found.items()},
            f"bfloat16 {noise:.4f}",
        )
        # float32 sums in another order are far below what transformers itself loses in bfloat16, which is 0.05 to 0.2
        assert _rms(found["transformers"] - alone) < 1e-3 * noise + 1e-4
        assert _rms(found["vllm"] - alone) < 0.1 * noise
    first, second = losses.values()
    for engine in first:
        saved = second[engine] - first[engine] if begins else first[engine] - second[engine]
        assert least < saved < most


def _texts(folder: Path) -> Path:
    folder.mkdir()
    for number, topic in enumerate(sorted(topics)[:24]):
        (folder / f"{number:02d}.txt").write_text(topics[topic])
    return folder


def _alone(model: Path, tokens_BL1: IntArray, dtype: torch.dtype) -> FloatArray:
    """Logprobs of the labels [B, L] by transformers and nothing of capgap's."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    found = []
    with torch.inference_mode():
        for row_L1 in torch.from_numpy(tokens_BL1).long():
            logprobs_LV = loaded(row_L1[None, :-1]).logits[0].float().log_softmax(dim=-1)
            found.append(logprobs_LV.gather(1, row_L1[1:, None])[:, 0].numpy())
    return np.stack(found)


def _rms(differences: FloatArray) -> float:
    return float(np.sqrt((differences.astype(np.float64) ** 2).mean()))


def _run(model: Path, text: Path, out: Path, bos: str, engine: str) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "real",
            "out": str(out),
            "device": "cpu",
            "corpus": {
                "sources": [str(text)],
                "tokenizer": str(model),
                "seq_len": SEQ_LEN,
                "teacher_fraction": 0.0,
                "heldout_fraction": 0.2,
                "shard_sequences": 8,
                "bos": bos,
            },
            "teacher": {"path": str(model)},
            "cache": {
                "engine": engine,
                "dtype": "float32",  # some CPUs cannot run vLLM's bfloat16
                "recording": "topk",
                "profile": "lossless",
                "top_k": 8,
                "max_tokens": NUM_TARGETS,
                "num_heldout_sequences": 0,
            },
            "student": {"path": str(model)},
        }
    )
