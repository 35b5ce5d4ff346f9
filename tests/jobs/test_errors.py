"""The most common mistakes of a run file, and what is said of each: the whole line, and the exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from capgap.jobs.cli import main

Said = Callable[..., str]

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
# the order of a person, so that a line's number means something
GOOD: dict[str, Any] = {
    "name": "small",
    "out": "out",
    "device": "cpu",
    "corpus": {"sources": ["text.txt"], "vocab_size": 300, "seq_len": 16},
    "teacher": {"model": dict(SHAPE)},
    "cache": {"engine": "transformers"},
    "student": {"model": dict(SHAPE)},
    "train": {"alpha": 1.0},
}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


# name: (run file, its line)
PARSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "a misspelt setting": (
        GOOD | {"train": {"learning_rat": 1e-3}},
        "run.yaml, line 24: train.learning_rat: no such setting; found 0.001; did you mean learning_rate?",
    ),
    "a setting at the wrong level": (
        GOOD | {"alpha": 1},
        "run.yaml, line 25: alpha: no such setting; found 1; did you mean train.alpha or tune.alpha "
        "or tune.lora.alpha?",
    ),
    "a misspelt group": (
        GOOD | {"studnet": {}},
        "run.yaml, line 25: studnet: no such setting; found {}; did you mean student?",
    ),
    "a misspelt setting of an arm": (
        GOOD | {"arms": {"distilled": {"alfa": 1}}},
        "run.yaml, line 27: arms.distilled.alfa: no such setting; found 1; did you mean alpha?",
    ),
    "a word for a number": (
        GOOD | {"train": {"batch_sequences": "many"}},
        "run.yaml, line 24: train.batch_sequences: cannot be used; found many, expected an integer",
    ),
    "a number out of its bounds": (
        GOOD | {"train": {"alpha": 1.5}},
        "run.yaml, line 24: train.alpha: cannot be used; found 1.5, expected at most 1",
    ),
    "a word that is no choice": (
        GOOD | {"device": "gpu"},
        "run.yaml, line 3: device: cannot be used; found gpu, expected one of auto, cpu or cuda",
    ),
    "a value for a list": (
        GOOD | {"corpus": {"sources": "text.txt"}},
        "run.yaml, line 5: corpus.sources: cannot be used; found text.txt, expected a list; write [text.txt]",
    ),
    "a model's name for its settings": (
        GOOD | {"teacher": "org/model"},
        "run.yaml, line 9: teacher: cannot be used; found org/model, expected settings by name; "
        "write {path: org/model}",
    ),
    "no name": (without("name"), "run.yaml: name: is missing; write `name: ...` into the file, or --name ..."),
    "a teacher of nothing": (
        GOOD | {"teacher": {}},
        "run.yaml, line 9: teacher: found none of path, model and served, expected one of them",
    ),
    "fractions that leave nothing": (
        GOOD | {"corpus": {"teacher_fraction": 0.9, "heldout_fraction": 0.3}},
        "run.yaml, line 5: corpus.teacher_fraction + corpus.heldout_fraction: found 1.2, expected less than 1; "
        "nothing is left for the student",
    ),
    "settings that contradict": (
        GOOD | {"cache": {"recording": "topk", "num_samples": 50}},
        "run.yaml, line 17: cache.num_samples: found with recording topk, expected sampled; use cache.top_k",
    ),
    "a micro-batch that does not divide": (
        GOOD | {"train": {"batch_sequences": 8, "micro_batch_sequences": 3}},
        "run.yaml, line 25: train.micro_batch_sequences: found 3, expected a divisor of batch_sequences = 8",
    ),
    "seeds that are equal": (
        GOOD | {"seeds": [0, 0]},
        "run.yaml, line 25: seeds: found [0, 0], expected at least one, none twice, none negative",
    ),
    "an arm that is no folder's name": (
        GOOD | {"arms": {"a/b": {}}},
        "run.yaml, line 1: name, arms: found 'a/b', expected a folder's name: letters, digits, '-', '_' and '.'",
    ),
    "a setting twice": (
        "name: small\nout: out\ntrain:\n  alpha: 1\n  alpha: 0\n",
        "run.yaml, line 5: train.alpha: stands twice; found line 4 before, expected each setting once; "
        "take one of them out",
    ),
    "a tab": (
        "name: small\ncorpus:\n\tseq_len: 16\n",
        "run.yaml, line 3, column 1: not a YAML file; found character '\\t' that cannot start any token, expected "
        "YAML; indent with spaces; YAML takes no tabs",
    ),
    "a colon within a value": (
        "name: small: one\n",
        "run.yaml, line 1, column 12: not a YAML file; found mapping values are not allowed here, expected YAML",
    ),
    "an empty file": (
        "",
        "run.yaml: not a run file; found nothing, expected settings by name; `capgap init` writes one, and `capgap ls` "
        "lists examples",
    ),
    "a run that is not there to be reused": (
        GOOD | {"reuse": {"corpus": "other/corpus"}},
        "reuse.corpus: other/corpus: cannot be reused; found no manifest.json, expected the folder of a finished "
        "corpus stage",
    ),
}


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """The last line that a command says of a run file, in a folder of its own with one small text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("a few words that nobody reads twice\n" * 50)

    def of(run: dict[str, Any] | str | bytes, *command: str, code: int = 2) -> str:
        text = yaml.safe_dump(run, sort_keys=False) if isinstance(run, dict) else run
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        first, *more = command or ("status",)
        capsys.readouterr()
        assert main([first, "run.yaml", *more]) == code
        *before, last = capsys.readouterr().err.splitlines()
        assert not any(line.startswith(("capgap: ", "Traceback")) for line in before)
        return last

    return of


