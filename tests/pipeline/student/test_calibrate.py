"""Scores: what they are made of, and that they tell what matters from what does not."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import PRUNED_VOCAB_SIZE as VOCAB_SIZE
from tiny_models import prunable_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from capgap.pipeline.student.calibrate import calibrate, loss_without_each_layer
from capgap.pipeline.student.kept import choose, random_scores
from capgap.pipeline.student.shapes import shape_of
from capgap.schemas.errors import InputError


def _calibrated(model: PreTrainedModel, batches, taylor: bool):
    return calibrate(model, shape_of(model.config, ""), batches, VOCAB_SIZE, taylor)


@pytest.mark.parametrize("taylor", [False, True])
def test_scores_do_not_depend_on_how_sequences_are_batched(llama: PreTrainedModel, make_batches, taylor: bool) -> None:
    alone, together = (_calibrated(llama, make_batches(size), taylor) for size in (1, 8))
    for one, other in zip(vars(alone.scores).values(), vars(together.scores).values(), strict=True):
        # float32 in another order
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_model_is_left_as_it_was(llama: PreTrainedModel, make_batches) -> None:
    before = copy.deepcopy(llama.state_dict())
    for taylor in (False, True):
        _calibrated(llama, make_batches(), taylor)
    assert all(torch.equal(before[name], weight) for name, weight in llama.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())


@pytest.mark.parametrize("taylor", [False, True])
def test_what_adds_nothing_has_the_lowest_score_and_goes_first(make_batches, taylor: bool) -> None:
    model = prunable_model("llama")
    shape = shape_of(model.config, "")
    with torch.no_grad():
        layer = model.model.layers[1]
        layer.mlp.up_proj.weight[[3, 17]] = 0
        layer.self_attn.v_proj.weight[shape.head_dim :] = 0  # the second group's values
        for norm in (*(n for block in model.model.layers for n in (block.input_layernorm,)), model.model.norm):
            norm.weight[5] = 0
        for block in model.model.layers:
            block.post_attention_layernorm.weight[5] = 0
    scores = _calibrated(model, make_batches(), taylor).scores
    assert sorted(scores.neurons_MF[1].argsort()[:2].tolist()) == [3, 17]
    assert scores.heads_MGQ[1, 1].max() == 0 < scores.heads_MGQ[1, 0].min()
    assert int(scores.hidden_H.argmin()) == 5 or taylor  # the norms' mean square still reads it


def test_taylor_scores_are_absolute_values_by_sequence_of_the_labels_that_count(
    llama: PreTrainedModel, make_batches
) -> None:
    found = _calibrated(llama, make_batches(), taylor=True)
    layer, number = llama.model.layers[2], 11
    slopes = []
    for batch in make_batches(1):
        scale = torch.ones((), requires_grad=True)
        mask = torch.ones(40).index_put((torch.tensor([number]),), scale)
        handle = layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, m=mask: (inputs[0] * m,))
        logits = llama(input_ids=batch.input_ids_BL).logits[0, :, :VOCAB_SIZE]
        handle.remove()
        loss = cross_entropy(logits, batch.labels_BL[0])
        slopes.append(float(torch.autograd.grad(loss, scale)[0]))
    mean_of_sizes = sum(map(abs, slopes)) / len(slopes)
    assert float(found.scores.neurons_MF[2, number]) == pytest.approx(mean_of_sizes, rel=1e-4)  # float32
    assert abs(sum(slopes) / len(slopes)) < 0.9 * mean_of_sizes, "signs cancel: another score than that of the mean"
    assert found.loss is not None and 3 < found.loss < 20


def test_an_activation_score_is_the_norm_over_sequences_of_means_over_tokens(
    llama: PreTrainedModel, make_batches
) -> None:
    found = _calibrated(llama, make_batches(), taylor=False)
    layer, means = llama.model.layers[3], []
    for batch in make_batches(1):
        seen: list[torch.Tensor] = []
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs, s=seen: s.append(inputs[0]))
        with torch.no_grad():
            llama(input_ids=batch.input_ids_BL)
        handle.remove()
        means.append(seen[0][0, :, 16:24].norm(dim=-1).mean())
    expected = torch.stack(means).norm()
    assert float(found.scores.heads_MGQ[3, 1, 0]) == pytest.approx(float(expected), rel=1e-5)  # float32


def test_a_layer_that_does_nothing_has_the_least_influence_and_adds_no_loss(make_batches) -> None:
    model = prunable_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    influence_M = _calibrated(model, make_batches(), taylor=False).scores.layers_M
    assert int(influence_M.argmin()) == 2
    assert abs(float(influence_M[2])) < 1e-6 < float(influence_M.sort().values[1])
    risen_M = loss_without_each_layer(model, make_batches, VOCAB_SIZE)
    assert float(risen_M[2]) == 0
    assert all(abs(float(risen_M[layer])) > 1e-3 for layer in (0, 1, 3))


def test_the_first_and_the_last_layers_go_by_the_papers_rule(llama: PreTrainedModel) -> None:
    shape = shape_of(llama.config, "")
    for number, kept in ((4, [0, 1, 2, 3]), (3, [0, 1, 2]), (2, [1, 2]), (1, [1])):
        target = type(shape)(**{**vars(shape), "num_layers": number})
        assert choose(random_scores(shape, 0), target, "first_and_last").layers.tolist() == kept


def test_random_scores_are_a_pure_function_of_the_seed(llama: PreTrainedModel) -> None:
    shape = shape_of(llama.config, "")
    one, again, other = (random_scores(shape, seed) for seed in (1, 1, 2))
    assert torch.equal(one.hidden_H, again.hidden_H) and not torch.equal(one.hidden_H, other.hidden_H)


@pytest.mark.parametrize("taylor", [False, True])
def test_a_broken_teacher_is_refused(make_batches, taylor: bool) -> None:
    model = prunable_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="scores are not numbers"):
        _calibrated(model, make_batches(), taylor)
