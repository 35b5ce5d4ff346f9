"""Sound caches pass, whatever they keep; another teacher, and rows of other tokens, do not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_model, tiny_llama
from tiny_texts import numbered_texts, write_texts
from transformers import AutoTokenizer, LlamaForCausalLM

from capgap.jobs.cli import main
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import Block, ShardReader, ShardWriter
from capgap.pipeline.verify.rescore import rescore, sample_of
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.run_file import RunFile

SEQ_LEN = 32


def _save_teacher(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> str:
    return save_model(folder, tiny_llama(seed, max_position_embeddings=SEQ_LEN, initializer_range=0.2).to(dtype))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with its corpus and teacher made."""
    folder = tmp_path_factory.mktemp("rescore")
    texts = numbered_texts(30)
    write_texts(folder, texts)
    teacher = _save_teacher(folder / "given", 2)
    train_tokenizer(texts, 300).save_pretrained(teacher)
    run = {
        "name": "tiny",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {
            "sources": [str(folder / "*.txt")], "tokenizer": teacher, "seq_len": SEQ_LEN, "teacher_fraction": 0.0,
            "heldout_fraction": 0.2, "shard_sequences": 8, "long_documents": "split",
        },
        "teacher": {"path": teacher},
        "student": {"model": {}},
        "cache": {"engine": "transformers", "chunk_rows": 100, "batch_tokens": 200},
    }  # fmt: skip
    return run


BOTH = {"recording": "both", "num_samples": 20, "top_k": 12}


@pytest.fixture
def cache(made, tmp_path: Path) -> Any:
    """Makes the cache of a run with settings of its own, and returns its folder."""

    def make(context: str = "packed", **settings: Any) -> Path:
        run = RunFile.model_validate(
            made
            | {
                "out": str(tmp_path / "out"),
                "cache": made["cache"] | settings,
                "corpus": made["corpus"] | {"context": context},
            }
        )
        for stage in ("corpus", "teacher", "cache"):
            carry_out(run, Instance(stage))
        return tmp_path / "out" / "cache"

    return make


@pytest.mark.parametrize(
    "settings",
    [
        BOTH | {"profile": "lossless"},
        BOTH | {"profile": "compact", "temperature": 2.0},
        BOTH | {"profile": "small", "context": "document"},
        {"num_samples": 20},
        {"recording": "topk", "top_k": 300},
    ],
    ids=["lossless", "compact", "small", "sampled", "all-ids"],
)
def test_a_sound_cache_says_what_its_teacher_says(cache, settings: dict[str, Any]) -> None:
    lines = list(rescore(cache(**settings), 0.2))
    assert lines[-1] == "cache: agrees with its teacher"
    assert re.search(r"cache: (\d+) of \d+ sequences, (\d+) targets, scored again by transformers", lines[0])
    recordings = {"both": ["sampled", "topk"]}.get(
        settings.get("recording", ""), [settings.get("recording", "sampled")]
    )
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == [name for name in recordings for _ in range(2)]
    if settings.get("profile") == "lossless":
        apart = [float(n) for n in re.search(r"at most (\S+) nats apart, (\S+) on average", lines[3]).groups()]
        # what float32 products in other batches differ by, and not what a codec does
        assert apart[1] <= apart[0] < 1e-4


def test_the_sample_is_the_same_each_time_one_at_least_and_all_at_most(cache) -> None:
    manifest = read_manifest(cache())
    shard_set = manifest.shard_sets["sampled"]
    assert len(sample_of(manifest, 1e-9)) == 1
    assert sample_of(manifest, 0.5) == sample_of(manifest, 0.5)
    members = [member for shard in shard_set.shards for member in shard.each_member()]
    every = [(number, row) for number, member in enumerate(members) for row in range(member.num_sequences)]
    assert sample_of(manifest, 1.0) == every


