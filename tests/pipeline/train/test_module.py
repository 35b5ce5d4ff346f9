from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DEEPER, llama_config, mamba_config, tiny_llama, tiny_model

from capgap.pipeline.store import Batch
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.rows import in_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

VOCAB_SIZE = 40
TEMPERATURES = {"sampled": 2.0, "topk": 1.0}


@pytest.fixture(scope="module", params=["sampled", "topk"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def batch(kind, make_shards, tmp_path_factory) -> Batch:
    reader = make_shards(tmp_path_factory.mktemp("cache"), kind, 12, temperature=TEMPERATURES[kind])
    sequences, targets = reader.read(0)
    sequences.mask_BL1[1, 5:9] = False
    return collate([(sequences, targets, row) for row in range(4)], reader.codec.num_ids)


def _module(model, alpha: float = 1.0, temperature: float = 1.0) -> DistillationModule:
    return DistillationModule(model, OptimizationSettings(), 10, alpha, temperature, VOCAB_SIZE)


def _plain_loss(model, batch: Batch, alpha: float, temperature: float) -> torch.Tensor:
    """From full logits, row by row, in float64."""
    logits_NV = model(input_ids=batch.input_ids_BL).logits.flatten(0, 1)[:, :VOCAB_SIZE].double()
    losses = []
    for row, (logits_V, label) in enumerate(zip(logits_NV, batch.labels_BL.flatten().tolist(), strict=True)):
        if label < 0:
            continue
        logq_V = torch.log_softmax(logits_V / temperature, -1)
        weights_K = batch.weights_NK[row].double()
        ids_K, p_K = batch.ids_NK[row][weights_K > 0], weights_K[weights_K > 0]
        kl = (p_K * (p_K.log() - logq_V[ids_K])).sum()
        if batch.tail_N is not None:
            tail = batch.tail_N[row].double()
            kept_V = torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, ids_K, True)
            kl = kl + tail * (tail.log() - logq_V[~kept_V].logsumexp(-1))
        ce = -torch.log_softmax(logits_V, -1)[label]
        losses.append(alpha * temperature**2 * kl + (1 - alpha) * ce)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_and_gradients_are_those_of_full_logits(kind, batch, make_student, alpha, tied) -> None:
    model, temperature = make_student(tied=tied), TEMPERATURES[kind]
    module = _module(model, alpha, temperature)
    loss = module.training_step(batch, 0)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = _plain_loss(model, batch, alpha, temperature)
    expected.backward()
    # float32 against float64 from the logits on: 1e-7 of a few nats, summed over 60 rows
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=2e-6, rtol=1e-4), name
    head = found["lm_head.weight" if not tied else "model.embed_tokens.weight"]
    assert head[:VOCAB_SIZE].any() and not head[VOCAB_SIZE:].any(), "padding rows are never trained"


def test_at_alpha_0_targets_make_no_difference(kind, batch, make_student) -> None:
    without = Batch(batch.input_ids_BL, batch.labels_BL)
    found = _module(make_student(), 0.0).loss(without, 0.0)
    assert torch.equal(found.loss, _module(make_student(), 0.0).loss(batch, 0.0).loss)
    assert found.kl_N is None


def test_a_large_gradient_is_clipped_and_a_small_one_left_alone(make_student) -> None:
    model = make_student()
    module = _module(model)
    for size, expected in ((100.0, module._settings.clip_norm), (1e-3, 1e-3)):
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, size / sum(p.numel() for p in parameters) ** 0.5)
        module.configure_gradient_clipping(None)
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        # clip_grad_norm_ divides by the norm plus 1e-6
        assert norm.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("row_len", [16, 19, 32, 37, 70])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rows_of_several_sequences_and_padding_have_the_loss_and_the_gradient_of_the_sequences(
    batch, kind, row_len: int, alpha: float, attention: str
) -> None:
    model = tiny_llama(vocab_size=48, attn_implementation=attention, **DEEPER)
    found = []
    for part in (batch, in_rows(batch, row_len)):
        model.zero_grad()
        loss = _module(model, alpha, TEMPERATURES[kind]).loss(part, alpha).loss
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (loss_of_rows, gradient_of_rows) = found
    # float32 sums in another order; a token that saw another sequence would move the loss in the third figure
    torch.testing.assert_close(loss_of_rows, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of_rows, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "attention", "found"),
    [
        (llama_config(vocab_size=48), "flash_attention_2", "attention flash_attention_2"),
        (mamba_config(), None, "a model without positions"),
    ],
)
def test_a_model_that_would_look_across_the_sequences_of_a_row_is_refused(batch, config, attention, found) -> None:
    model = tiny_model(copy.deepcopy(config))
    if attention is not None:
        model.config._attn_implementation_internal = attention
    with pytest.raises(
        InputError, match=f"look across the sequences or documents of a row; found {found}, expected .*eager or"
    ):
        _module(model).loss(in_rows(batch, 32), 1.0)


def test_without_positions_the_rows_of_several_sequences_have_another_loss(batch, make_student) -> None:
    """So the test above can fail: a student that looked across sequences would be seen."""
    torch.manual_seed(0)
    model = make_student()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        rows = in_rows(batch, 32)
        right = _module(model).loss(rows, 0.0).loss
        rows.positions_BL = None
        wrong = _module(model).loss(rows, 0.0).loss
    assert abs(float(wrong - right)) > 1e-3
