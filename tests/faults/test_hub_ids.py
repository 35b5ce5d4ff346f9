"""Models by their id: checked as those of folders are, and what cannot be had is one line, at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from inputs import Typed, change, qwen, save, without
from processes import Zygote
from tiny_hub import Hub

pytestmark = pytest.mark.slow  # a process of its own, which knows another hub from its start


@pytest.fixture(scope="module")
def serving() -> Iterator[ExitStack]:
    """Closed, no hub is there any more."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was downloaded."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    folder = tmp_path_factory.mktemp("hub")
    lacks = change(Path(shutil.copytree(base_model, folder / "lacks")), without("model.norm.weight"))
    pickled = Path(shutil.copytree(base_model, folder / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    shards = save(folder / "shards", qwen(), max_shard_size="50KB")
    (folder / "gguf").mkdir()
    (folder / "gguf" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    repos = {"org/tiny": base_model, "org/gated": base_model, "org/lacks": lacks, "org/pickled": pickled}
    return Hub(repos | {"org/shards": shards, "org/gguf": folder / "gguf"}, gated=("org/gated",))


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path, serving: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    environment = {"HF_ENDPOINT": serving.enter_context(hub.served()), "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (environment | {"NO_PROXY": "127.0.0.1"}).items():
            patched.setenv(name, value)
        zygote = Zygote(tmp_path_factory.mktemp("online"))
    yield zygote
    zygote.close()


@pytest.fixture
def typed(online: Zygote, tmp_path: Path, base_model: Path) -> Typed:
    return Typed(tmp_path, base_model, online.run)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/lacks", "the weights are not those of the model that config.json describes; found 1 missing: model.norm"),
        ("org/pickled", "no weights as safetensors; found only pytorch_model.bin"),
        ("org/gguf", "no config.json, and only model-Q4_K_M.gguf"),
        ("org/gated", "a gated model that you have no access to"),
        ("org/none", "no such folder, and no model of that id that you may read; found Repository not found"),
    ],
)
def test_an_id_that_cannot_be_used_is_one_line(typed: Typed, hub: Hub, name: str, said: str) -> None:
    line = typed.refused("run", teacher={"path": name})
    assert f"teacher.path: {name}: " in line and said in line and "Retrying" not in typed.said
    weights = sum(num for file, num in hub.fetched.items() if file.startswith(f"{name}/") and "safetensors" in file)
    assert weights <= 100_001, "of the weights the header alone is fetched"
    if name in ("org/gated", "org/none"):
        assert name in typed.refused(corpus={"tokenizer": name}) and "Retrying" not in typed.said


@pytest.mark.parametrize("name", ["org/tiny", "org/shards"])
def test_an_id_is_as_good_as_its_folder(typed: Typed, name: str) -> None:
    given = {"path": name}
    typed.makes("corpus", "teacher", "cache", "student", corpus={"tokenizer": name}, teacher=given, student=given)


def test_a_download_that_broke_is_found_before_it_is_read(typed: Typed, home: Path) -> None:
    given = {"path": "org/tiny"}
    typed.makes("corpus", "teacher", "student", corpus={"tokenizer": "org/tiny"}, teacher=given, student=given)
    (file,) = home.glob("hub/models--org--tiny/snapshots/*/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors ends too early" in typed.refused("run", teacher=given)
    file.write_bytes(whole)


def test_a_hub_that_is_gone_is_said_at_once(typed: Typed, serving: ExitStack) -> None:
    """The last one: nothing is there any more."""
    typed.makes("corpus")
    serving.close()
    for words in ("run", "teacher"):
        assert typed.type(words, teacher={"path": "org/another"}) == 3
        assert "org/another: no such folder, and the hub cannot be reached" in typed.said
        assert "Retrying" not in typed.said