@pytest.mark.parametrize("settings", [{"num_samples": 20}, {"recording": "topk", "top_k": 12, "profile": "compact"}])
def test_another_teacher_is_caught(cache, made, tmp_path, settings, capsys) -> None:
    folder = cache(**settings)
    other = _save_teacher(tmp_path / "other", seed=3)
    AutoTokenizer.from_pretrained(made["teacher"]["path"]).save_pretrained(other)
    with pytest.raises(
        MismatchError, match=r"the cache does not hold what its teacher gives; found .* nats apart where"
    ):
        list(rescore(folder, 0.001, teacher=other))
    assert main(["verify", str(folder.parent), "--rescore", "0.001", "--teacher", other, "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "cache: 1 of " in shown.out and "the cache does not hold what its teacher gives" in shown.err
    assert len([line for line in shown.err.splitlines() if line.startswith("capgap: ")]) == 1
    assert main(["verify", str(folder.parent), "--rescore", "0.001", "--device", "cpu"]) == 0


def test_a_teacher_that_differs_by_a_little_training_is_caught(cache, made, tmp_path) -> None:
    folder = cache(recording="both", num_samples=20, top_k=12)
    model = LlamaForCausalLM.from_pretrained(made["teacher"]["path"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.02
    model.save_pretrained(tmp_path / "further")
    with pytest.raises(MismatchError, match="not hold what its teacher gives"):
        list(rescore(folder, 0.1, teacher=str(tmp_path / "further")))


@pytest.mark.parametrize("top_k", [1, 12])
def test_a_shard_whose_targets_are_shifted_by_one_is_caught(cache, top_k: int, capsys) -> None:
    """With twelve ids the shard contradicts its own tokens; with one id almost nothing does, but the teacher does."""
    folder = cache(recording="topk", top_k=top_k, profile="lossless", extra_temperatures=[2.0])
    manifest = read_manifest(folder)
    _shift(folder)
    assert main(["verify", str(folder), "--rescore", "1", "--device", "cpu"]) == (4 if top_k > 1 else 2)
    error = capsys.readouterr().err
    assert "not aligned" in error or "not hold what its teacher gives" in error
    assert read_manifest(folder).identity == manifest.identity


def _shift(folder: Path) -> None:
    """Write the first shard anew, each row's target one place too late, and make the manifest fit."""
    manifest = read_manifest(folder)
    shard_set = manifest.shard_sets["topk"]
    reader = ShardReader(folder, shard_set)
    sidecars = folder / "work"
    writer = ShardWriter(folder, sidecars, "topk", reader.codec)
    sequences, targets = reader.read(0)
    shifted = {name: values.copy() for name, values in vars(targets).items()}
    for values in shifted.values():
        values[:, 1:] = values[:, :-1].copy()
    entry = writer.write(0, [Block(sequences, type(targets)(**shifted))])
    shutil.rmtree(sidecars)
    sets = {"topk": shard_set.model_copy(update={"shards": (entry, *shard_set.shards[1:])})}
    files = content_files(folder)
    update = {"shard_sets": sets, "files": files, "content": content_of(files)}
    finish(folder, manifest.model_copy(update=update))


def test_a_run_that_was_moved_finds_its_teacher_and_one_that_lost_it_says_so(cache, made, tmp_path) -> None:
    folder = cache()
    moved = Path(shutil.move(folder.parent, tmp_path / "moved")) / "cache"
    assert list(rescore(moved, 0.001))[-1] == "cache: agrees with its teacher"
    shutil.rmtree(moved.parent / "teacher")
    with pytest.raises(InputError, match=r"the teacher is not where it was; .* name its folder with --teacher"):
        list(rescore(moved, 0.001))
    assert list(rescore(moved, 0.001, teacher=made["teacher"]["path"]))[-1] == "cache: agrees with its teacher"


def test_scoring_again_waits_its_turn_at_the_device(cache, capsys) -> None:
    folder = cache()
    with leases(["cpu"], holder="train of run other", wait=False):
        assert main(["verify", str(folder), "--rescore", "0.1", "--device", "cpu", "--no-wait"]) == 3
    assert "the device is in use; found train of run other" in capsys.readouterr().err


def test_a_folder_without_a_cache_is_an_error(made, cache) -> None:
    corpus = cache().parent / "corpus"
    with pytest.raises(InputError, match="no finished cache"):
        list(rescore(corpus, 0.1))


@pytest.mark.parametrize("arguments", [["--rescore", "0"], ["--rescore", "1.5"], ["--teacher", "x"]])
def test_flags_that_say_nothing_are_refused(tmp_path, capsys, arguments) -> None:
    assert main(["verify", str(tmp_path), *arguments]) == 2
    assert "--rescore" in capsys.readouterr().err
