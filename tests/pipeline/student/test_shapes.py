from __future__ import annotations

import pytest
from transformers import GPT2Config, Qwen2Config

from capgap.pipeline.student.shapes import Shape, shape_of, target_shape
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_prune import PruneSettings

TEACHER = Shape(num_layers=4, hidden_size=32, num_heads=8, num_key_value_heads=2, intermediate_size=40, head_dim=4)


def _target(**sizes: int) -> Shape:
    return target_shape(TEACHER, PruneSettings(**sizes))


def test_what_is_left_out_is_the_teachers() -> None:
    assert _target() == TEACHER
    target = _target(num_layers=2, num_heads=6)
    assert (target.num_layers, target.num_heads, target.num_key_value_heads) == (2, 6, 2)
    assert (target.hidden_size, target.intermediate_size, target.head_dim) == (32, 40, 4)


def test_a_width_of_heads_that_the_configuration_only_implies_is_kept() -> None:
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert shape_of(config, "here").head_dim == 16


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_layers": 5}, r"student\.prune\.num_layers: a pruned student is no larger .* found 5, .* teacher's 4"),
        ({"hidden_size": 33}, r"student\.prune\.hidden_size: .* found 33"),
        ({"intermediate_size": 41}, r"student\.prune\.intermediate_size: .* found 41"),
        ({"num_heads": 9}, r"student\.prune\.num_heads: .* found 9"),
        ({"num_heads": 5}, r"num_heads: query heads do not divide .* found 5 with num_key_value_heads = 2, the teach"),
        ({"num_heads": 8, "num_key_value_heads": 1}, r"8 query heads in 1 groups: 8 in each, expected at most .* 4"),
        ({"num_key_value_heads": 1}, r"teacher's 4; lower student\.prune\.num_heads to 4"),
    ],
)
def test_a_shape_that_the_teacher_cannot_give_is_refused_in_one_line(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(SettingError, match=words) as refused:
        _target(**sizes)
    assert "\n" not in str(refused.value)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"a/folder: .* found gpt2, expected llama, mistral, qwen2 or qwen3"):
        shape_of(GPT2Config(), "a/folder")
