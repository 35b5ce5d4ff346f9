"""A teacher that is a known Markov chain, shards of its text with its distributions as targets, and tiny students.

Legend: V vocabulary, B sequences, L targets a sequence, N = B x L rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import DEEPER, tiny_llama
from tiny_runs import NEEDED, settings_of
from transformers import LlamaForCausalLM

from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Recording, record_rows, row_offsets, sequence_digest, unpack
from capgap.pipeline.store import Block, Codec, ShardReader, ShardWriter
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.records import Sequences
from capgap.schemas.run_file import RunFile

VOCAB_SIZE = 40
SEQ_LEN = 16
NUM_IDS = {"sampled": 20, "topk": 6}


@pytest.fixture(scope="session")
def chain() -> torch.Tensor:
    """Logits of the next token after each token: an entropy of 1.5 nats."""
    return torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2.5


@pytest.fixture(scope="session")
def make_sequences(chain) -> Callable[..., Sequences]:
    def make(num_sequences: int, seed: int = 0) -> Sequences:
        rng = np.random.default_rng(seed)
        ends_VV = torch.softmax(chain.double(), -1).cumsum(-1).numpy()
        tokens_BL1 = np.zeros((num_sequences, SEQ_LEN + 1), np.int32)
        tokens_BL1[:, 0] = rng.integers(0, VOCAB_SIZE, num_sequences)
        for i in range(SEQ_LEN):
            points_B = rng.random(num_sequences)
            tokens_BL1[:, i + 1] = (ends_VV[tokens_BL1[:, i]] < points_B[:, None]).sum(1).clip(max=VOCAB_SIZE - 1)
        starts_BL1 = np.zeros(tokens_BL1.shape, np.bool_)
        starts_BL1[:, 0] = True
        return Sequences(tokens_BL1, starts_BL1, ~starts_BL1)

    return make


@pytest.fixture(scope="session")
def make_shards(chain, make_sequences) -> Callable[..., ShardReader]:
    """`kind`: sampled, topk, or None for text without targets. Shards of 12 sequences, each in two members.

    With `cut`, documents begin anywhere, some sequences within one, and four of ten tokens do not count.
    With `masked`, sequences differ in the number of their labels.
    """

    def make(
        folder: Path,
        kind: str | None,
        num_sequences: int,
        *,
        temperature: float = 1.0,
        extra: tuple[float, ...] = (),
        seed: int = 0,
        cut: bool = False,
        masked: bool = False,
    ) -> ShardReader:
        folder.mkdir(parents=True, exist_ok=True)
        sequences = make_sequences(num_sequences, seed)
        if cut:
            rng = np.random.default_rng(seed)
            sequences.starts_BL1[:] = rng.random(sequences.starts_BL1.shape) < 0.2
            sequences.mask_BL1[:] = rng.random(sequences.mask_BL1.shape) < 0.6
        if masked:
            # no two neighbours have as many labels, and one in eight has none
            counts_B1 = np.arange(num_sequences)[:, None] % 8 * 2
            sequences.mask_BL1[:] &= np.arange(SEQ_LEN + 1) <= counts_B1
        name = {None: SEQUENCES, "sampled": SAMPLED, "topk": TOPK}[kind]
        codec = Codec(name, SEQ_LEN, VOCAB_SIZE, NUM_IDS.get(kind, 0), None, temperature, extra)
        writer = ShardWriter(folder, folder / "sidecars", "shard", codec)
        num_ids = {name: NUM_IDS[name] if name == kind else 0 for name in NUM_IDS}
        recording = Recording(num_ids["sampled"], num_ids["topk"], temperature, 0, VOCAB_SIZE, 64, extra)
        shards = []
        for index, start in enumerate(range(0, num_sequences, 12)):
            parts = [sequences.part(slice(i, i + 6)) for i in (start, start + 6) if i < num_sequences]
            shards.append(writer.write(index, [Block(p, _targets(kind, recording, chain, p)) for p in parts]))
        return ShardReader(folder, writer.shard_set(shards))

    return make


def _targets(kind: str | None, recording: Recording, chain: torch.Tensor, sequences: Sequences):
    if kind is None:
        return None
    scored = []
    for tokens_L1 in sequences.tokens_BL1:
        offsets = row_offsets(recording, sequence_digest(tokens_L1), 0, SEQ_LEN)
        tokens = torch.from_numpy(tokens_L1).long()
        packed = record_rows(
            recording, chain[tokens[:-1]], tokens[1:], None if offsets is None else torch.from_numpy(offsets)
        )
        scored.append(unpack(recording, packed.ids_NC.numpy(), packed.numbers_NW.numpy(), "here"))
    return to_targets(scored, kind)


@pytest.fixture(scope="session")
def make_student() -> Callable[..., LlamaForCausalLM]:
    """A Llama with 8 rows of padding behind its vocabulary."""

    def make(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
        sizes = DEEPER | {"vocab_size": VOCAB_SIZE + 8, "max_position_embeddings": SEQ_LEN}
        return tiny_llama(seed, tie_word_embeddings=tied, **sizes)

    return make


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Two runs whose texts, and so corpora and tokenizers, differ; all that training needs is made."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {salt: settings_of(folder / salt, salt) for salt in ("number", "square")}
    for run in runs.values():
        for instance in NEEDED:
            carry_out(RunFile.model_validate(run), instance)
    return runs


@pytest.fixture(scope="module")
def with_both(made, tmp_path_factory) -> dict[str, Any]:
    """The run with a cache of both recordings and three temperatures in place of its own; it trains from draws."""
    run = made["number"] | {
        "out": str(tmp_path_factory.mktemp("both")),
        "reuse": {stage: f"{made['number']['out']}/{stage}" for stage in ("corpus", "teacher")},
        "cache": made["number"]["cache"] | {"recording": "both", "top_k": 9, "extra_temperatures": [2.0, 0.5]},
        "train": made["number"]["train"] | {"recording": "sampled"},
    }
    for instance in NEEDED[2:]:
        carry_out(RunFile.model_validate(run), instance)
    return run
