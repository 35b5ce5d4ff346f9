"""Documents of a packed row, some of whose tokens do not count: the loss is that of each document alone, row for row.

Legend: V vocabulary, n targets of a document, K ids of the widest row.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny_models import mamba_config, tiny_model
from tiny_tasks import tiny_task
from transformers import LlamaForCausalLM

from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.train.data import heldout_batches
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import measure
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

VOCAB_SIZE = 40
SEQ_LEN = 16
ALPHA = 0.7


@pytest.fixture(scope="module")
def readers(make_shards, tmp_path_factory) -> dict[str, ShardReader]:
    folder = tmp_path_factory.mktemp("cut")
    kinds = {"sampled": "sampled", "topk": "topk", "text": None}
    return {name: make_shards(folder / name, kind, 24, cut=True) for name, kind in kinds.items()}


def _module(model: LlamaForCausalLM, alpha: float = ALPHA) -> DistillationModule:
    return DistillationModule(model, OptimizationSettings(), 10, alpha, 1.0, VOCAB_SIZE)


def _alone(model: LlamaForCausalLM, reader: ShardReader, loader: SequenceLoader, plain: Batch, number: int):
    """The loss of a micro-batch from full logits in float64: every document a forward pass of its own."""
    losses = []
    for row, place in enumerate(loader.places(number)):
        sequences, _ = reader.read_member(place.shard, place.member)
        tokens = torch.from_numpy(sequences.tokens_BL1[place.row]).long()
        mask_L1 = sequences.mask_BL1[place.row]
        starts = (i for i in range(1, SEQ_LEN) if sequences.starts_BL1[place.row, i])
        for first, end in itertools.pairwise((0, *starts, SEQ_LEN)):
            logits_nV = model(input_ids=tokens[None, first:end]).logits[0, :, :VOCAB_SIZE].double()
            logq_nV = torch.log_softmax(logits_nV, -1)
            for i in range(first, end):
                if mask_L1[i + 1]:
                    losses.append(_row_loss(logq_nV[i - first], plain, row * SEQ_LEN + i, int(tokens[i + 1])))
    return torch.stack(losses).mean()


def _row_loss(logq_V: torch.Tensor, plain: Batch, row: int, label: int) -> torch.Tensor:
    kept_K = plain.weights_NK[row] > 0
    ids_K, p_K = plain.ids_NK[row][kept_K], plain.weights_NK[row][kept_K].double()
    kl = (p_K * (p_K.log() - logq_V[ids_K])).sum()
    if plain.tail_N is not None:
        tail = plain.tail_N[row].double()
        others_V = torch.ones(VOCAB_SIZE, dtype=torch.bool).index_fill(0, ids_K, False)
        kl = kl + tail * (tail.log() - logq_V[others_V].logsumexp(-1))
    return ALPHA * kl - (1 - ALPHA) * logq_V[label]


@pytest.mark.parametrize("decode_on", [None, "cpu"], ids=["host", "device"])
@pytest.mark.parametrize("row_len", [None, 2 * SEQ_LEN, 2 * SEQ_LEN + 5])
@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_loss_and_gradient_are_those_of_the_counted_tokens_of_documents_alone(
    readers, make_student, kind: str, row_len: int | None, decode_on: str | None
) -> None:
    reader = readers[kind]
    loader = SequenceLoader(
        reader, LoaderSettings(4, 5, row_len=row_len, context="document", decode_on=decode_on, pin=False)
    )
    plain = SequenceLoader(reader, LoaderSettings(4, 5))
    model = make_student()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # what a token sees decides its loss
    for number in range(3):
        model.zero_grad()
        loss = _module(model).loss(loader.micro_batch(number), ALPHA).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        expected = _alone(model, reader, loader, plain.micro_batch(number), number)
        expected.backward()
        # float32 against float64 from the logits on
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        # so this can fail: a whole sequence that is seen has another loss
        whole = _module(model).loss(plain.micro_batch(number), ALPHA).loss.detach()
        assert abs(float(whole - expected.detach())) > 1e-3


def test_what_does_not_count_has_no_part_in_loss_or_gradient(readers, make_student) -> None:
    """Targets and labels of uncounted rows are replaced by nonsense."""
    loader = SequenceLoader(readers["topk"], LoaderSettings(8, 5, row_len=2 * SEQ_LEN + 5, context="document"))
    batch, model = loader.micro_batch(0), make_student()
    uncounted_N = batch.labels_BL.flatten() < 0
    assert 0.3 < uncounted_N.float().mean() < 0.6
    nonsense = Batch(*batch.tensors().values())
    assert batch.ids_NK is not None and batch.weights_NK is not None and batch.tail_N is not None
    nonsense.ids_NK = batch.ids_NK.where(~uncounted_N[:, None], 3)
    nonsense.weights_NK = batch.weights_NK.where(~uncounted_N[:, None], 9.0)
    nonsense.tail_N = batch.tail_N.where(~uncounted_N, 7.0)
    found = []
    for one in (batch, nonsense):
        model.zero_grad()
        loss = _module(model).loss(one, ALPHA).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _task(readers, tmp_path, kind: str = "sampled", **settings) -> TrainingTask:
    given = {"alpha": 0.0 if kind == "text" else 1.0, "context": "document", **settings}
    return tiny_task(tmp_path, readers[kind], readers["text"], {"batch_sequences": 4, "learning_rate": 1e-2}, **given)


@pytest.mark.parametrize("kind", ["sampled", "text"])
def test_the_held_out_loss_falls_and_is_that_of_documents_alone(readers, make_student, tmp_path, kind) -> None:
    task, model = _task(readers, tmp_path, kind, row_len=40), make_student()
    module = _module(model)
    before = measure(module, heldout_batches(task, 64)).loss
    totals = fit(model, task)
    after = measure(module, heldout_batches(task, 64)).loss
    assert totals["num_steps"] == 6
    assert after < before - 0.02
    packed = measure(module, heldout_batches(dataclasses.replace(task, context="packed"), 64)).loss
    assert abs(after - packed) > 1e-4


@pytest.mark.parametrize("settings", [{}, {"row_len": 40}])
def test_a_model_that_cannot_is_refused_before_the_first_step(readers, tmp_path, settings) -> None:
    config = mamba_config()
    with pytest.raises(
        InputError, match=r"mamba: this model would look across the sequences or documents of a row; found"
    ):
        fit(tiny_model(config), _task(readers, tmp_path, **settings))
    assert not list(tmp_path.rglob("metrics.csv"))
    fit(tiny_model(config), dataclasses.replace(_task(readers, tmp_path), context="packed"))


def test_a_teacher_that_cannot_is_refused_beside_the_student_that_can(readers, make_student, tmp_path) -> None:
    teacher = tiny_model(mamba_config())
    task = dataclasses.replace(_task(readers, tmp_path), teacher=teacher)
    with pytest.raises(
        InputError, match=r"mamba: this model would look across the sequences or documents of a row; found"
    ):
        fit(make_student(), task)
