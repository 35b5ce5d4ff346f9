"""A cache goes out as Parquet, and comes in again as what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from capgap.jobs.interchange import export_command
from capgap.pipeline.interchange.export import export_cache
from capgap.pipeline.interchange.folders import make_folder, order_for
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.stage.context import StageResult
from capgap.pipeline.store import Block, Codec, ShardWriter, read_blocks
from capgap.pipeline.store.codec import SAMPLED
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, RecordingFacts, TokenizerFacts
from capgap.schemas.records import SampledTargets, Sequences

MINIMAL = ("input_ids", "ids", "logprobs")


@pytest.fixture
def cache(teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]) -> Any:
    return import_captures(settings_for(write(teacher.rows, columns=MINIMAL), profile="lossless")).cache


def test_every_shard_is_a_file_of_its_sequences_and_decoded_targets(cache: Any, tmp_path: Path) -> None:
    made = export_cache(str(cache.path), tmp_path / "out")
    shards = cache.manifest.shard_sets["topk"].shards
    assert made.num_files == len(shards) + len(cache.manifest.shard_sets["heldout-topk"].shards)
    rows = [
        row
        for number in range(len(shards))
        for row in pyarrow.parquet.read_table(tmp_path / "out" / "topk" / f"train-{number:06d}.parquet").to_pylist()
    ]
    at = iter(rows)
    for sequences, targets in read_blocks(cache.path, cache.manifest.shard_sets["topk"]):
        for b in range(len(sequences)):
            row = next(at)
            assert row["input_ids"] == sequences.tokens_BL1[b].tolist()
            assert row["loss_mask"] == sequences.mask_BL1[b].tolist()
            assert row["starts"] == sequences.starts_BL1[b].tolist()
            assert row["ids"] == targets.ids_BLK[b].tolist()
            assert row["logprobs"] == targets.logprobs_BLK[b].tolist()
            assert row["tail"] == targets.tail_BL[b].tolist()
            assert row["label_logprobs"] == [None if np.isnan(p) else p for p in targets.label_logprobs_BL[b].tolist()]
    assert next(at, None) is None


@pytest.mark.parametrize("profile", ["lossless", "near-lossless", "compact"])
def test_what_went_out_comes_in_again_as_it_was(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], tmp_path: Path, profile: str
) -> None:
    first = import_captures(settings_for(write(teacher.rows, columns=MINIMAL), profile=profile)).cache
    export_cache(str(first.path), tmp_path / "out")
    captures, heldout = (str(tmp_path / "out" / "topk" / f"{split}-*.parquet") for split in ("train", "heldout"))
    # written exactly, what was decoded comes back bit by bit
    settings = settings_for(
        Path(captures), heldout=(heldout,), profile="lossless", out=str(tmp_path / "again"), context="document"
    )
    again = import_captures(settings).cache
    for name in ("topk", "heldout-topk"):
        there = list(read_blocks(first.path, first.manifest.shard_sets[name]))
        here = list(read_blocks(again.path, again.manifest.shard_sets[name]))
        for (sequences, targets), (others, found) in zip(there, here, strict=True):
            assert np.array_equal(sequences.tokens_BL1, others.tokens_BL1)
            assert np.array_equal(sequences.starts_BL1, others.starts_BL1)
            assert np.array_equal(sequences.mask_BL1[:, 1:], others.mask_BL1[:, 1:])
            for field in ("ids_BLK", "logprobs_BLK", "tail_BL"):
                assert np.array_equal(getattr(targets, field), getattr(found, field)), field
            assert np.array_equal(np.isnan(targets.label_logprobs_BL), np.isnan(found.label_logprobs_BL))


def test_what_the_small_profile_kept_of_each_target_comes_in_again_whole(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], tmp_path: Path
) -> None:
    """A sharp teacher: some targets keep one id, others all eight."""

    def sharp(row: dict[str, Any]) -> dict[str, Any]:
        logits_TK = 2.5 * np.array(row["logprobs"])
        return row | {"logprobs": (logits_TK - np.log(np.exp(logits_TK).sum(axis=1, keepdims=True))).tolist()}

    captures = write([sharp(row) for row in teacher.rows], columns=MINIMAL)
    first = import_captures(settings_for(captures, profile="small", context="packed")).cache
    export_cache(str(first.path), tmp_path / "out")
    files, heldout = (str(tmp_path / "out" / "topk" / f"{split}-*.parquet") for split in ("train", "heldout"))
    own = {"heldout": (heldout,), "out": str(tmp_path / "again")}
    with pytest.raises(InputError, match=r"far fewer ids than others have; .*--profile small"):
        import_captures(settings_for(Path(files), **own))
    again = import_captures(settings_for(Path(files), profile="small", **own), force=True).cache
    assert again.manifest.facts["recordings"] == first.manifest.facts["recordings"]
    assert again.manifest.facts["context"] == "packed", "the files say so"
    widths = set()
    for name in ("topk", "heldout-topk"):
        there = list(read_blocks(first.path, first.manifest.shard_sets[name]))
        here = list(read_blocks(again.path, again.manifest.shard_sets[name]))
        for (sequences, targets), (others, found) in zip(there, here, strict=True):
            assert np.array_equal(sequences.tokens_BL1, others.tokens_BL1)
            counts_BL = sequences.mask_BL1[:, 1:]
            widths |= set(np.isfinite(targets.logprobs_BLK[counts_BL]).sum(axis=1).tolist())
            for field in ("ids_BLK", "logprobs_BLK", "tail_BL"):
                assert np.array_equal(getattr(targets, field)[counts_BL], getattr(found, field)[counts_BL]), field
    assert {1, 2, 8} < widths


def test_finished_files_are_kept_and_another_cache_s_are_refused(
    cache: Any,
    tmp_path: Path,
    write: Callable[..., Path],
    teacher: Any,
    settings_for: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    export_cache(str(cache.path), out)
    first, second = (out / "topk" / f"train-{number:06d}.parquet" for number in range(2))
    kept = first.stat().st_mtime_ns
    second.unlink()
    made = export_cache(str(cache.path), out)
    assert made.num_kept_files == made.num_files - 1 and second.is_file() and first.stat().st_mtime_ns == kept
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "json")
    assert export_command([str(cache.path), "--to", str(out)]) == 0
    fields = json.loads(capsys.readouterr().out)["fields"]
    assert (fields["num_files"], fields["num_kept_files"]) == (made.num_files, made.num_files)
    assert "top_k" not in fields
    other = settings_for(write(teacher.rows[:40], "b.parquet", MINIMAL), out=str(tmp_path / "other"))
    with pytest.raises(MismatchError, match=r"the folder holds something else.*another folder with --to"):
        export_cache(str(import_captures(other).cache.path), out)


def test_an_export_is_not_imported_as_something_else(
    cache: Any, teacher: Any, tmp_path: Path, settings_for: Callable[..., Any]
) -> None:
    export_cache(str(cache.path), tmp_path / "out")
    captures = tmp_path / "out" / "topk"
    with pytest.raises(MismatchError, match=r"of another context; found document, expected packed"):
        import_captures(settings_for(captures, context="packed"))
    with pytest.raises(MismatchError, match=r"of another temperature; found 1.0, expected 2.0"):
        import_captures(settings_for(captures, temperature=2.0))


def test_an_export_with_another_tokenizer_is_refused(
    cache: Any, tmp_path: Path, settings_for: Callable[..., Any]
) -> None:
    from capgap.pipeline.corpus.tokenizer import train_tokenizer

    export_cache(str(cache.path), tmp_path / "out")
    train_tokenizer(["other words altogether " * 30], 300).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"the captures were made with another tokenizer"):
        import_captures(settings_for(tmp_path / "out" / "topk", tokenizer=str(tmp_path / "other")))


def test_datasets_reads_the_files_and_the_card(cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    export_cache(str(cache.path), out)
    files = str(out / "topk" / "train-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    first = next(iter(rows))
    sequences, targets = next(read_blocks(cache.path, cache.manifest.shard_sets["topk"]))
    assert first["input_ids"] == sequences.tokens_BL1[0].tolist() and first["ids"] == targets.ids_BLK[0].tolist()
    head = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    (config,) = head["configs"]
    assert [part["split"] for part in config["data_files"]] == ["train", "heldout"]
    assert all(list(out.glob(part["path"])) for part in config["data_files"])


def test_counts_of_samples_go_out_as_they_are(tmp_path: Path) -> None:
    tokens_BL1 = np.tile(np.arange(1, 10, dtype=np.int32), (2, 1))
    ids_D = np.stack([tokens_BL1[:, 1:], tokens_BL1[:, 1:] + 20], axis=2).ravel()
    targets = SampledTargets(
        np.full((2, 8), 2, np.int32),
        ids_D,
        np.tile(np.array([3, 1], np.int32), 16),
        np.full((2, 8), np.log(0.75), np.float32),
    )
    flags_BL1 = tokens_BL1 > 2

    def work(folder: Path) -> StageResult:
        writer = ShardWriter(folder, folder / "work" / "shards", "sampled", Codec(SAMPLED, 8, 40, 4))
        shard = writer.write(0, [Block(Sequences(tokens_BL1, flags_BL1, flags_BL1), targets)])
        facts = CacheFacts(
            tokenizer=TokenizerFacts(fingerprint="none", vocab_size=40, eos_id=0),
            context="packed",
            splits={},
            text_sources=("somewhere",),
            whole_conversations=False,
            temperature=1.0,
            recordings={"sampled": RecordingFacts(num_ids=4, temperatures=(1.0,))},
            padded_vocab_size=40,
            num_teacher_parameters=None,
            engines=("by hand",),
            dtypes=("float32",),
            mean_label_loss=0.2877,
        )
        return StageResult(facts=facts.model_dump(mode="json"), shard_sets={"sampled": writer.shard_set([shard])})

    made = make_folder(tmp_path / "cache", order_for("cache", {}, {}), (), {}, work, False)
    export_cache(str(made.path), tmp_path / "out")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "sampled" / "train-000000.parquet").to_pylist()
    assert [row["input_ids"] for row in rows] == tokens_BL1.tolist()
    # an order within a target is none of a count's
    found = [dict(zip(*of, strict=True)) for row in rows for of in zip(row["ids"], row["counts"], strict=True)]
    assert found == [{int(ids[0]): 3, int(ids[1]): 1} for ids in ids_D.reshape(-1, 2)]


def test_what_is_no_cache_and_what_it_lacks_are_refused(cache: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found a finished corpus stage"):
        export_cache(str(cache.path.parent / "corpus"), tmp_path / "out")
    with pytest.raises(InputError, match=r"found no manifest.json"):
        export_cache(str(tmp_path), tmp_path / "out")
    with pytest.raises(SettingError, match="no such recording; found sampled, expected one of topk"):
        export_cache(str(cache.path), tmp_path / "out", ("sampled",))
