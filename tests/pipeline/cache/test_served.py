"""The whole stage on a teacher that is served: what it needs, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from teacher_server import KEY, MODEL, listed, refused, teacher_server
from tiny_models import VLLM_HEAD_DIM, save_model, tiny_llama
from transformers import PreTrainedTokenizerFast

from capgap.jobs.cli import main
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.verify.rescore import rescore
from capgap.pipeline.verify.verify import verify
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.schemas.errors import MachineError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

TEACHER, CACHE = Instance("teacher"), Instance("cache")
TOP_K, DEADLINE_S = 12, 120.0
FEW_TOKENS = 4 * 8 * 32  # four shards

# Sums in batches and one by one, in float32, beside the profile that rounds nothing. Measured: 1.5e-6.
TOLERANCE_NATS = 1e-4


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory) -> str:
    """The teacher, which the server has, with as many columns as its tokenizer has ids."""
    model = tiny_llama(2, vocab_size=300, head_dim=VLLM_HEAD_DIM, max_position_embeddings=64, initializer_range=0.2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["teacher"]["path"])
    return save_model(tmp_path_factory.mktemp("served"), model, tokenizer)


@pytest.fixture
def served(inputs, server, tmp_path) -> Callable[..., RunFile]:
    """A run of its own over the same corpus, whose teacher is known by its name alone; takes settings of the cache."""
    shutil.copytree(Path(inputs["out"]) / "corpus", tmp_path / "out" / "corpus")

    def make(teacher: dict[str, Any] | None = None, **cache: Any) -> RunFile:
        given = {"engine": "server", "recording": "topk", "top_k": TOP_K, "num_heldout_sequences": 0, **cache}
        given["server"] = {"base_url": server.url, "num_retries": 0, **given.get("server", {})}
        run = inputs | {"out": str(tmp_path / "out"), "teacher": teacher or {"served": MODEL}, "cache": given}
        made = RunFile.model_validate(
            {name: run[name] for name in ("name", "out", "device", "corpus", "teacher", "cache")}
        )
        carry_out(made, TEACHER)
        return made

    return make


def _targets(run: RunFile, manifest: Manifest) -> Iterator[Any]:
    reader = ShardReader(Path(run.out) / "cache", manifest.shard_sets["topk"])
    return (reader.read(index)[1] for index in range(reader.shard_set.num_members))


def _only_config(folder: str, target: Path) -> str:
    """The folder without weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(target)


