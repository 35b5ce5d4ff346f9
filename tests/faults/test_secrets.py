"""Planted secrets, through every command and with every kind of URL: they are in no file and in no stream."""

from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import capgap
from capgap.jobs.cli import main
from capgap.jobs.logs import log_crash
from capgap.jobs.registry import COMMANDS, stage_names
from capgap.jobs.streams import redacted_streams
from capgap.pipeline.workflow.remake import LastCommand, last_command, write_command
from capgap.schemas.errors import CapgapError

SECRET = "Pl4ntedS3cret"
URLS = {
    "password": f"https://user:{SECRET}@127.0.0.1:9/cache",
    "odd password": f"https://user:{SECRET}/x@127.0.0.1:9/cache",
    "azure": f"https://127.0.0.1:9/cache?sv=1&sig={SECRET}",
    "amazon": f"https://127.0.0.1:9/cache?X-Amz-Signature={SECRET}",
    "token": f"http://127.0.0.1:9/cache?token={SECRET}",
    "key": f"http://127.0.0.1:9/cache?key={SECRET}",
    "s3": f"s3://key:{SECRET}@bucket/cache",
    "no scheme": f"key:{SECRET}@bucket/cache",
    "proxied": f"http://127.0.0.1:9/get?url=https%3A%2F%2Fuser%3A{SECRET}%40host",
}
# the flag, or the words, that take a URL in each command that is no stage's
PLACES = {
    "run": ["run", "run.yaml", "--reuse.cache", "URL"],
    "status": ["status", "run.yaml", "--reuse.cache=URL"],
    "plan": ["plan", "run.yaml", "--corpus.sources", '["URL"]'],
    "init": ["init", "URL"],
    "ls": ["ls", "URL"],
    "doctor": ["doctor", "--at", "URL"],
    "verify": ["verify", "somewhere", "--rescore", "0.1", "--teacher", "URL"],
    "fidelity": ["fidelity", "URL"],
    "import": ["import", "URL", "--out", "made", "--tokenizer", "t", "--teacher", "t"],
    "export": ["export", "URL", "--to", "made"],
    "law plan": ["law", "plan", "grid.yaml", "--run.reuse.cache", "URL"],
    "law run": ["law", "run", "grid.yaml", "--run.reuse.cache", "URL"],
    "law table": ["law", "table", "URL"],
    "law submit": ["law", "submit", "URL"],
    "law fit": ["law", "fit", "URL"],
    "law report": ["law", "report", "URL"],
    "law advise": ["law", "advise", "URL"],
    "completion": ["completion", "URL"],
}


