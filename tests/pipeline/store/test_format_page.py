"""docs/format.md says what the store writes, and its example runs.

Legend: B sequences, L targets a sequence, K ids kept a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct
import tarfile
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import zstandard

from capgap.pipeline.corpus.stage import SPLITS
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS, Codec
from capgap.schemas.facts import CacheFacts, CorpusFacts, RecordingFacts, ShardFacts, TokenizerFacts, heldout_set
from capgap.schemas.manifest import FileEntry, Manifest, Members, ShardEntry, ShardSet
from capgap.schemas.run_cache import RecordingName

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
NAMES = [SEQUENCES, SAMPLED, *TOPK_CODECS.values()]
SIZES = ((3, 1), (4,), (2, 2, 1))


def _table(first_column: str) -> list[list[str]]:
    """The cells of the table with that heading, without the heading."""
    start = PAGE.index(f"| {first_column} |")
    lines = PAGE[start:].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _code() -> str:
    (found,) = re.findall(r"<!-- a test runs this -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.mark.parametrize("name", [SAMPLED, TOPK])
def test_the_example_reads_every_member_in_ten_lines(
    ranked_codecs, make_reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str
) -> None:
    reader = make_reader(ranked_codecs[name], ((4, 3, 2),))
    monkeypatch.chdir(tmp_path / "shards")
    # the shards of these tests are of no cache, and are named otherwise
    exec(_code().replace("sampled-", "targets-"), {})
    tokens = [reader.read(index)[0].tokens_BL1.astype(np.uint32) for index in range(3)]
    expected = [f"targets-000000-{index:04d} {tokens_BL1}" for index, tokens_BL1 in enumerate(tokens)]
    assert capsys.readouterr().out == "\n".join(expected) + "\n"
    assert "capgap" not in _code()
    assert len([line for line in _code().splitlines() if line]) <= 10


@pytest.mark.parametrize(("vocab_size", "planes"), [(256, 1), (257, 2), (65536, 2), (65537, 3)])
@pytest.mark.parametrize(("num_ids", "count_type"), [(5, "uint8"), (255, "uint8"), (256, "uint16")])
@pytest.mark.parametrize("name", NAMES)
def test_the_columns_are_those_of_the_page(make_block, name, vocab_size, planes, num_ids, count_type) -> None:
    seq_len = 3
    codec = Codec(name, seq_len, vocab_size, num_ids if name == SAMPLED else min(num_ids, vocab_size))
    block = make_block(codec, 2)
    data = codec.encode(block.sequences, block.targets)
    schema = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(data)).schema
    expected = []
    for codec_name, column, number, kind, _ in _table("codec"):
        if codec_name == "every" or _codes(codec_name) == [name]:
            base, _, size = kind.strip("`").replace("COUNT", count_type).partition("[")
            (column,) = _codes(column)
            names = [column]
            if column.endswith("_i"):
                names = [f"{column[:-1]}{i}" for i in range(planes if number == "P" else int(number))]
            width = math.ceil(eval(size[:-1], {"L": seq_len, "K": codec.num_ids})) if size else None
            expected += [(name, base, width) for name in names]
    assert [(field.name, *_arrow_type(field.type)) for field in schema] == expected


def _arrow_type(kind: pa.DataType) -> tuple[str, int | None]:
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{kind.value_type}>", kind.list_size
    return f"list<{kind.value_type}>", None


class _Page:
    """A reader that knows the page and nothing of capgap: number by number, in plain Python.

    Args:
        batch: of one member.
        name: of the codec.
        id_of_rank: the ranking.
        num_ids: n or K.
    """

    def __init__(self, batch: pa.RecordBatch, name: str, id_of_rank: list[int], num_ids: int) -> None:
        self._rows, self._name, self._id_of_rank, self._num_ids = batch.to_pylist(), name, id_of_rank, num_ids
        self._quads, self._escapes = iter(()), iter(())
        self._pending: list[int] = []

    def sequences(self) -> list[dict[str, list]]:
        return [self._sequence(row) for row in self._rows]

    def _sequence(self, row: dict[str, list[int]]) -> dict[str, list]:
        tokens = self._ids(self._join(row, "tokens"))
        flags = {name: [row[name][j // 8] >> j % 8 & 1 for j in range(len(tokens))] for name in ("starts", "mask")}
        if self._name == SEQUENCES:
            return {"tokens": tokens, **flags}
        labels = [-code / 64 for code in self._join(row, "label")]
        if self._name == SAMPLED:
            return {"tokens": tokens, **flags, "labels": labels, "targets": self._sampled(row)}
        if self._name == TOPK_CODECS["lossless"]:
            labels, tails = (self._floats(self._join(row, name)) for name in ("label", "tail"))
        else:
            tails = [0 if code == 65535 else math.exp(-code / 64) for code in self._join(row, "tail")]
        targets = {"tails": tails, "log_tails": self._log_tails(row), "targets": self._topk(row, len(labels))}
        return {"tokens": tokens, **flags, "labels": labels, **targets}

    def _log_tails(self, row: dict[str, list[int]]) -> list[list[float]]:
        found = []
        for number in range(1, 3):
            words = self._join(row, f"tail{number}")
            if words and self._name == TOPK_CODECS["lossless"]:
                found.append(self._floats(words))
            elif words:
                found.append([-math.inf if code == 65535 else 17 - code / 64 for code in words])
        return found

    def _sampled(self, row: dict[str, list[int]]) -> list[list[tuple[int, int]]]:
        counts, repeated, once = (
            iter(v) for v in (row["counts"], self._join(row, "repeated"), self._join(row, "once"))
        )
        targets = []
        for num_repeated in row["num_repeated"]:
            mine = list(itertools.islice(counts, num_repeated))
            ranks = list(itertools.islice(repeated, num_repeated))
            ranks += itertools.accumulate(itertools.islice(once, self._num_ids - sum(mine)))
            mine += [1] * (len(ranks) - num_repeated)
            targets.append(list(zip(self._ids(ranks), mine, strict=True)))
        return targets

    def _topk(self, row: dict[str, list[int]], length: int) -> list[list[tuple[int, float]]]:
        kept = row.get("top_k", [self._num_ids] * length)
        ids = iter(self._ids(self._join(row, "ids")))
        ids_of = [list(itertools.islice(ids, size)) for size in kept]
        return [list(zip(ids_of[i], logprobs, strict=True)) for i, logprobs in enumerate(self._logprobs(row, kept))]

    def _logprobs(self, row: dict[str, list[int]], kept: list[int]) -> list[list[float]]:
        if self._name == TOPK_CODECS["lossless"]:
            values = iter(self._floats(self._join(row, "logprobs")))
            return [list(itertools.islice(values, size)) for size in kept]
        if self._quads_are_used:
            self._quads, self._escapes, self._pending = iter(row["quads"]), iter(row["escapes"]), []
        if self._name == TOPK_CODECS["small"]:
            steps = [[self._number() for _ in range(size)] for size in kept]
        elif self._name == TOPK_CODECS["compact"]:
            flat = [self._number() for _ in range(sum(kept))]
            steps = [flat[i :: len(kept)] for i in range(len(kept))]
        else:
            flat = self._join(row, "steps")
            steps = [flat[i :: len(kept)] for i in range(len(kept))]
        meaning = self._companded if self._quads_are_used else lambda code: -code / 64
        return [[meaning(code) for code in itertools.accumulate(of)] for of in steps]

    @property
    def _quads_are_used(self) -> bool:
        return "quads" in self._rows[0]

    def _number(self) -> int:
        if not self._pending:
            quad = next(self._quads)
            self._pending = [quad >> 2 * i & 3 for i in range(4)]
        number = self._pending.pop(0)
        return number + next(self._escapes) if number == 3 else number

    @staticmethod
    def _companded(code: int) -> float:
        return 2 * math.log(1 - min(code, 86) / 96) - max(code - 86, 0) / 5

    @staticmethod
    def _join(row: dict[str, list[int]], name: str) -> list[int]:
        planes = [row[f"{name}_{i}"] for i in range(4) if f"{name}_{i}" in row]
        return [sum(byte << 8 * i for i, byte in enumerate(of)) for of in zip(*planes, strict=True)]

    @staticmethod
    def _floats(bits: list[int]) -> list[float]:
        return [struct.unpack("<f", struct.pack("<I", word))[0] for word in bits]

    def _ids(self, ranks: list[int]) -> list[int]:
        return [self._id_of_rank[rank] for rank in ranks]


def _require_same(page: _Page, reader: ShardReader, index: int) -> None:
    sequences, targets = reader.read(index)
    place = 0
    for b, found in enumerate(page.sequences()):
        assert found["tokens"] == sequences.tokens_BL1[b].tolist()
        assert found["starts"] == sequences.starts_BL1[b].astype(int).tolist()
        assert found["mask"] == sequences.mask_BL1[b].astype(int).tolist()
        if targets is None:
            continue
        assert found["labels"] == pytest.approx(targets.label_logprobs_BL[b].tolist(), abs=1e-6)
        if hasattr(targets, "counts_D"):
            for i, row in enumerate(found["targets"]):
                stop = place + int(targets.num_ids_BL[b, i])
                assert row == list(
                    zip(targets.ids_D[place:stop].tolist(), targets.counts_D[place:stop].tolist(), strict=True)
                )
                place = stop
            continue
        assert found["tails"] == pytest.approx(targets.tail_BL[b].tolist(), rel=1e-5)
        assert len(found["log_tails"]) == targets.log_tails_BLT.shape[2]
        for number, logs in enumerate(found["log_tails"]):
            assert logs == pytest.approx(targets.log_tails_BLT[b, :, number].tolist(), rel=1e-5)
        for i, row in enumerate(found["targets"]):
            real_K = np.isfinite(targets.logprobs_BLK[b, i])
            assert [i for i, _ in row] == targets.ids_BLK[b, i][real_K].tolist()
            # float32 rounding of up to 24 nats
            assert [p for _, p in row] == pytest.approx(targets.logprobs_BLK[b, i][real_K].tolist(), abs=4e-6)


def _page_of(content: bytes, codec: Codec) -> _Page:
    batch = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(content)).read_next_batch()
    id_of_rank = list(range(300)) if codec.ranking is None else codec.ranking.ids_V.tolist()
    return _Page(batch, codec.name, id_of_rank, codec.num_ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_read_with_webdataset_arrow_and_zstandard_alone(
    ranked_codecs, make_reader, tmp_path: Path, name: str
) -> None:
    reader = make_reader(ranked_codecs[name], SIZES)
    index = 0
    for shard in reader.shard_set.shards:
        samples = webdataset.WebDataset(str(tmp_path / "shards" / shard.file.path), shardshuffle=False)
        for number, sample in enumerate(samples):
            assert sample["__key__"] == shard.member(number).key
            _require_same(_page_of(sample["arrow.zst"], ranked_codecs[name]), reader, index)
            index += 1
    assert index == 6


@pytest.mark.parametrize("extra", [(), (0.5, 4.0)], ids=["one temperature", "three temperatures"])
@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_read_with_tarfile_alone(codecs, make_reader, tmp_path: Path, name: str, extra) -> None:
    codec = dataclasses.replace(codecs[name], extra_temperatures=extra if name in TOPK_CODECS.values() else ())
    reader = make_reader(codec, SIZES)
    assert reader.codec == codec
    index = 0
    for shard in reader.shard_set.shards:
        path = tmp_path / "shards" / shard.file.path
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                number = int(member.name.split(".")[0].split("-")[-1])
                assert member.name == f"{path.stem}-{number:04d}.arrow.zst"
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                _require_same(_page_of(tar.extractfile(member).read(), codecs[name]), reader, index)
                index += 1
    assert index == 6


def test_the_errors_are_those_of_the_page(codecs) -> None:
    start = PAGE.index("| codec | a kept id's logprob, nats |")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE[start:].split("\n\n")[0].splitlines()
    ]
    assert [_codes(row[0]) for row in rows[2:]] == [[name] for name in NAMES[1:]]
    for (name,), kept, _, label in ((_codes(row[0]), *row[1:]) for row in rows[2:]):
        error = codecs[name].error
        assert error.label_nats == eval(label)
        assert error.kept_nats == (0 if name == SAMPLED else eval(kept.split(";")[0]))
    assert codecs[TOPK].error.floor_nats == -65535 / 64
    assert round(codecs[TOPK_CODECS["small"]].error.floor_nats, 2) == -23.92


@pytest.mark.parametrize("name", NAMES)
def test_a_member_is_one_stream_of_one_batch_in_one_frame_as_the_page_says(codecs, make_block, name: str) -> None:
    block = make_block(codecs[name])
    data = codecs[name].encode(block.sequences, block.targets)
    frame = zstandard.get_frame_parameters(data)
    content = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    assert (frame.has_checksum, frame.content_size, frame.dict_id) == (True, len(content), 0)
    (batch,) = list(pa.ipc.open_stream(content))
    assert batch.num_rows == len(block.sequences)
    assert sum(column.null_count for column in batch.columns) == 0


def test_a_shard_is_a_plain_tar_as_the_page_says(codecs, make_reader, tmp_path: Path) -> None:
    reader = make_reader(codecs[TOPK], ((4, 3, 2), (1,)))
    for shard in reader.shard_set.shards:
        path = tmp_path / "shards" / shard.file.path
        data = path.read_bytes()
        assert len(data) % 10240 == 0
        end = 0
        for member in shard.each_member():
            header = data[member.offset - 512 : member.offset]
            assert header[257:265] == b"ustar\x0000"
            assert member.offset - 512 == end, "a header follows the data before it, padded to 512"
            end = -(-(member.offset + member.num_bytes) // 512) * 512
            assert not any(data[member.offset + member.num_bytes : end])
        assert not any(data[end:])
        with tarfile.open(path) as tar:
            assert {(m.type, m.mtime, m.uid, m.gid) for m in tar} == {(tarfile.REGTYPE, 0, 0, 0)}


def test_the_manifests_keys_are_those_of_the_page() -> None:
    manifest_table, set_table = (
        [name for row in part.splitlines()[2:] for name in _codes(row.strip("|").split("|")[0])]
        for part in (PAGE[m.start() :].split("\n\n")[0] for m in re.finditer(r"\| key \| holds \|", PAGE))
    )
    assert sorted(manifest_table) == sorted(Manifest.model_fields)
    assert set_table == [*ShardSet.model_fields, "shards[].members"]
    text = PAGE[PAGE.index("| `codec` |") : PAGE.index("## What a token takes")]
    for model in (ShardEntry, Members, CacheFacts, RecordingFacts, ShardFacts, CorpusFacts, TokenizerFacts):
        assert [name for name in model.model_fields if f"`{name}`" not in text] == []
    files = next(row for row in PAGE.splitlines() if row.startswith("| `files` |"))
    assert [name for name in FileEntry.model_fields if f"`{name}`" not in files] == []
    assert f"| `format` | `{Manifest.model_fields['format'].default}` |" in PAGE


def test_the_names_of_the_shard_sets_are_those_of_the_page() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith("NAME-000000.tar ...")]
    assert _codes(line) == [*SPLITS, *get_args(RecordingName), heldout_set("")]


PATHS = {"1": "b", "2": "a/\u00fc", "3": "metrics.csv", "4": "a"}


def test_the_content_digest_is_computed_as_the_page_says() -> None:
    files = [FileEntry(path=path, num_bytes=1, sha256=name * 64) for name, path in PATHS.items()]
    listed = sorted([file.path, file.sha256] for file in files if file.path != "metrics.csv")
    text = json.dumps(listed, separators=(",", ":"))
    assert content_of(files) == hashlib.sha256(text.encode("ascii")).hexdigest()