@pytest.mark.parametrize("known", ["its name", "its configuration"])
def test_the_cache_is_that_of_the_teacher_here(served, inputs, folder, server, tmp_path, known: str) -> None:
    settings = {"profile": "lossless", "num_heldout_sequences": 2, "max_tokens": FEW_TOKENS}
    teacher = {"served": MODEL}
    if known == "its configuration":
        teacher["path"] = _only_config(folder, tmp_path / "config")
    run = served(teacher, **settings)
    # no device is taken, whoever has it
    with leases(["cpu"], "another run", wait=False):
        found = carry_out(run, CACHE, wait=False)
    facts = CacheFacts.model_validate(found.facts)
    assert (facts.engines, facts.dtypes, facts.served) == ((f"server {MODEL} (/m)",), ("the server's dtype",), MODEL)
    assert facts.padded_vocab_size == 300 and facts.cross_check is None
    assert {shard.machine for shard in facts.scored} == {""}
    assert (facts.num_teacher_parameters is None) == (known == "its name")
    here = inputs | {"out": str(tmp_path / "here"), "teacher": {"path": folder}}
    here["cache"] = {"engine": "transformers", "recording": "topk", "top_k": TOP_K, **settings}
    shutil.copytree(Path(run.out) / "corpus", tmp_path / "here" / "corpus")
    other = RunFile.model_validate(here)
    carry_out(other, TEACHER)
    wanted = carry_out(other, CACHE)
    assert wanted.totals["num_tokens"] == found.totals["num_tokens"]
    for mine, theirs in zip(_targets(run, found), _targets(other, wanted), strict=True):
        # ids of equal logprobs change places; whatever stands at a rank has the logprob of that rank
        assert (mine.ids_BLK != theirs.ids_BLK).mean() < 0.01
        for name in ("logprobs_BLK", "label_logprobs_BL", "tail_BL"):
            assert np.abs(getattr(mine, name) - getattr(theirs, name)).max() < TOLERANCE_NATS, name
    assert facts.mean_label_loss == pytest.approx(CacheFacts.model_validate(wanted.facts).mean_label_loss, abs=1e-5)
    assert set(server.keys) == {KEY}
    assert [path for path in Path(run.out).rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []
    assert all("sound" in line for line in verify(Path(run.out) / "cache"))


@pytest.mark.slow
def test_a_student_learns_from_it_and_is_held_against_the_cache(served, server, tmp_path, capfd) -> None:
    run = served(num_heldout_sequences=4)
    given = run.model_dump(mode="json") | {
        "student": {"model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}},
        "train": {"batch_sequences": 4, "max_tokens": 3 * 4 * 32},
        "eval": {"num_sequences": 4, "num_full_sequences": 2},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(given))
    assert main(["plan", str(path)]) == 0
    assert f"{MODEL} is served elsewhere" in capfd.readouterr().out
    assert main(["run", str(path)]) == 0, capfd.readouterr().err
    assert "on the cache's 4 held-out sequences" in capfd.readouterr().out
    results = json.loads((Path(run.out) / "eval" / "results.json").read_text())
    assert results["teacher_missing"] == "it is served elsewhere: its cache stands for it"
    assert main(["status", str(path)]) == 0
    assert "current" in capfd.readouterr().out
    assert main(["run", str(path)]) == 0
    assert "nothing to do" in "".join(capfd.readouterr())


@pytest.mark.slow
def test_after_a_kill_it_goes_on_and_every_shard_is_there_once(served, server, start) -> None:
    run = served(server={"num_parallel": 2})
    whole = carry_out(run, CACHE)
    asked = len(server.asked)
    cache = Path(run.out) / "cache"
    shutil.rmtree(cache)

    def slow(answer: Any, body: Any, number: int) -> Any:
        time.sleep(0.05)
        return answer

    server.change = slow
    process = start(run)
    deadline = time.monotonic() + DEADLINE_S
    while len(list(cache.glob("work/scored/*.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in cache.glob("work/scored/*.json")}
    files = {path.name: path.stat().st_mtime_ns for path in cache.glob("topk-*.tar")}
    assert len(kept) < len(whole.shard_sets["topk"].shards)
    server.change, before = lambda answer, body, number: answer, len(server.asked)
    again = carry_out(run, CACHE)
    assert again.content == whole.content
    assert len(server.asked) - before < asked
    done = [name for name in files if f"{name.removesuffix('.tar')[-6:]}.json" in kept]
    assert len(done) >= 3 and all((cache / name).stat().st_mtime_ns == files[name] for name in done)


def test_slices_share_the_work(served) -> None:
    run = served(max_tokens=FEW_TOKENS)
    whole = carry_out(run, CACHE).content
    shutil.rmtree(Path(run.out) / "cache")
    assert carry_out_slice(run, CACHE, Slice(0, 2), wait=False) is None
    finished = carry_out_slice(run, CACHE, Slice(1, 2), wait=False)
    assert finished is not None and finished.content == whole


def test_another_model_than_the_one_that_began_is_refused(served, server) -> None:
    run = served(max_tokens=FEW_TOKENS)
    assert carry_out_slice(run, CACHE, Slice(0, 2), wait=False) is None
    server.models = listed(root="/another")
    with pytest.raises(MismatchError, match=r"another model is served.*found server tiny-teacher \(/another\)"):
        carry_out_slice(run, CACHE, Slice(1, 2), wait=False)
    server.models = listed()
    assert carry_out(run, CACHE).stage == "cache"


def test_a_server_whose_tokenizer_is_another_one_is_refused(served, server) -> None:
    other = train_tokenizer(["zebra quagga okapi " * 50, "0123456789" * 50], 300)
    server._tokenizer = other
    with pytest.raises(MismatchError, match="the served teacher has another tokenizer than the corpus"):
        carry_out(served(), CACHE)


def test_the_server_is_asked_for_before_anything_is_made(served, server, tmp_path, capfd) -> None:
    path = tmp_path / "run.json"
    given = served().model_dump(mode="json") | {"out": str(tmp_path / "new")}
    given["cache"]["server"]["base_url"] = "http://127.0.0.1:1/v1"
    path.write_text(json.dumps(given))
    assert main(["run", str(path)]) == 3
    assert "the teacher's server cannot be reached" in capfd.readouterr().err
    assert not (tmp_path / "new" / "corpus").exists()
    server.models = listed("another")
    assert main(["run", str(path), "--cache.server.base_url", server.url]) == 2
    assert "found another, expected tiny-teacher" in capfd.readouterr().err
    assert not (tmp_path / "new" / "corpus").exists()


@pytest.mark.slow
def test_the_cache_is_scored_again_by_its_server_or_by_the_model_here(served, server, folder) -> None:
    run = served()
    carry_out(run, CACHE)
    cache = Path(run.out) / "cache"
    lines = list(rescore(cache, 0.1, device="cpu"))
    assert "agrees with its teacher" in lines[-1] and f"again by server {MODEL}" in lines[0]
    lines = list(rescore(cache, 0.1, device="cpu", engine="transformers", teacher=folder))
    assert "agrees with its teacher" in lines[-1] and "again by transformers" in lines[0]
    with teacher_server(folder) as other:
        other._model = tiny_llama(5, vocab_size=300, head_dim=VLLM_HEAD_DIM, initializer_range=0.2).eval()
        with pytest.raises(MismatchError, match="does not hold what its teacher gives"):
            list(rescore(cache, 0.1, device="cpu", teacher=other.url))
    server.models = listed("another")
    with pytest.raises(SettingError, match="does not serve this teacher"):
        list(rescore(cache, 0.1, device="cpu"))


def test_what_fails_midway_keeps_the_shards_that_are_whole(served, server) -> None:
    run = served(max_tokens=FEW_TOKENS)
    server.change = lambda answer, body, number: answer if number < 20 else refused("gone", 500)
    with pytest.raises(MachineError, match=r"the teacher's server fails.*goes on where this one stopped"):
        carry_out(run, CACHE)
    kept = len(list((Path(run.out) / "cache" / "work" / "scored").glob("*.json")))
    assert kept >= 1
    server.change = lambda answer, body, number: answer
    assert len(carry_out(run, CACHE).shard_sets["topk"].shards) > kept
    assert read_manifest(Path(run.out) / "cache") is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recording": "sampled", "top_k": None}, "cache.recording: found sampled with engine server, expected topk"),
        ({"recording": "both"}, "cache.recording: found both with engine server"),
        ({"temperature": 2.0}, "cache.temperature: found with engine server, expected temperature 1"),
        ({"extra_temperatures": [2.0]}, "cache.extra_temperatures: found with engine server"),
        ({"dtype": "bfloat16"}, "cache.dtype: found with engine server, expected it in the server's own command"),
        ({"replicas": 2}, "cache.replicas: found 2 with engine server, expected 1; raise cache.server.num_parallel"),
        ({"tensor_parallel": 2}, "cache.tensor_parallel: found with engine server, expected vllm"),
        ({"capture": "public"}, "cache.capture: found with engine server, expected vllm"),
        ({"engine_args": {"seed": 1}}, "cache.engine_args: found with engine server, expected vllm"),
        ({"server": {"base_url": f"http://u:{KEY}@h/v1"}}, "cache.server.base_url: found more than an address"),
        ({"server": {"base_url": "ftp://host"}}, "cache.server.base_url: expected http://HOST/v1"),
        ({"server": {"api_key_env": KEY}}, "the environment variable that cache.server.api_key_env names"),
        ({"engine": "transformers"}, "cache.engine: found transformers with teacher.served, expected server"),
        ({"teacher": {"path": "folder"}}, "cache.engine: found server without teacher.served"),
        ({"teacher": {"model": {}, "served": "one"}}, "teacher.model: found with teacher.served"),
        ({"teacher": {"path": "p", "adapt": {}, "served": "one"}}, "teacher.adapt: found with teacher.served"),
        ({"eval": {"teacher": "live"}}, "eval.teacher: found with teacher.served, expected a teacher to measure on"),
        (
            {"student": {"prune": {"num_layers": 1}}},
            "student.prune: found with teacher.served, expected a teacher to pr",
        ),
        ({"train": {"targets": "online"}}, "targets: found online with teacher.served, expected a teacher to ask on"),
        ({"eval": {"speculative": {}}}, "eval.speculative: found with teacher.served, expected a teacher to measure"),
    ],
)
def test_what_a_server_cannot_give_is_refused_by_name(tmp_path, capfd, settings: dict[str, Any], said: str) -> None:
    sections = {name: settings.pop(name) for name in ("teacher", "eval", "student", "train") if name in settings}
    cache = {"engine": "server", "recording": "topk", **settings}
    run = {
        "name": "r",
        "out": "out",
        "corpus": {},
        "teacher": {"served": "one"},
        "cache": cache,
        "student": {"model": {}},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**run, "train": {}, **sections}))
    assert main(["run", str(path)]) == 2
    error = capfd.readouterr().err
    assert said in error and KEY not in error
