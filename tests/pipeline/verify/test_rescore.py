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
from capgap.pipeline.verify import rescore as rescoring
from capgap.pipeline.verify.rescore import rescore
from capgap.pipeline.verify.sample import Group, groups_of
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
    assert re.search(r"cache: (\d+) of \d+ sequences, [\d,]+ targets, scored again by transformers", lines[0])
    same, num = re.search(r"(\S+) of (\S+) rows are the very same", lines[1]).groups()
    # documents are sorted by length over a shard, whose first ones may stand in other batches then
    assert (same == num and len(lines) == 3) or settings.get("context") == "document"


def test_the_sample_is_the_same_each_time_and_of_a_large_cache_a_batch_of_some_shards(cache) -> None:
    manifest = read_manifest(cache())
    sizes = [shard.num_sequences for shard in manifest.shard_sets["sampled"].shards]
    every = [Group(shard, size, size) for shard, size in enumerate(sizes)]
    # fewer than 8192 targets: all of them
    assert groups_of(manifest, 1e-9, 200) == groups_of(manifest, 1.0, 200) == every
    shard = manifest.shard_sets["sampled"].shards[0].model_copy(update={"num_sequences": 1000})
    shards = manifest.shard_sets["sampled"].model_copy(update={"shards": (shard,) * 20})
    large = manifest.model_copy(update={"shard_sets": {"sampled": shards}})
    few = groups_of(large, 1e-9, 2048)
    assert few == groups_of(large, 1e-9, 2048) and sum(group.num_sequences for group in few) == 8192 / SEQ_LEN
    # 64 sequences of 32 targets are a batch of vLLM's, and 62 of 33 tokens one of transformers'
    assert [(group.num_sequences, group.num_scored) for group in few] == [(64, 124)] * 4
    assert len({group.shard for group in few}) == 4
    assert sum(group.num_sequences for group in groups_of(large, 0.5, 2048)) == 10_000


@pytest.mark.parametrize("settings", [{"num_samples": 20}, {"recording": "topk", "top_k": 12, "profile": "compact"}])
def test_another_teacher_is_caught(cache, made, tmp_path, settings, capsys) -> None:
    folder = cache(**settings)
    other = _save_teacher(tmp_path / "other", seed=3)
    AutoTokenizer.from_pretrained(made["teacher"]["path"]).save_pretrained(other)
    with pytest.raises(
        MismatchError, match=r"does not hold what its teacher gives; found 0.0% of the rows as they were, .* nats apart"
    ):
        list(rescore(folder, 0.001, teacher=other))
    assert main(["verify", str(folder.parent), "--rescore", "0.001", "--teacher", other, "--device", "cpu"]) == 2
    shown = capsys.readouterr()
    assert "scored again by" in shown.out and "the cache does not hold what its teacher gives" in shown.err
    assert len([line for line in shown.err.splitlines() if line.startswith("capgap: ")]) == 1
    assert main(["verify", str(folder.parent), "--rescore", "0.001", "--device", "cpu"]) == 0


def _moved_teacher(made, folder: Path, share: float = 0.005) -> str:
    """The same teacher, every matrix of its last layer moved by this share of itself, at random."""
    model = LlamaForCausalLM.from_pretrained(made["teacher"]["path"])
    with torch.no_grad():
        for parameter in model.model.layers[-1].parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
                parameter *= 1 + share * noise
    return save_model(folder, model)


@pytest.mark.parametrize("settings", [BOTH, {"recording": "topk", "top_k": 12, "context": "document"}], ids=str)
def test_a_last_layer_moved_by_half_a_percent_is_told_apart(cache, made, tmp_path, settings) -> None:
    folder = cache(**settings)
    with pytest.raises(MismatchError, match="not hold what its teacher gives"):
        list(rescore(folder, 0.1, teacher=_moved_teacher(made, tmp_path / "moved")))


def test_elsewhere_a_moved_teacher_is_told_from_rounding_in_bfloat16_and_other_batches_are_not(
    cache, made, tmp_path, monkeypatch
) -> None:
    """Another machine made the cache, as it says, in bfloat16 and in other batches."""
    folder = cache(dtype="bfloat16", recording="topk", top_k=12, batch_tokens=40, profile="lossless")
    # twice what is told apart of a real model: rounding is more of the logits in a layer as narrow as this one's
    moved = _moved_teacher(made, tmp_path / "moved", 0.01)
    monkeypatch.setattr(rescoring, "machine_kind", lambda device: "another")
    for dtype in (None, "float32"):
        lines = list(rescore(folder, 0.1, dtype=dtype))
        assert lines[-1] == "cache: agrees with its teacher"
        # the batches are the same after all, and in their dtype so are the rows
        assert any("topk: between sequences" in line for line in lines) == (dtype == "float32")
        with pytest.raises(MismatchError, match="does not hold what its teacher gives"):
            list(rescore(folder, 0.1, dtype=dtype, teacher=moved))


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
