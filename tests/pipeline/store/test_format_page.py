"""docs/format.md says what the store writes, and its example runs.

Legend: B sequences, L targets a sequence, K ids kept a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from capgap.pipeline.corpus.stage import SPLITS
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, Codec
from capgap.pipeline.workflow.identity import content_of
from capgap.schemas.facts import CacheFacts, CorpusFacts, TokenizerFacts
from capgap.schemas.manifest import FileEntry, Manifest, MemberEntry, ShardEntry, ShardSet

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
NAMES = [SEQUENCES, SAMPLED, TOPK]


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
    codecs, make_reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str
) -> None:
    reader = make_reader(codecs[name], ((4, 3, 2),))
    monkeypatch.chdir(tmp_path / "shards")
    variables: dict = {}
    exec(_code(), variables)
    blocks = [reader.read(index) for index in range(3)]
    num_ids = [len(targets.ids_D) if name == SAMPLED else targets.ids_BLK.size for _, targets in blocks]
    assert capsys.readouterr().out.splitlines() == [
        f"targets-000000-{index:04d} ({size}, 13) {num_ids[index]} ids" for index, size in enumerate((4, 3, 2))
    ]
    assert variables["tokens"].tolist() == blocks[-1][0].tokens_BL1.tolist()
    assert "capgap" not in _code()
    assert len([line for line in _code().splitlines() if line]) <= 10


@pytest.mark.parametrize(
    ("vocab_size", "id_type"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
@pytest.mark.parametrize(("num_ids", "count_type"), [(5, "uint8"), (255, "uint8"), (256, "uint16")])
@pytest.mark.parametrize("name", NAMES)
def test_the_columns_are_those_of_the_page(make_block, name, vocab_size, id_type, num_ids, count_type) -> None:
    seq_len = 3
    codec = Codec(name, seq_len, vocab_size, num_ids)
    block = make_block(codec, 2)
    data = codec.encode(block.sequences, block.targets)
    schema = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(data)).schema
    sizes = {"L + 1": seq_len + 1, "L": seq_len, "L * K": seq_len * num_ids}
    expected = []
    for codec_name, column, kind, *_ in _table("codec"):
        if codec_name == "every" or _codes(codec_name) == [name]:
            kind = kind.strip("`").replace("ID", id_type).replace("COUNT", count_type)
            base, _, size = kind.partition("[")
            expected.append((*_codes(column), base, sizes[size[:-1]] if size else None))
    assert [(field.name, *_arrow_type(field.type)) for field in schema] == expected


def _arrow_type(kind: pa.DataType) -> tuple[str, int | None]:
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{kind.value_type}>", kind.list_size
    return f"list<{kind.value_type}>", None


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
        for member in shard.members:
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
    text = PAGE[PAGE.index("| `codec` |") : PAGE.index("## Sidecars")]
    for model in (ShardEntry, MemberEntry, CacheFacts, CorpusFacts, TokenizerFacts):
        assert [name for name in model.model_fields if f"`{name}`" not in text] == []
    files = next(row for row in PAGE.splitlines() if row.startswith("| `files` |"))
    assert [name for name in FileEntry.model_fields if f"`{name}`" not in files] == []
    assert f"| `format` | `{Manifest.model_fields['format'].default}` |" in PAGE


def test_the_names_of_the_shard_sets_are_those_of_the_page() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith("NAME-000000.tar ...")]
    assert _codes(line)[:3] == list(SPLITS)


def test_the_content_digest_is_computed_as_the_page_says() -> None:
    files = [FileEntry(path=path, num_bytes=1, sha256=path * 3) for path in ("b", "a/\u00fc", "metrics.csv", "a")]
    listed = sorted([file.path, file.sha256] for file in files if file.path != "metrics.csv")
    text = json.dumps(listed, separators=(",", ":"))
    assert content_of(files) == hashlib.sha256(text.encode("ascii")).hexdigest()


def test_a_reader_that_follows_the_page_finds_the_targets_of_one_position(codecs, make_reader, tmp_path: Path) -> None:
    """Sequence 1, target 5, straight from the columns, against our reader."""
    for name in (SAMPLED, TOPK):
        reader: ShardReader = make_reader(codecs[name], ((3,),))
        member = reader.shard_set.shards[0].members[0]
        data = (tmp_path / "shards" / "targets-000000.tar").read_bytes()[member.offset :][: member.num_bytes]
        row = pa.ipc.open_stream(zstandard.ZstdDecompressor().decompress(data)).read_next_batch().to_pylist()[1]
        _, targets = reader.read(0)
        if name == TOPK:
            kept = codecs[name].num_ids
            assert row["ids"][5 * kept : 6 * kept] == targets.ids_BLK[1, 5].tolist()
        else:
            start = sum(row["num_ids"][:5])
            place = int(targets.num_ids_BL[0].sum() + targets.num_ids_BL[1, :5].sum())
            stop = start + row["num_ids"][5]
            assert row["ids"][start:stop] == targets.ids_D[place : place + stop - start].tolist()
            assert sum(row["counts"][start:stop]) == codecs[name].num_ids
        assert row["label_logprobs"][5] == targets.label_logprobs_BL[1, 5]
        (tmp_path / "shards").rename(tmp_path / name)
