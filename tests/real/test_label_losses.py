"""Real models from text to a cache, through transformers: complete, read right, and begun as they were trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from tokenizers import Tokenizer

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.tokenizer_files import PROBES
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store import read_blocks
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import Manifest
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
        # nats a label that the beginning saves; measured 1.9 to 2.4 for Gemma, and -0.01 for SmolLM2, which has none
        ("gemma-3-270m", True, 0.5, 4.0),
        ("SmolLM2-135M-Instruct", False, -0.1, 0.1),
    ],
)
def test_a_beginning_is_put_where_the_model_was_trained_with_one_and_saves_what_it_should(
    real_model: RealModel, tmp_path: Path, name: str, begins: bool, least: float, most: float
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number, topic in enumerate(sorted(topics)[:24]):
        (text / f"{number:02d}.txt").write_text(topics[topic])
    losses = {}
    for bos in ("auto", "never", "always"):
        if (bos == "always" and begins) or (bos == "auto" and not begins):
            continue  # the same as another
        run = _run(real_model(name), text, tmp_path / bos, bos)
        corpus = CorpusFacts.model_validate(carry_out(run, Instance("corpus")).facts)
        assert bool(corpus.bos_ids) == (bos != "never")
        carry_out(run, Instance("teacher"))
        losses[bos] = _label_loss(Path(run.out) / "cache", carry_out(run, Instance("cache")))
    saved = losses["never"] - min(losses[bos] for bos in losses if bos != "never")
    print(f"{name}: {losses}")
    assert least < saved < most


def _label_loss(folder: Path, cache: Manifest) -> float:
    """Mean over the labels that count, nats; no beginning is among them."""
    counted = [
        block.label_logprobs_BL[sequences.mask_BL1[:, 1:]]
        for sequences, block in read_blocks(folder, cache.shard_sets["topk"])
    ]
    return -float(np.concatenate(counted).mean())


def _run(model: Path, text: Path, out: Path, bos: str) -> RunFile:
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
                "engine": "transformers",
                "recording": "topk",
                "top_k": 8,
                "max_tokens": NUM_TARGETS,
                "num_heldout_sequences": 0,
            },
            "student": {"path": str(model)},
        }
    )
