"""What was imported is what a run file reuses: students train from it, and its teacher is the run's."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from tiny_models import save_model, tiny_llama
from transformers import LlamaForCausalLM

from capgap.jobs.cli import main
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.verify.rescore import rescore
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.graph import select
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.run_file import RunFile

MINIMAL = ("input_ids", "ids", "logprobs")
SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the captures' tokenizer; that it gave other logprobs is nothing that an import can know."""
    folder = tmp_path_factory.mktemp("model") / "model"
    narrow = tiny_llama(vocab_size=teacher.vocab_size, hidden_size=16, intermediate_size=16, max_position_embeddings=64)
    save_model(folder, narrow, load_tokenizer(teacher.tokenizer))
    return folder


def run_of(out: Path, made: Any, model: Path, **train: Any) -> RunFile:
    reused = {"corpus": made.corpus, "teacher": made.teacher, "cache": made.cache}
    return RunFile.model_validate(
        {
            "name": "reused",
            "out": str(out),
            "device": "cpu",
            "reuse": {name: str(at.path) for name, at in reused.items() if at is not None},
            "teacher": {"path": str(model)},
            "student": {"model": SHAPE},
            "train": {"batch_sequences": 4, "validate_every_steps": 4, **train},
            "arms": {"distilled": {"alpha": 1.0}, "online": {"alpha": 1.0, "targets": "online"}},
        }
    )


def test_a_student_trains_from_an_imported_cache(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    settings = settings_for(write(teacher.rows, columns=MINIMAL), teacher=str(model))
    made = import_captures(settings)
    run = run_of(tmp_path / "run", made, model, num_epochs=6, learning_rate=0.01)
    carry_out(run, Instance("student", seed=0))
    trained = carry_out(run, *select(run, "train/distilled"))
    with (tmp_path / "run" / "train" / "distilled" / "seed-0" / "metrics.csv").open() as file:
        kl = [float(row["heldout_kl"]) for row in csv.DictReader(file) if row["heldout_kl"]]
    assert kl[-1] < kl[0], "the student comes nearer to the imported targets of text that it does not see"
    assert trained.inputs["cache"].identity == made.cache.manifest.identity


def test_the_run_s_own_teacher_stage_is_the_imported_cache_s_teacher(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    made = import_captures(settings_for(write(teacher.rows, columns=MINIMAL), teacher=str(model)))
    assert made.teacher is not None
    run = run_of(tmp_path / "run", made, model)
    own = run.model_copy(update={"reuse": {name: at for name, at in run.reuse.items() if name != "teacher"}})
    manifest = carry_out(own, Instance("teacher"))
    assert manifest.identity == made.cache.manifest.inputs["teacher"].identity
    assert manifest.facts == made.teacher.manifest.facts
    assert states(own)["teacher"].state is State.CURRENT


def test_a_teacher_of_another_tokenizer_is_refused(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tokenizer = load_tokenizer(teacher.tokenizer)
    tokenizer.add_tokens(["<more>"])
    LlamaForCausalLM.from_pretrained(model).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(MismatchError, match=r"its tokenizer differs from that of the corpus.*<more>"):
        import_captures(settings_for(write(teacher.rows, columns=MINIMAL), teacher=str(other)))


def test_an_imported_cache_is_not_scored_again(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    made = import_captures(settings_for(write(teacher.rows, columns=MINIMAL)))
    with pytest.raises(InputError, match="an imported cache cannot be scored again"):
        list(rescore(made.cache.path, 0.1, device="cpu"))


def test_the_commands_import_and_export(
    teacher: Any, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captures, heldout = write(teacher.rows[10:], "a.parquet", MINIMAL), write(teacher.rows[:10], "b.parquet", MINIMAL)
    out, tokenizer = tmp_path / "made", str(teacher.tokenizer)
    common = ["--tokenizer", tokenizer, "--teacher", "someone/teacher"]
    assert main(["import", str(captures), "--heldout", str(heldout), *common, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    shown = yaml.safe_load(said[said.index("reuse:") :])
    assert shown == {"reuse": {"corpus": str(out / "corpus"), "cache": str(out / "cache")}}
    assert main(["export", str(out / "cache"), "--to", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "topk" / "heldout-000000.parquet").is_file()
    assert main(["import", str(captures), *common, "--out", str(out), "--offset", "-1"]) == 2
    assert main(["import", str(captures), *common, "--out", str(out), "--format", "distillkit", "--offset", "-1"]) == 2


def test_the_sources_of_an_imported_teacher_are_those_of_the_teacher_stage(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(model, tmp_path / "given"))
    (given / "train.log").write_text("no part of the model")
    (given / "parts").mkdir()
    (given / "model.safetensors").rename(given / "parts" / "model.safetensors")
    with safe_open(given / "parts" / "model.safetensors", "pt") as weights:
        weight_map = dict.fromkeys(weights.keys(), "parts/model.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (given / "model.safetensors.index.json").write_text(json.dumps(index))
    made = import_captures(settings_for(write(teacher.rows, columns=MINIMAL), teacher=str(given)))
    assert made.teacher is not None
    names = {str(Path(source.path).relative_to(given)) for source in made.teacher.manifest.sources}
    assert {"parts/model.safetensors", "config.json"} < names and "train.log" not in names