@pytest.fixture
def command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> Callable[..., tuple[int, str]]:
    """Carries out a command in a folder of its own; its exit code, and all that it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def run(*arguments: str | Path) -> tuple[int, str]:
        code = main(list(map(str, arguments)))
        return code, "".join(capfd.readouterr())

    return run


def hits(folder: Path, *secrets: str) -> list[Path]:
    """Files that hold one of the secrets."""
    wanted = [secret.encode() for secret in secrets or (SECRET,)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret in path.read_bytes() for secret in wanted)]


def run_file(folder: Path, **settings: Any) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps({"name": "tried", "out": str(folder / "out"), "device": "cpu"} | settings))
    return path


def test_every_command_is_tried() -> None:
    assert set(PLACES) == set(COMMANDS) - set(stage_names())


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@pytest.mark.parametrize("words", PLACES.values(), ids=PLACES)
def test_a_credential_that_is_typed_is_refused_and_never_repeated(command, words, url, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{name: a, out: out, corpus: {}}")
    for more in ((), ("--log-format", "json")):
        code, text = command(*(word.replace("URL", url) for word in words), *more)
        assert (code, SECRET in text) == (2, False), text
        assert "more than an address" in text
        assert "put it into " in text
    assert hits(tmp_path) == []


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@pytest.mark.parametrize("stage", ["run", "status", "plan", *stage_names()])
def test_a_credential_in_a_run_file_stops_every_command_that_reads_it(command, stage, url, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    path = run_file(folder, reuse={"cache": url}, student={"model": {}}, train={})
    code, text = command(stage, path, "--log-format", "json")
    assert (code, SECRET in text) == (2, False), text
    assert "reuse.cache: found more than an address" in text
    assert hits(tmp_path) == [path]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_python_s_own_calls_refuse_it_too(url: str, tmp_path: Path) -> None:
    settings = {"name": "a", "out": str(tmp_path / "out"), "reuse": {"cache": url}, "student": {"model": {}}}
    with pytest.raises(CapgapError, match=r"reuse\.cache: found more than an address") as caught:
        capgap.run(settings, train={})
    assert SECRET not in str(caught.value)
    if "://" in url:
        with pytest.raises(CapgapError, match="the URL: found more than an address") as caught:
            capgap.open_cache(url)
        assert SECRET not in str(caught.value)
    assert hits(tmp_path) == []


@pytest.mark.parametrize("word", ["--wandb.api_key", "--train.password", "--hub-token"])
def test_the_value_of_a_flag_that_is_called_a_secret_is_not_repeated(command, word: str) -> None:
    for words in ((word, SECRET), (f"{word}={SECRET}",)):
        code, text = command("run", "demo", *words)
        assert (code, SECRET in text) == (2, False), text


class _Refusing(SimpleHTTPRequestHandler):
    """Says no with all that it was sent; /moved leads to a signed URL."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/signed?X-Amz-Signature={SECRET}&user:{SECRET}@host")
            self.end_headers()
            return
        sent = f"{self.headers.get('Authorization')} {os.environ.get('HF_TOKEN')}"
        self.send_error(403, f"no: https://user:{SECRET}@host/x?sig={SECRET} api_key={SECRET} {sent}")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("below", ["cache", "moved"])
def test_what_a_server_says_is_told_without_the_secrets_in_it(
    command, refusing: str, below: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "an0ther-pl4nted-one")
    path = run_file(tmp_path, reuse={"cache": f"{refusing}/{below}"}, student={"model": {}}, train={})
    for words in (("run", path), ("status", path), ("plan", path), ("export", f"{refusing}/{below}", "--to", "made")):
        for more in ((), ("--log-format", "json")):
            code, text = command(*words, *more)
            assert code == 2, text
            assert "cannot be read" in text
            assert SECRET not in text
            assert "an0ther-pl4nted-one" not in text
    assert hits(tmp_path, SECRET, "an0ther-pl4nted-one") == []


