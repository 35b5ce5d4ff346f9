"""A small teacher is trained on the teacher's text alone, and its folder is a model that others can load."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.context import Instance
from capgap.schemas.errors import InputError
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
