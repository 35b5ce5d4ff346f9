"""What a shell completes after `capgap`, asked of the shell itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from capgap.jobs.completion import script
from capgap.jobs.registry import first_words
from capgap.jobs.shipped import shipped_names

_ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_capgap
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "capgap.bash"
    path.write_text(script("bash"))
    return path


def completed(bash: Path, *words: str, where: Path | None = None) -> list[str]:
    """What bash offers for the last word, in a folder with no other file than the script."""
    done = subprocess.run(
        ["bash", "--norc", "-c", _ASK, "ask", str(bash), "capgap", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=where or bash.parent,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_come_first(bash: Path) -> None:
    assert completed(bash, "") == first_words()
    assert completed(bash, "sta") == ["status"]
    assert completed(bash, "law", "") == ["plan", "run", "table", "submit", "fit", "report", "advise"]


def test_flags_and_settings_follow_two_dashes(bash: Path) -> None:
    assert completed(bash, "run", "demo", "--train.learning") == ["--train.learning_rate"]
    assert {"--only", "--from", "--remake", "--force"} <= set(completed(bash, "run", "--"))
    assert "--slice" in completed(bash, "cache", "--sl") and completed(bash, "train", "--sl") == []
    assert completed(bash, "verify", "--resc") == ["--rescore"]
    assert completed(bash, "law", "plan", "--teachers") == ["--teachers"]
    assert completed(bash, "verify", "--train") == []


def test_names_of_shipped_run_files_stand_beside_files(bash: Path) -> None:
    assert completed(bash, "run", "") == [*shipped_names(), bash.name]
    assert completed(bash, "status", "min") == [name for name in shipped_names() if name.startswith("min")]


def test_files_and_folders_are_offered_beside_shipped_names_that_begin_alike(bash: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-of-mine.yaml").touch()
    (tmp_path / "demos").mkdir()
    shipped = [name for name in shipped_names() if name.startswith("demo")]
    assert sorted(completed(bash, "run", "demo", where=tmp_path)) == sorted([*shipped, "demo-of-mine.yaml", "demos"])
    assert completed(bash, "run", "--", where=tmp_path) == completed(bash, "run", "--")


def test_the_script_for_zsh_is_one_that_zsh_understands(tmp_path: Path) -> None:
    text = script("zsh")
    assert text.startswith("#compdef capgap\n") and "--train.learning_rate" in text and "@" not in text
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_capgap").write_text(text)
    subprocess.run(["zsh", "-n", str(tmp_path / "_capgap")], check=True)
