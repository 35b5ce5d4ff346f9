"""The student's first weights: fresh from a seed, or those of a given model, unchanged."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.context import Instance
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_fresh_weights_differ_by_seed_and_by_nothing_else(make_corpus_run) -> None:
    run = RunFile.model_validate({**make_corpus_run().model_dump(), "student": {"model": SHAPE}, "seeds": [0, 1]})
    carry_out(run, Instance("corpus"))
    first, second = (carry_out(run, Instance("student", seed=seed)) for seed in (0, 1))
    again = carry_out(run, Instance("student", seed=0), force=True)
    assert first.content == again.content != second.content
    assert first.facts["num_parameters"] == second.facts["num_parameters"]


def test_a_given_model_s_weights_arrive_unchanged_with_the_corpus_s_tokenizer(make_corpus_run, tmp_path: Path) -> None:
    made = RunFile.model_validate({**make_corpus_run().model_dump(), "student": {"model": SHAPE}})
    carry_out(made, Instance("corpus"))
    carry_out(made, Instance("student", seed=0))
    source = (Path(made.out) / "student" / "seed-0" / "model").rename(tmp_path / "given")
    given = RunFile.model_validate({**made.model_dump(), "student": {"path": str(source)}})
    manifest = carry_out(given, Instance("student", seed=0), force=True)
    folder = Path(given.out) / "student" / "seed-0" / "model"
    before, after = _weights(source), _weights(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert {Path(entry.path).name for entry in manifest.sources} >= {"model.safetensors", "config.json"}