@pytest.mark.parametrize("name", PARSED)
def test_a_run_file_is_refused_with_what_where_found_expected_and_what_to_do(name: str, said: Said) -> None:
    run, line = PARSED[name]
    assert said(run) == f"capgap: {line}"


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(said: Said) -> None:
    line = said("name: caf\xe9\n".encode("latin-1"))
    assert line == "capgap: run.yaml, byte 9: not UTF-8; found 0xe9, expected text in UTF-8; save it as UTF-8"


def test_no_run_file_where_one_is_named(said: Said, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "nowhere.yaml"]) == 2
    line = "capgap: nowhere.yaml: no such run file; `capgap init` writes one, and `capgap ls` lists examples\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--train.learning_rat", "1e-3"],
            "--train.learning_rat: no such setting; found 1e-3; did you mean --train.learning_rate?",
        ),
        (["--train.alpha", "x"], "--train.alpha: cannot be used; found x, expected a number"),
        (["--train.alpha", "7"], "--train.alpha: cannot be used; found 7, expected at most 1"),
        (
            ["--train.learning_rate", "inf"],
            "--train.learning_rate: cannot be used; found inf, expected a number that is finite",
        ),
        (["--seeds", "3"], "--seeds: cannot be used; found 3, expected a list; write [3]"),
        (["--device", "gpu"], "--device: cannot be used; found gpu, expected one of auto, cpu or cuda"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_flag_is_refused_as_a_setting_is(flags: list[str], line: str, said: Said) -> None:
    assert said(GOOD, "status", *flags) == f"capgap: {line}"


def test_a_source_that_is_not_there(said: Said, tmp_path: Path) -> None:
    line = said(GOOD | {"corpus": {"sources": ["texts/*.txt"]}}, "corpus")
    assert line == (
        "capgap: corpus.sources: texts/*.txt: no text found; found nothing, expected at least one matching file; "
        f"check the path, from {tmp_path}"
    )


def test_a_record_without_its_text(said: Said) -> None:
    Path("a.jsonl").write_text('{"content": "words"}\n')
    line = said(GOOD | {"corpus": {"sources": ["a.jsonl"]}}, "corpus")
    assert line == (
        "capgap: corpus.sources: a.jsonl:1: no text in field 'text'; found fields content, expected a string in "
        "'text'; set corpus.text_field"
    )


def test_too_little_text(said: Said) -> None:
    line = said(GOOD | {"corpus": {"sources": ["text.txt"], "vocab_size": 300, "seq_len": 4096}}, "corpus")
    assert line.startswith("capgap: corpus: no whole sequence for the split ") and line.endswith(
        "0 too long, expected at least 4097 tokens; give more text, lower corpus.seq_len, or give teacher a larger "
        "share"
    )


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"train": {"max_tokens": 100}}, "train.max_tokens of arm distilled"),
        (
            {"arms": {"long": {}, "short": {"max_tokens": 100}, "none": {"max_tokens": 0}}},
            "train.max_tokens of arm short",
        ),
        ({"teacher": {"model": SHAPE, "training": {"max_tokens": 100}}}, "teacher.training.max_tokens"),
    ],
)
def test_a_training_of_less_than_a_step_is_refused_before_anything_is_made(
    changed: dict[str, Any], where: str, said: Said
) -> None:
    assert said(GOOD | changed, "run") == (
        f"capgap: {where}: fewer tokens than one step of training; found 100, expected at least 128, the targets of "
        "8 sequences of 16; raise it, or lower batch_sequences or corpus.seq_len"
    )
    assert not Path("out/corpus").exists()