def test_a_crash_is_told_without_the_secrets_in_it(capfd, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:pr0xy-passw0rd@proxy:3128")
    error = RuntimeError(f"401 for {SECRET} by way of http://user:pr0xy-passw0rd@proxy:3128 (pr0xy-passw0rd)")
    with redacted_streams():
        log_crash(error, 1)
        print(error, file=sys.stderr)
    text = "".join(capfd.readouterr())
    assert "401 for *** by way of" in text
    assert SECRET not in text
    assert "pr0xy-passw0rd" not in text


def test_the_flags_of_a_run_are_remembered_without_secrets(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    write_command(tmp_path, LastCommand(flags=(f"--name={SECRET}", f"--a=https://u:{SECRET}@h", "--seeds=[1]")))
    assert last_command(tmp_path) == LastCommand(flags=("--name=***", "--a=https://***@h", "--seeds=[1]"))


@pytest.mark.parametrize("flag", ["--name", "--out", "--corpus.sources", "--train.loggers"])
def test_what_a_secret_variable_holds_is_no_setting(command, flag: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    code, text = command("run", "demo", f"{flag}=[{SECRET}]")
    assert (code, SECRET in text) == (2, False), text
    assert f"{flag}: found the value of a secret environment variable" in text
    assert hits(tmp_path) == []


class _Guarded(SimpleHTTPRequestHandler):
    """Files for whoever brings the key in a header, or in the query to which everybody is led who has the header."""

    server: Any

    def send_head(self) -> Any:
        if self.headers.get("Authorization") != self.server.key:
            self.send_error(403, f"no: {self.headers.get('Authorization')}")
            return None
        if self.server.is_signed and f"X-Amz-Signature={SECRET}" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"{self.path}?X-Amz-Signature={SECRET}&user=1")
            self.end_headers()
            return None
        return super().send_head()

    def log_message(self, *args: object) -> None:
        pass


BASIC = base64.b64encode(f"user:{SECRET}".encode()).decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "is_signed"),
    [(f"Bearer {SECRET}", False), (f"Basic {BASIC}", False), (f"Bearer {SECRET}", True)],
    ids=["bearer", "basic", "signed"],
)
def test_a_run_from_a_guarded_server_leaves_the_key_nowhere(
    made: Path, settings, tmp_path: Path, key: str, is_signed: bool
) -> None:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Guarded, directory=str(made)))
    server.key, server.is_signed = key, is_signed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wanted = {name: settings[name] for name in ("student", "train", "eval")}
    url = f"http://127.0.0.1:{server.server_port}/cache"
    path = run_file(tmp_path, reuse={"cache": url}, **wanted)
    plain = {**os.environ, "CAPGAP_DOWNLOADS": str(tmp_path / "downloads"), "NO_PROXY": "127.0.0.1", "HF_TOKEN": SECRET}
    headers = {"FSSPEC_HTTP": json.dumps({"headers": {"Authorization": key}})}

    def run(env: dict[str, str], *words: str) -> tuple[int, str]:
        command = [sys.executable, "-P", "-m", "capgap.jobs.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
        return done.returncode, done.stdout + done.stderr

    # eval and report are among what it makes
    said = [run(plain, "run", str(path)), run(plain | headers, "run", str(path))]
    said += [run(plain | headers, one, str(path), "--log-format", "json") for one in ("status", "plan")]
    said += [run(plain | headers, "verify", str(tmp_path / "out"))]
    said += [run(plain | headers, "fidelity", url), run(plain, "fidelity", url)]
    server.shutdown()
    server.server_close()
    assert [code for code, _ in said] == [2, 0, 0, 0, 0, 0, 2], said
    assert "403" in said[0][1]
    assert [text for _, text in said if SECRET in text or BASIC in text] == []
    assert (tmp_path / "out" / "report" / "manifest.json").is_file()
    assert hits(tmp_path, SECRET, BASIC) == []


def test_a_stranger_s_names_do_not_control_the_terminal(command, copy: Path, settings, tmp_path: Path) -> None:
    evil = "\x1b]52;c;cm0=\x07\x1b[2J\u202e"
    manifest = json.loads((copy / "cache" / "manifest.json").read_bytes())
    (copy / "cache" / "manifest.json").write_text(json.dumps(manifest | {"instance": f"cache{evil}"}))
    (tmp_path / f"runs{evil}" / "corpus").mkdir(parents=True)
    (tmp_path / f"runs{evil}" / "corpus" / "work.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"out": str(copy)}))
    for words in (("verify", copy), ("fidelity", copy / "cache"), ("status", path), ("ls", tmp_path)):
        _, text = command(*words)
        assert text
        assert not any(one in text for one in "\x1b\x07\u202e"), words


def test_a_heartbeat_of_a_stranger_s_is_shown_as_text(command, copy: Path, settings, tmp_path: Path) -> None:
    evil = "[/bold]\x1b[2J\x1b]0;title\x07"
    work = copy / "cache" / "work"
    work.mkdir(exist_ok=True)
    (copy / "cache" / "manifest.json").unlink()
    ended = {"what": evil, "exit_code": 1}
    beat = {"machine": evil, "namespace": "", "pid": 1, "pid_started": None, "phase": evil, "device": evil}
    times = {"begun_s": 0, "advanced_s": 0, "written_s": 0}
    (work / "progress.json").write_text(json.dumps({**beat, **times, "ended": ended}))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"out": str(copy)}))
    code, text = command("status", path)
    assert code == 0, text
    assert "[/bold]" in text
    assert "\x1b" not in text
