"""A pruned model is made of its teacher's weights and nothing else, and is a plain Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PRUNED_SEQ_LEN as SEQ_LEN
from tiny_models import PRUNED_VOCAB_SIZE as VOCAB_SIZE
from tiny_models import prunable_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.pipeline.student.calibrate import calibrate, norms_of
from capgap.pipeline.student.cut import cut
from capgap.pipeline.student.hooks import after, around, before
from capgap.pipeline.student.kept import KeptParts, choose, random_scores
from capgap.pipeline.student.shapes import Shape, shape_of
from capgap.schemas.errors import InputError

IDS = torch.arange(2 * SEQ_LEN).reshape(2, SEQ_LEN) * 7 % VOCAB_SIZE


def _kept(shape: Shape, **sizes: int) -> tuple[Shape, KeptParts]:
    target = replace(shape, **sizes)
    return target, choose(random_scores(shape, 3), target, "random")


def _energy_in(shape: Shape, kept: KeptParts) -> torch.Tensor:
    """As if nothing were in the channels that go."""
    energy_NH = torch.zeros(2 * shape.num_layers + 1, shape.hidden_size, dtype=torch.float64)
    energy_NH[:, kept.hidden] = 1 / len(kept.hidden)
    return energy_NH


def _only(indices: torch.Tensor, size: int, width: int = 1) -> Any:
    """Sets all channels but these to zero."""
    mask = torch.zeros(size).index_fill(0, indices, 1).repeat_interleave(width)
    return lambda values: values * mask


@torch.no_grad()
def _masked_logits(teacher: PreTrainedModel, shape: Shape, kept: KeptParts) -> torch.Tensor:
    """The teacher's with what goes made nothing where it stands."""
    layers: list[nn.Module] = list(teacher.get_decoder().layers)
    hidden = _only(kept.hidden, shape.hidden_size)
    with ExitStack() as hooks:
        hooks.enter_context(after(teacher.get_input_embeddings(), hidden, replace=True))
        for number, layer in enumerate(layers):
            if number not in kept.layers:
                hooks.enter_context(around(layer, lambda given, _: given))
                continue
            place = kept.layers.tolist().index(number)
            heads = _only(kept.heads[place], shape.num_heads, shape.head_dim)
            neurons = _only(kept.neurons[place], shape.intermediate_size)
            hooks.enter_context(before(layer.self_attn.o_proj, heads, replace=True))
            hooks.enter_context(before(layer.mlp.down_proj, neurons, replace=True))
            for write in (layer.self_attn.o_proj, layer.mlp.down_proj):
                hooks.enter_context(after(write, hidden, replace=True))
        return teacher(input_ids=IDS).logits


