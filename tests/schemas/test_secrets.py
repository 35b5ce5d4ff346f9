"""What looks like a credential is refused in a setting and taken out of a text; what does not is left alone."""

from __future__ import annotations

import time

import pytest
from pydantic import ValidationError

from capgap.schemas.errors import CapgapError
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.run_file import RunFile
from capgap.schemas.secrets import credential_in, redacted, redacted_values, require_no_credential

SECRET = "Pl4ntedS3cret"
RUN = {"name": "tried", "out": "out", "teacher": {"model": {}}, "student": {"model": {}}}
URLS = [
    f"https://user:{SECRET}@host/cache",
    f"https://user:{SECRET}/more@host/cache",
    f"https://{SECRET}@host/cache",
    f"https://host/cache?sig={SECRET}",
    f"https://host/cache?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    f"https://host/cache?a=1&token={SECRET}",
    f"https://host/cache?key={SECRET}",
    f"https://host/cache?unheard={SECRET * 3}",
    f"https://host/cache#access_token={SECRET}",
    f"s3://key:{SECRET}@bucket/cache",
    f"key:{SECRET}@bucket/cache",
    f"https://proxy/get?url=https%3A%2F%2Fuser%3A{SECRET}%40host",
    f"https://proxy/get?url=https%253A%252F%252Fhost%253Fsig%253D{SECRET}",
    f"//user:{SECRET}@host/cache",
    f"https://host/cache;jsessionid={SECRET}",
    f"https://host/cache?sign={SECRET}",
    f"https://host/cache?ticket={SECRET}",
]
# refused as settings, which are a URL as a whole; within a sentence nobody could say where they end
ODD_URLS = [
    f"https://user:{SECRET} and a blank@host/cache",
    f'https://user:"{SECRET}"@host/cache',
    f"https://user:{SECRET}\n@host/cache",
    f"https://user:{SECRET}\uff20host/cache",
]
SETTINGS = {
    "reuse.cache": lambda url: {"reuse": {"cache": url}},
    "reuse.corpus": lambda url: {"reuse": {"corpus": url}},
    "train.caches.code.path": lambda url: {"train": {"caches": {"code": {"path": url}}}},
    "arms.mine.caches.code.path": lambda url: {"arms": {"mine": {"caches": {"code": {"path": url}}}}},
    "tune.cache": lambda url: {"tune": {"cache": url}},
    "tune.path": lambda url: {"tune": {"path": url}},
    "tune.sources": lambda url: {"tune": {"sources": [url]}},
    "corpus.sources": lambda url: {"corpus": {"sources": ["a.txt", url]}},
    "corpus.tokenizer": lambda url: {"corpus": {"tokenizer": url}},
    "teacher.path": lambda url: {"teacher": {"path": url}},
    "student.path": lambda url: {"student": {"path": url}},
    "judge.base_url": lambda url: {"judge": {"model": "judge", "base_url": url}},
    "judge.questions": lambda url: {"judge": {"model": "judge", "questions": url}},
    "train.loggers.mlflow.init_args.tracking_uri": lambda url: {
        "train": {"loggers": [{"class_path": "mlflow", "init_args": {"tracking_uri": url}}]}
    },
    "out": lambda url: {"out": url},
}


