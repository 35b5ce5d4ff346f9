"""Students cut out of their teachers: what a teacher cannot give, and how large the students are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, Qwen2Config

from capgap.pipeline.law.pruned import pruned_sizes, require_cuts
from capgap.pipeline.law.run import run_grid
from capgap.pipeline.law.sizes import sizes_of
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.law import LawModel
from capgap.schemas.law_grid import LawGrid

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
MIDDLE = {"hidden_size": 48, "num_layers": 2, "num_heads": 3, "intermediate_size": 96}
LARGE = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "intermediate_size": 128}
VOCAB_SIZE = 512


def grid(out: Path, student: dict[str, Any], **teachers: dict[str, Any]) -> LawGrid:
    return LawGrid.model_validate(
        {
            "name": "g",
            "out": str(out),
            "device": "cpu",
            "corpus": {"sources": ["builtin:python"], "vocab_size": VOCAB_SIZE},
            "teachers": teachers,
            "students": {"s": {"model": student}},
            "inits": ["common", "pruned"],
            "budgets": {"short": {"tokens": 1000}},
        }
    )


def given(folder: Path, **sizes: Any) -> dict[str, Any]:
    """A Qwen2 by its configuration: biases in the attention, and an embedding of its own number of rows."""
    config = Qwen2Config(
        **{
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "tie_word_embeddings": True,
            **sizes,
        }
    )
    config.save_pretrained(folder)
    return {"path": str(folder)}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": 64, "num_heads": 4}, r"hidden_size: .* no larger than its teacher; found 64, .* teacher's 48"),
        ({"num_layers": 3}, r"num_layers: .* found 3, expected at most the teacher's 2"),
        ({"num_heads": 4, "hidden_size": 48}, r"num_heads: .* found 4, expected at most the teacher's 3"),
        ({"num_heads": 1}, r"hidden_size / num_heads: pruning keeps the width of a head; found 32, .* teacher's 16"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads: .* 2 in each, .* lower students\.s\.model\.num_heads to 1"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings: .* found false, expected the teacher's true"),
        (MIDDLE, "all sizes: nothing is cut: the student has the teacher's shape"),
    ],
)
def test_a_shape_that_one_of_the_teachers_cannot_give_is_refused_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    asked = grid(tmp_path / "out", {**SMALL, **changes}, middle={"model": MIDDLE}, large={"model": LARGE})
    with pytest.raises(SettingError, match=rf"inits: pruned, students\.s from teachers\.middle, {said}") as refused:
        run_grid(asked)
    assert refused.value.fix and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_cannot_be_pruned_is_refused_by_its_name_in_the_grid(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"students\.s from teachers\.old, architecture: .* found gpt2"):
        require_cuts(grid(tmp_path, SMALL, old={"path": str(tmp_path / "gpt2")}))


def test_a_grid_without_pruned_students_may_have_any_teachers(tmp_path: Path) -> None:
    asked = grid(tmp_path, LARGE, small={"model": SMALL}).model_copy(update={"inits": ("common",)})
    require_cuts(asked)
    assert sizes_of(asked, VOCAB_SIZE).pruned == {}


def test_a_pruned_student_of_the_same_size_has_the_same_name(tmp_path: Path) -> None:
    sizes = sizes_of(grid(tmp_path, SMALL, middle={"model": MIDDLE}, large={"model": LARGE}), VOCAB_SIZE)
    assert sizes.pruned == sizes.students


def test_what_a_teacher_leaves_in_its_students_makes_them_others_by_size_and_name(tmp_path: Path) -> None:
    common = {"s": sizes_of(grid(tmp_path, SMALL, large={"model": LARGE}), VOCAB_SIZE).students["s"]}
    asked = grid(tmp_path, SMALL, q=given(tmp_path / "q", vocab_size=520), r=given(tmp_path / "r", vocab_size=520))
    filler, biases = 8 * 32, 3 * 32
    assert pruned_sizes(asked, common, VOCAB_SIZE)["s"] == LawModel(
        name="s (pruned)",
        num_parameters=common["s"].num_parameters + filler + biases,
        num_non_embedding_parameters=common["s"].num_non_embedding_parameters + biases,
    )


def test_a_teacher_s_new_vocabulary_is_counted_in_its_students(tmp_path: Path) -> None:
    common = {"s": LawModel(name="s", num_parameters=1, num_non_embedding_parameters=1)}
    q = given(tmp_path / "q", vocab_size=300)
    sizes = [
        pruned_sizes(grid(tmp_path, SMALL, q={**q, **adapt}), common, VOCAB_SIZE)["s"]
        for adapt in ({}, {"adapt": {}}, {"adapt": {"pad_to_multiple_of": 200}})
    ]
    rows = [(one.num_parameters - one.num_non_embedding_parameters) // 32 for one in sizes]
    assert rows == [300, 512, 600]


def test_teachers_that_leave_their_students_different_sizes_are_refused(tmp_path: Path) -> None:
    asked = grid(tmp_path, SMALL, l={"model": LARGE}, q=given(tmp_path / "q", vocab_size=512))
    common = {"s": LawModel(name="s", num_parameters=1, num_non_embedding_parameters=1)}
    with pytest.raises(SettingError, match=r"students\.s: cut to one shape, .* parameters from l, .* from q, expected"):
        pruned_sizes(asked, common, VOCAB_SIZE)
