"""What stands in padding is not looked at, whatever it is; the same elsewhere is refused by file and row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from capgap.pipeline.interchange.captures import CapturedRow
from capgap.pipeline.interchange.list_targets import ListTargets
from capgap.pipeline.interchange.parquet import Layout, read_rows
from capgap.schemas.errors import InputError
from capgap.schemas.interchange import ColumnNames

KINDS = {"input_ids": pa.list_(pa.uint64()), "ids": pa.list_(pa.list_(pa.uint64()))}


def rows_of(path: Path, vocab_size: int, offset: int = 0) -> list[CapturedRow]:
    columns = ColumnNames()
    return list(read_rows(path, Layout(columns, vocab_size, ListTargets(columns, vocab_size, offset))))


def is_same(row: CapturedRow, other: CapturedRow) -> bool:
    assert row.targets is not None and other.targets is not None
    arrays = [(getattr(row, name), getattr(other, name)) for name in ("tokens_M", "starts_M", "mask_M")]
    arrays += [(array, getattr(other.targets, name)) for name, array in vars(row.targets).items()]
    return all(here.dtype == there.dtype and np.array_equal(here, there, equal_nan=True) for here, there in arrays)


PADDINGS: dict[str, dict[str, Any]] = {
    "null tokens": {"input_ids": None},
    "tokens past 31 bits": {"input_ids": 2**40},
    "tokens of -1 in 64 bits without a sign": {"input_ids": 2**64 - 1},
    "ids of -1 in 32 bits without a sign": {"ids": [2**32 - 1] * 8, "logprobs": [0.0] * 8},
    "nulls within a target": {"ids": [None] * 8, "logprobs": [None] * 8},
    "null marks": {"loss_mask": None, "starts": None},
    "other marks": {"loss_mask": -7, "starts": 9},
    "null labels": {"labels": None},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDINGS)
def test_padding_may_hold_what_is_no_number_of_that_kind(
    teacher: Any, write: Callable[..., Path], name: str, side: str, tmp_path: Path
) -> None:
    usual = {"input_ids": 0, "ids": [0] * 8, "logprobs": [0.0] * 8, "attention_mask": 0}
    marks = {"loss_mask": 0, "starts": 0} if name != "null labels" else {"labels": 0}
    pads = usual | marks | PADDINGS[name]
    rows, plain = [], []
    for row in teacher.rows[:20]:
        num = len(row["input_ids"])
        own = {one: [*row[one], None] for one in ("ids", "logprobs")} | {"input_ids": row["input_ids"]}
        own |= {"attention_mask": [1] * num}
        own |= {"loss_mask": [1] * num, "starts": [1] + [0] * (num - 1)} if "labels" not in marks else {}
        own |= {"labels": [-100, *row["input_ids"][1:]]} if "labels" in marks else {}
        plain.append(own)
        rows.append({one: [pads[one]] * 3 + own[one] if side == "left" else own[one] + [pads[one]] * 3 for one in own})
    table = pa.table({one: pa.array([row[one] for row in rows], KINDS.get(one)) for one in rows[0]})
    pyarrow.parquet.write_table(table, tmp_path / "padded.parquet")
    expected = rows_of(write(plain, "plain.parquet"), teacher.vocab_size)
    found = rows_of(tmp_path / "padded.parquet", teacher.vocab_size)
    assert len(found) == 20 and all(map(is_same, found, expected))


BROKEN = {
    "a null token": ("input_ids", [None], "row 7, input_ids: null where a number must be; found 1 of"),
    "a token past 31 bits": (
        "input_ids",
        [2**40],
        "row 7: a token outside the vocabulary; found [0-9]+ to 1099511627776",
    ),
    "an id past 31 bits": ("ids", [[2**32 + 5]], "row 7: an id outside the vocabulary; found 4294967301"),
    "a null mark": ("loss_mask", [None], "row 7, loss_mask: null where a number must be; found 1 of"),
    "a null in the attention mask": ("attention_mask", [None], "row 7, attention_mask: null where a number must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_same_outside_of_padding_is_refused_by_file_and_row(
    teacher: Any, write: Callable[..., Path], name: str
) -> None:
    column, value, said = BROKEN[name]
    rows = [
        row | {one: [1] * len(row["input_ids"]) for one in ("loss_mask", "attention_mask")} for row in teacher.rows[:20]
    ]
    if column == "ids":
        value = [[*value[0], *rows[7]["ids"][0][1:]]]
    rows[7] = rows[7] | {column: [*value, *rows[7][column][1:]]}
    with pytest.raises(InputError, match=said):
        rows_of(write(rows), teacher.vocab_size)


def test_an_id_past_31_bits_without_a_probability_only_fills_up_a_list(
    teacher: Any, write: Callable[..., Path]
) -> None:
    rows = [
        row
        | {"ids": [[*ids, 2**32 - 1] for ids in row["ids"]], "logprobs": [[*one, -9999.0] for one in row["logprobs"]]}
        for row in teacher.rows[:5]
    ]
    for row in rows_of(write(rows), teacher.vocab_size):
        assert row.targets is not None and (row.targets.widths_T == 8).all()