@pytest.fixture
def sizes(teacher: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Half and more of every axis; the heads of a Qwen2 with windows must stay hidden_size / num_heads wide."""
    width = 16 if getattr(teacher.config, "use_sliding_window", False) else 20
    yield {
        "num_layers": 3,
        "hidden_size": width,
        "num_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 28,
    }


def test_the_full_shape_is_the_teacher_to_the_bit(teacher: PreTrainedModel) -> None:
    shape = shape_of(teacher.config, "")
    target, kept = _kept(shape)
    energy_NH = torch.rand(2 * shape.num_layers + 1, shape.hidden_size, dtype=torch.float64)
    student = cut(teacher, target, kept, energy_NH)
    before, after = teacher.state_dict(), student.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    without = ("_name_or_path", "transformers_version", "architectures", "dtype", "head_dim")
    there, here = ({k: v for k, v in m.config.to_dict().items() if k not in without} for m in (teacher, student))
    assert there == here


def test_a_pruned_model_computes_what_its_teacher_does_without_what_went(
    teacher: PreTrainedModel, sizes: dict[str, int]
) -> None:
    shape = shape_of(teacher.config, "")
    target, kept = _kept(shape, **sizes)
    student = cut(teacher, target, kept, _energy_in(shape, kept))
    with torch.no_grad():
        found = student(input_ids=IDS).logits
    expected = _masked_logits(teacher, shape, kept)
    # sums of fewer terms in another order, and an epsilon of 1e-6 beside another mean square
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    assert float(expected.std()) > 0.1


def test_query_heads_go_from_every_group_alike(llama: PreTrainedModel) -> None:
    shape = shape_of(llama.config, "")
    target, kept = _kept(shape, num_heads=2)
    assert [part.tolist() for part in kept.groups] == [[0, 1]] * 4
    assert all(sorted(head // 2 for head in part.tolist()) == [0, 1] for part in kept.heads)
    student = cut(llama, target, kept, _energy_in(shape, kept))
    with torch.no_grad():
        found, expected = student(input_ids=IDS).logits, _masked_logits(llama, shape, kept)
    # sums of fewer terms in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_one_is_opened_by_transformers_as_it_is(
    teacher: PreTrainedModel, sizes: dict[str, int], tmp_path: Path
) -> None:
    shape = shape_of(teacher.config, "")
    target, kept = _kept(shape, **sizes)
    student = cut(teacher, target, kept, _energy_in(shape, kept))
    student.save_pretrained(tmp_path)
    opened, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    with torch.no_grad():
        assert torch.equal(opened(input_ids=IDS).logits, student(input_ids=IDS).logits)
    assert shape_of(opened.config, "") == target
    tied = opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings
    assert opened.config.rope_parameters == teacher.config.rope_parameters
    kinds = getattr(teacher.config, "layer_types", None)
    if kinds is not None and opened.config.model_type == teacher.config.model_type:
        assert opened.config.layer_types == [kinds[layer] for layer in kept.layers]
    if getattr(teacher.config, "use_sliding_window", False):
        assert opened.config.max_window_layers == sum(layer < 1 for layer in kept.layers.tolist())


def test_norms_give_what_stays_the_mean_square_that_it_had(llama: PreTrainedModel, make_batches) -> None:
    shape = shape_of(llama.config, "")
    target, kept = _kept(shape, hidden_size=12)
    energy_NH = calibrate(llama, shape, make_batches(), VOCAB_SIZE, taylor=False).energy_NH
    student = cut(llama, target, kept, energy_NH)
    squares: list[list[torch.Tensor]] = [[] for _ in norms_of(llama)]
    with torch.no_grad(), ExitStack() as hooks:
        for seen, norm in zip(squares, norms_of(llama), strict=True):
            hooks.enter_context(after(norm, lambda out, s=seen, n=norm: s.append((out / n.weight).square())))
        for batch in make_batches():
            llama(input_ids=batch.input_ids_BL)
    for seen, old, new in zip(squares, norms_of(llama), norms_of(student), strict=True):
        mean_square = torch.cat(seen)[..., kept.hidden].mean()
        factors = new.weight / old.weight[kept.hidden]
        # float32, and an epsilon of 1e-6 beside a mean square of about a tenth and more
        torch.testing.assert_close(factors, mean_square.sqrt().expand(12), rtol=1e-3, atol=0)


def test_half_precision_is_kept(llama: PreTrainedModel) -> None:
    teacher = prunable_model("llama").to(torch.bfloat16)
    shape = shape_of(llama.config, "")
    target, kept = _kept(shape, hidden_size=16)
    student = cut(teacher, target, kept, _energy_in(shape, kept))
    assert {weight.dtype for weight in student.state_dict().values()} == {torch.bfloat16}
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, kept.hidden])


def test_a_qwen2_with_windows_is_refused_where_its_heads_would_no_longer_divide_its_width() -> None:
    teacher = prunable_model("qwen2 with windows")
    shape = shape_of(teacher.config, "")
    target, kept = _kept(shape, hidden_size=24)
    with pytest.raises(InputError, match=r"sliding window, 4 heads of 8, expected 3 heads for a width of 24") as e:
        cut(teacher, target, kept, _energy_in(shape, kept))
    assert "set student.prune.hidden_size to 8 x student.prune.num_heads" in str(e.value)