def test_a_tokenizer_that_is_not_on_this_machine(said: Said) -> None:
    given = {"sources": ["text.txt"], "tokenizer": "org/model"}
    assert said(GOOD | {"corpus": given}, "corpus") == (
        "capgap: org/model: no such folder, and nothing is downloaded while HF_HUB_OFFLINE is set; expected a folder, "
        "or an id that was downloaded before; download it first with `hf download org/model`, or name a folder"
    )
    assert said(GOOD | {"corpus": given | {"tokenizer": "models/teacher/"}}, "corpus") == (
        "capgap: models/teacher/: no tokenizer can be found; found no such folder, expected a Hugging Face folder with "
        f"tokenizer.json, or an id that can be downloaded; check the path, from {Path.cwd()}"
    )


def test_an_output_that_is_no_folder(said: Said, tmp_path: Path) -> None:
    line = said(GOOD | {"out": "text.txt"}, "corpus")
    assert line == (
        "capgap: out: no folder can be made there; found text.txt/corpus: Not a directory, expected a folder, or a "
        "place for one; choose another `out`"
    )


def test_a_stage_whose_input_was_never_made(said: Said) -> None:
    assert said(GOOD, "teacher") == (
        "capgap: teacher: needs corpus; found missing (never made), expected current; "
        "run `capgap run RUN.yaml --from corpus`, or `capgap corpus --config RUN.yaml` first"
    )


def test_a_setting_that_is_mended_after_the_first_attempt_needs_no_force(said: Said, tmp_path: Path) -> None:
    """The folder was begun under another setting, and nothing came of it."""
    said(GOOD | {"corpus": {"sources": ["texts/*.txt"]}}, "corpus")
    words = " ".join(f"word{number} and another" for number in range(400))
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} {words}")
    last = said(GOOD | {"corpus": GOOD["corpus"] | {"sources": ["*.txt"]}}, "corpus", code=0)
    assert last.startswith("corpus: done in ")


def test_what_only_the_finished_corpus_shows(run_file: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is not there, a device that is not there, a logger that is none."""
    run = yaml.safe_load(run_file.read_text())
    nowhere = {"path": "/nowhere/model"}
    assert said(run | {"teacher": nowhere}, "teacher") == (
        "capgap: teacher.path: /nowhere/model: no model can be found; found no such folder, expected a Hugging Face "
        "folder with config.json, or an id that can be downloaded; check the path"
    )
    assert said(run | {"student": nowhere}, "student") == (
        "capgap: student.path: /nowhere/model: no model can be found; found no such folder, expected a Hugging Face "
        "folder with config.json, or an id that can be downloaded; check the path"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert said(run | {"device": "cuda"}, "teacher", code=3) == (
        "capgap: device: no GPU can be used; found cuda; set device to cpu or auto"
    )
    training = run["teacher"] | {"training": {"loggers": ["tensorbord"]}}
    assert said(run | {"teacher": training}, "teacher") == (
        "capgap: train.loggers: no such logger; found tensorbord, expected one of tensorboard, csv, wandb, mlflow, or "
        "the path of a class, as in lightning.pytorch.loggers.CometLogger"
    )
