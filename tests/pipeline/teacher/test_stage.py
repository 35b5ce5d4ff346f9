"""A small teacher is trained on the teacher's text alone, and its folder is a model that others can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import settings_of
from transformers import AutoModelForCausalLM

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def _with_teacher(run: RunFile, **training: object) -> RunFile:
    return RunFile.model_validate({**run.model_dump(), "teacher": {"model": SHAPE, "training": training}})


def test_a_teacher_learns_and_its_folder_loads(make_corpus_run) -> None:
    run = _with_teacher(make_corpus_run(), max_tokens=5000, validate_every_steps=1, batch_sequences=4)
    corpus = carry_out(run, Instance("corpus"))
    manifest = carry_out(run, Instance("teacher"))
    facts = ModelFacts.model_validate(manifest.facts)
    model = AutoModelForCausalLM.from_pretrained(Path(run.out) / "teacher" / "model")
    assert sum(p.numel() for p in model.parameters()) == facts.num_parameters == manifest.totals["num_parameters"]
    assert model.config.vocab_size == facts.tokenizer.vocab_size == 400
    assert manifest.totals["num_tokens"] == 39 * 4 * 32, "as many whole steps as max_tokens holds"
    assert corpus.shard_sets["teacher"].num_tokens > 5000
    rows = (Path(run.out) / "teacher" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("validation_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < losses[0] - 0.1


def test_two_trainings_of_one_recipe_end_in_the_same_weights(make_corpus_run) -> None:
    contents = []
    for out in ("one", "two"):
        run = _with_teacher(make_corpus_run(out), max_tokens=1024, batch_sequences=4)
        carry_out(run, Instance("corpus"))
        contents.append(carry_out(run, Instance("teacher")).content)
    assert contents[0] == contents[1]


def test_a_corpus_that_keeps_no_text_for_the_teacher_is_an_error(make_corpus_run) -> None:
    run = _with_teacher(make_corpus_run(teacher_fraction=0.0))
    carry_out(run, Instance("corpus"))
    with pytest.raises(InputError, match=r"corpus\.teacher_fraction: the corpus keeps no text for a teacher"):
        carry_out(run, Instance("teacher"))


TRAINED = {"max_tokens": 2048, "batch_sequences": 4, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> dict[str, Any]:
    """A run with a given teacher, whose corpus has more pieces than it."""
    run = settings_of(tmp_path_factory.mktemp("adapted") / "run", "number")
    run["corpus"] |= {"teacher_fraction": 0.5, "extend_vocabulary": {"num_pieces": 20}}
    carry_out(RunFile.model_validate(run), Instance("corpus"))
    return run


def _adapted(run: dict[str, Any], **adapt: Any) -> RunFile:
    return RunFile.model_validate(run | {"teacher": run["teacher"] | {"adapt": TRAINED | adapt}})


def test_an_adapted_teacher_has_the_extended_vocabulary_and_learns_its_text(extended: dict[str, Any]) -> None:
    run = _adapted(extended, validate_every_steps=1)
    manifest = carry_out(run, Instance("teacher"))
    facts = ModelFacts.model_validate(manifest.facts)
    given = AutoModelForCausalLM.from_pretrained(extended["teacher"]["path"])
    model = AutoModelForCausalLM.from_pretrained(Path(run.out) / "teacher" / "model")
    assert manifest.totals["num_new_pieces"] == 20
    assert facts.tokenizer.vocab_size == 300 + 20 and facts.path == "model"
    assert model.config.vocab_size == facts.padded_vocab_size == given.config.vocab_size, "its padding took them in"
    rows = (Path(run.out) / "teacher" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("validation_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < losses[0] - 0.1
    assert {Path(entry.path).name for entry in manifest.sources} >= {"model.safetensors", "tokenizer.json"}


def test_rows_are_filled_up_where_that_is_asked(extended: dict[str, Any]) -> None:
    run = _adapted(extended, max_tokens=128, pad_to_multiple_of=128)
    facts = ModelFacts.model_validate(carry_out(run, Instance("teacher"), remake=True).facts)
    assert (facts.padded_vocab_size, facts.tokenizer.vocab_size) == (384, 320)


def test_an_extended_vocabulary_is_refused_for_a_teacher_that_is_not_adapted(extended: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="its tokenizer differs from that of the corpus"):
        carry_out(RunFile.model_validate(extended), Instance("teacher"), remake=True)


def test_a_tokenizer_that_the_corpus_does_not_extend_is_refused(extended: dict[str, Any], tmp_path: Path) -> None:
    other = settings_of(tmp_path / "run", "quite another text")
    run = _adapted(extended | {"teacher": other["teacher"]})
    with pytest.raises(MismatchError, match="the tokenizer of the corpus does not extend this one; found id of"):
        carry_out(run, Instance("teacher"), remake=True)


def test_a_teacher_is_corrected_on_the_corpus_without_new_pieces(make_corpus_run, tmp_path: Path) -> None:
    run = settings_of(tmp_path / "run", "number")
    run["corpus"] |= {"teacher_fraction": 0.5}
    carry_out(RunFile.model_validate(run), Instance("corpus"))
    manifest = carry_out(_adapted(run, max_tokens=256), Instance("teacher"))
    assert manifest.totals["num_new_pieces"] == 0 and manifest.totals["num_tokens"] == 256
    assert ModelFacts.model_validate(manifest.facts).path == "model"


def test_adapting_needs_text_for_the_teacher(tmp_path: Path) -> None:
    run = settings_of(tmp_path / "run", "number")
    carry_out(RunFile.model_validate(run), Instance("corpus"))
    with pytest.raises(
        InputError, match=r"keeps no text for a teacher .* found 0\.0, expected more than 0 with teacher\.adapt"
    ):
        carry_out(_adapted(run), Instance("teacher"))