@pytest.mark.parametrize("url", [*URLS, *ODD_URLS])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_a_url_with_a_credential(name: str, url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunFile.model_validate(RUN | SETTINGS[name](url))
    text = str(caught.value)
    assert SECRET not in text
    assert f"{name}: found more than an address" in text
    assert "put it into " in text


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (f"s3://key:{SECRET}@bucket/cache", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"),
        (f"gs://{SECRET}@bucket/cache", "GOOGLE_APPLICATION_CREDENTIALS"),
        (f"az://container/cache?sig={SECRET}", "AZURE_STORAGE_ACCOUNT_KEY"),
        (f"hf://user:{SECRET}@datasets/cache", "HF_TOKEN"),
        (f"https://host/cache?sig={SECRET}", "FSSPEC_HTTPS"),
    ],
)
def test_the_refusal_names_where_such_a_credential_belongs(url: str, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        require_no_credential("reuse.cache", url)


@pytest.mark.parametrize(
    ("class_path", "arguments", "place"),
    [
        ("wandb", {"api_key": SECRET}, "WANDB_API_KEY"),
        ("mlflow", {"tracking": {"password": SECRET}}, "MLFLOW_TRACKING_PASSWORD"),
        ("lightning.pytorch.loggers.CometLogger", {"api_key": SECRET}, "COMET_API_KEY"),
        ("lightning.pytorch.loggers.NeptuneLogger", {"api_token": SECRET}, "NEPTUNE_API_TOKEN"),
        ("wandb", {"settings": {"secret": SECRET}}, "WANDB_API_KEY"),
        ("csv", {"headers": {"Authorization": f"Bearer {SECRET}"}}, "an environment variable or credential file"),
    ],
)
def test_a_logger_takes_no_key_as_an_argument(class_path: str, arguments: dict, place: str) -> None:
    loggers = [{"class_path": class_path, "init_args": arguments}]
    with pytest.raises(ValidationError, match=place) as caught:
        RunFile.model_validate(RUN | {"train": {"loggers": loggers}})
    assert SECRET not in str(caught.value)


def test_an_import_takes_no_source_with_a_credential() -> None:
    for name in ("sources", "heldout"):
        given = {"sources": ["a"], "out": "out", "tokenizer": "t", "teacher": "t"} | {name: [f"s3://k:{SECRET}@b/c"]}
        with pytest.raises(ValidationError, match=f"{name}: found more than an address") as caught:
            ImportSettings.model_validate(given)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "runs/demo/cache",
        "builtin:python",
        "data/*.jsonl.gz",
        "HuggingFaceTB/SmolLM2-135M",
        "http://localhost:8000/v1",
        "http://127.0.0.1:8000/path@x",
        "s3://bucket/mine/cache",
        "abfs://container@account.dfs.core.windows.net/cache",
        "hf://datasets/user/name@main/cache",
        "sqlite:///runs.db",
        "OPENAI_API_KEY",
        "judge.api_key_env: expected the name of an environment variable",
        "token: found 5, expected at most 4",
        "--max_tokens=2000",
        "image:tag@sha256:0123",
        "mail user@example.com about step-000200.ckpt",
        "lightning.pytorch.loggers.CometLogger",
    ],
)
def test_what_is_no_credential_is_left_alone(text: str) -> None:
    assert credential_in(text) is None
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *URLS,
        f"GET https:/user:{SECRET}@host/x failed",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f'{{\\"api_key\\": \\"{SECRET}\\"}}',
        f"Authorization: Basic {SECRET}==",
        f"Bearer {SECRET}",
        f"Client(api_key={SECRET}, timeout=3)",
        f"the key sk-{SECRET}0123456789 is wrong",
        f"--train.loggers=[{{'token': '{SECRET}'}}]",
    ],
)
def test_a_credential_is_taken_out_of_a_text_wherever_it_stands(text: str) -> None:
    assert SECRET not in redacted(f"capgap: before {text} after")
    assert redacted(redacted(text)) == redacted(text)
    error = CapgapError("cannot be read", where=text, found=text, expected=text, fix=text)
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_API_KEY", SECRET),
        ("HF_TOKEN", SECRET),
        ("AWS_SECRET_ACCESS_KEY", f"/{SECRET}+/x"),
        ("WANDB_API_KEY", SECRET),
        ("MLFLOW_TRACKING_PASSWORD", SECRET),
        ("HTTPS_PROXY", f"http://user:{SECRET}@proxy:3128"),
        ("FSSPEC_HTTPS", f'{{"headers": {{"Authorization": "Bearer {SECRET}", "X-Mine": "{SECRET}"}}}}'),
        ("FSSPEC_S3_SECRET", SECRET),
    ],
)
def test_what_a_secret_variable_holds_is_known_by_its_value(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    said = SECRET if SECRET in value.split() or name.startswith(("FSSPEC", "HTTPS")) else value
    assert redacted(f"the server says: {said} is no good") == "the server says: *** is no good"
    assert redacted_values({"a": [said, {"b": said}], "n": 1}) == {"a": ["***", {"b": "***"}], "n": 1}


def test_a_variable_that_names_a_file_or_a_setting_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setenv("SSH_AUTH_SOCK", "/tmp/agent.socket")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    text = f"{path} /tmp/agent.socket disabled"
    assert redacted(text) == text


def test_a_secret_in_an_endpoint_s_own_key_is_redacted_as_json_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", 'a"b\\c"d/12345')
    assert redacted('{"said": "a\\"b\\\\c\\"d/12345"}') == '{"said": "***"}'


def test_no_text_makes_a_search_take_long() -> None:
    began = time.process_time()
    for part in ("a", "http://", "a:", "?a=", "'token': '", "%3A%2F%2F", "token", "=token", "a.", "-----BEGIN "):
        redacted(part * (100_000 // len(part)))
        credential_in(part * (100_000 // len(part)))
    # without bounds on repetitions it takes minutes for each
    assert time.process_time() - began < 60
