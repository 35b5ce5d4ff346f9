"""The key is nowhere: not in what the stage writes, not in what it says, whatever an endpoint sends back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from judge_runs import KEY
from judge_server import Answer, Body, JudgeServer, said

from capgap.jobs.cli import main
from capgap.schemas.run_file import RunFile

Judge = Callable[..., tuple[int, str]]


@pytest.fixture
def judge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Judge:
    """Carries out the command, and returns its exit code and all that it said."""

    def run(settings: RunFile, *arguments: str) -> tuple[int, str]:
        path = tmp_path / "run.json"
        path.write_text(settings.model_dump_json())
        code = main(["judge", str(path), *arguments])
        return code, "".join(capfd.readouterr())

    return run


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_refused_key_is_named_by_its_variable_and_never_said(
    make_run, judge: Judge, server: JudgeServer, tmp_path: Path
) -> None:
    server.judge = lambda body, number: Answer({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status=401)
    code, text = judge(make_run(), "--log-format", "json")
    assert code == 2
    last = json.loads(text.splitlines()[-1])
    assert "Incorrect API key provided: [key]" in last["fields"]["found"]
    assert last["fields"]["fix"] == "put another into OPENAI_API_KEY"
    assert KEY not in text
    assert files_with(KEY, tmp_path) == []
    assert set(server.keys) == {KEY}


def test_an_endpoint_that_says_the_key_in_everything_leaves_it_nowhere(
    make_run, judge: Judge, server: JudgeServer, tmp_path: Path
) -> None:
    server.judge = echo
    server.models = [{"id": "tiny-judge", "object": "model", "created": 1, "owned_by": KEY, "root": KEY}]
    code, text = judge(make_run())
    assert code == 0, text
    assert KEY not in text
    assert files_with(KEY, tmp_path) == []
    assert "Your key is [key]." in (tmp_path / "out" / "judge" / "verdicts.jsonl").read_text()


def echo(body: Body, number: int) -> Answer:
    return Answer(said(f"Your key is {KEY}. Rating: [[5]]").body | {"model": KEY})


def test_without_a_key_a_server_of_one_s_own_is_asked_all_the_same(make_run, judge: Judge, server: JudgeServer) -> None:
    code, text = judge(make_run(api_key_env="NOT_SET"))
    assert code == 0, text
    assert KEY not in server.keys


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (f"--judge.api_key_env={KEY}", "judge.api_key_env: found what looks like a key"),
        (f"--judge.base_url=http://user:{KEY}@host/v1", "judge.base_url: found more than an address"),
        (f"--judge.base_url=http://host/v1?key={KEY}", "judge.base_url: found more than an address"),
        (f"--judge.base_url={KEY}", "judge.base_url: found what looks like a key"),
    ],
)
def test_a_key_that_is_typed_into_a_setting_is_refused_and_not_repeated(
    make_run, judge: Judge, flag: str, said: str
) -> None:
    code, text = judge(make_run(), flag)
    assert (code, said in text, KEY in text) == (2, True, False), text


def test_what_can_be_no_key_is_refused_and_not_repeated(make_run, judge: Judge, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nmore")
    code, text = judge(make_run())
    assert code == 2
    assert "OPENAI_API_KEY: holds characters that no key has" in text
    assert KEY not in text
