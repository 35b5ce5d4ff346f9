"""What a newcomer gets wrong: one clear line, an exit code, and nothing that a rerun takes for finished."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import CAPGAP, TINY, capgap
from tiny_models import save_model, tiny_llama
from transformers import AutoTokenizer

from capgap.jobs.cli import main

TEXT = "the quick brown fox jumps over the lazy dog, again and again and never twice alike. "


class Run:
    """A run file to spoil, and what `capgap` says of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out = folder, folder / "out"
        self.settings = yaml.safe_load(TINY.read_text()) | {"out": str(self.out)}
        self._capsys = capsys

    def source(self, name: str, data: bytes | str) -> Path:
        """Write a text file and make it the only source of the corpus."""
        path = self.folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        self.settings["corpus"]["sources"] = [str(path)]
        return path

    def refused(self, *arguments: str, stage: str = "corpus") -> str:
        """The one line that is printed; the stage is not finished after it."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        self._capsys.readouterr()
        assert main([stage, str(path), *arguments]) == 2
        lines = [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("capgap: ")]
        assert len(lines) == 1
        assert not (self.out / stage / "manifest.json").exists()
        return lines[0]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, capsys)


def test_an_unknown_setting_is_named(run: Run) -> None:
    run.settings["train"]["learning_rat"] = 1e-3
    assert "learning_rat" in run.refused()


def test_an_unknown_flag_is_named(run: Run) -> None:
    line = run.refused("--train.learning_rat", "1e-3")
    assert "--train.learning_rat: no such setting; found 1e-3; did you mean --train.learning_rate?" in line


def test_a_setting_of_the_wrong_type_is_named_with_what_was_found(run: Run) -> None:
    run.settings["train"]["batch_sequences"] = "many"
    line = run.refused()
    assert "train.batch_sequences" in line and "many" in line and "integer" in line


def test_a_flag_out_of_bounds_is_named_with_its_bound(run: Run) -> None:
    line = run.refused("--train.alpha", "7")
    assert "train.alpha" in line and "at most 1" in line and "7" in line


def test_an_optional_setting_of_the_wrong_kind_is_named_with_what_it_takes(run: Run) -> None:
    line = run.refused("--corpus.vocab_size", "many")
    assert line == "capgap: --corpus.vocab_size: cannot be used; found many, expected an integer"


def test_a_missing_setting_is_named(run: Run) -> None:
    del run.settings["student"]
    assert "student" in run.refused()


def test_contradicting_settings_are_both_named(run: Run) -> None:
    line = run.refused("--cache.recording", "topk", "--cache.num_samples", "3")
    assert "cache.num_samples" in line and "topk" in line and "cache.top_k" in line


def test_an_arm_with_an_unknown_setting_is_named(run: Run) -> None:
    run.settings["arms"]["distilled"] = {"alfa": 1}
    assert "arms.distilled.alfa: no such setting; found 1; did you mean alpha?" in run.refused()


def test_a_missing_run_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such run file" in capsys.readouterr().err


def test_a_run_file_that_is_no_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: [unclosed\n")
    assert main(["run", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_an_unknown_command_and_an_unknown_stage_are_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runn"]) == 2
    assert "runn" in capsys.readouterr().err
    assert "found trian" in run.refused("--only", "trian", stage="run")


def test_a_missing_source_is_named(run: Run) -> None:
    run.settings["corpus"]["sources"] = [str(run.folder / "absent.txt")]
    assert "absent.txt" in run.refused()


def test_an_empty_corpus_is_an_error(run: Run) -> None:
    run.source("empty.txt", " \n")
    assert "the corpus is empty" in run.refused()


def test_invalid_utf8_is_named_with_file_and_byte(run: Run) -> None:
    run.source("latin.txt", b"caf\xe9 au lait")
    line = run.refused()
    assert "latin.txt, byte 3" in line and "0xe9" in line


def test_a_document_longer_than_a_sequence_is_refused_where_the_run_file_says_so(run: Run) -> None:
    path = run.source("long.txt", TEXT * 200)
    line = run.refused("--corpus.long_documents", "refuse")
    assert str(path) in line and "at most 65" in line and "corpus.seq_len" in line


def test_a_teacher_of_another_tokenizer_is_refused_with_the_first_differing_entry(run: Run, finished: Path) -> None:
    shutil.copytree(finished / "corpus", run.out / "corpus")
    teacher = Path(shutil.copytree(finished / "teacher" / "model", run.folder / "teacher"))
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=lambda token: vocab[token])[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    run.settings["teacher"] = {"path": str(teacher)}
    line = run.refused(stage="teacher")
    assert "tokenizer differs" in line and f"id of {first!r} = 301, expected 300" in line


def test_a_student_whose_vocabulary_is_too_small_is_refused_with_both_sizes(run: Run, finished: Path) -> None:
    shutil.copytree(finished / "corpus", run.out / "corpus")
    tokenizer = AutoTokenizer.from_pretrained(finished / "corpus" / "tokenizer")
    path = save_model(run.folder / "student", tiny_llama(vocab_size=500), tokenizer)
    run.settings["student"] = {"path": path}
    line = run.refused(stage="student")
    assert "found 500 rows in its embedding, expected at least 512" in line


def test_a_cache_of_another_corpus_is_refused(run: Run, finished: Path) -> None:
    run.source("other.txt", "")
    for number in range(40):
        (run.folder / f"other-{number}.txt").write_text(f"{number} {TEXT * 12}")
    run.settings["corpus"]["sources"] = [str(run.folder / "other-*.txt")]
    run.settings["reuse"] = {"teacher": str(finished / "teacher"), "cache": str(finished / "cache")}
    path = run.folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.settings))
    assert main(["corpus", str(path)]) == 0
    assert main(["student", str(path)]) == 0
    line = run.refused("--instance", "train/distilled/seed-0", stage="train")
    assert "the cache was made from another corpus" in line and str(finished / "cache") in line


def test_an_input_that_was_never_made_is_named_with_the_command_that_makes_it(run: Run) -> None:
    line = run.refused(stage="teacher")
    assert "needs corpus; found missing" in line and "--from corpus" in line


def test_a_stage_begun_under_other_settings_is_not_continued(run: Run, finished: Path) -> None:
    shutil.copytree(finished / "corpus", run.out / "corpus")
    shutil.copytree(finished / "student", run.out / "student")
    student = run.out / "student" / "seed-0"
    (student / "manifest.json").unlink()
    line = run.refused("--student.model.num_layers", "2", stage="student")
    assert "student.model.num_layers was 1, is 2" in line and "--remake student" in line


def test_vllm_not_installed_is_said_before_anything_is_loaded(run: Run, finished: Path) -> None:
    for stage in ("corpus", "teacher"):
        shutil.copytree(finished / stage, run.out / stage)
    path = run.folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.settings))
    blocked = run.folder / "blocked"
    blocked.mkdir()
    # the interpreter finds no vllm, as on a machine without it
    (blocked / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vllm': raise ModuleNotFoundError(name)\n"
        "import importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name.split('.')[0] == 'vllm' else found(name, package)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    said = capgap("cache", path, env={"PYTHONPATH": str(blocked)})
    assert said.returncode == 3
    assert said.stderr.strip().splitlines()[-1].startswith("capgap: cache.engine: vllm: vLLM is not installed")
    assert not (run.out / "cache" / "manifest.json").exists()


def test_a_full_disk_is_said_in_one_line_and_the_same_command_goes_on_afterwards(run: Run) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a small file system is mounted for this test, which only root may do")
    disk = run.folder / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=512k none {disk} && exec {CAPGAP} corpus {TINY} --out {disk}/run"
    full = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=600, check=False
    )
    if "mount:" in full.stderr:
        pytest.skip(f"no file system can be mounted here: {full.stderr.strip()}")
    assert full.returncode == 3, full.stderr
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("capgap: ") and "no space is left" in last and "run the same command again" in last


def test_errors_are_one_line_on_stderr_from_the_installed_command(run: Run) -> None:
    run.settings["corpus"]["seq_len"] = "long"
    path = run.folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.settings))
    said = subprocess.run(
        [str(Path(sys.executable).with_name("capgap")), "run", str(path)], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert len(said.stderr.strip().splitlines()) == 1
