"""Which files an import reads for what, and what it takes the teacher to have seen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.interchange.plan import plan
from capgap.schemas.errors import InputError

MINIMAL = ("input_ids", "ids", "logprobs")


def test_a_file_that_is_held_out_is_never_trained_on(
    teacher: Any,
    write: Callable[..., Path],
    settings_for: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    own = write(teacher.rows[:48], "captures/train.parquet", MINIMAL)
    heldout = write(teacher.rows[48:], "captures/heldout.parquet", MINIMAL)
    (tmp_path / "link.parquet").symlink_to(heldout)
    for named in (str(heldout), str(tmp_path / "link.parquet"), f"{tmp_path}/captures/../captures/heldout.*"):
        planned = plan(settings_for(own.parent, heldout=(named,)))
        assert planned.files["student"] == [own]
        assert [path.resolve() for path in planned.files["heldout"]] == [heldout]
        assert len(list(planned.rows("student", with_targets=False))) == 48
        assert len(list(planned.rows("heldout", with_targets=False))) == 12
    told = [vars(record) for record in caplog.records if "files are held out" in record.getMessage()]
    assert {one["event"] for one in told} == {"import_heldout"}
    assert told[0]["fields"] == {"num_heldout": 1, "num_files": 2}


def test_captures_that_are_all_held_out_are_refused(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    captures = write(teacher.rows, columns=MINIMAL)
    with pytest.raises(InputError, match=r"all captures are held out; found 1 files, each of which --heldout names"):
        plan(settings_for(captures, heldout=(str(captures.parent),)))


def test_a_file_that_is_named_twice_is_read_once(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], tmp_path: Path
) -> None:
    captures = write(teacher.rows, "captures/a.parquet", MINIMAL)
    (tmp_path / "captures" / "b.parquet").symlink_to(captures)
    planned = plan(settings_for(captures, captures.parent, captures))
    assert planned.files["student"] == [captures]


def test_a_row_of_several_documents_needs_the_context_to_be_told(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    def marked(row: dict[str, Any], *places: int) -> dict[str, Any]:
        return row | {"starts": [place in places for place in range(len(row["input_ids"]))]}

    single = write([marked(row, 0) for row in teacher.rows], "single.parquet", (*MINIMAL, "starts"))
    assert plan(settings_for(single)).context == "document"
    rows = [marked(row, *((0, 5) if number >= 20 else (0,))) for number, row in enumerate(teacher.rows)]
    several = write(rows, "several.parquet", (*MINIMAL, "starts"))
    with pytest.raises(InputError, match=r"several.parquet, row 20, token 5: what the teacher .*--context document"):
        plan(settings_for(several))
    assert plan(settings_for(several, context="document")).context == "document"
    assert plan(settings_for(several, context="packed")).context == "packed"
    whole = plan(settings_for(several, columns={"starts": "none"}))
    assert whole.context == "document"
    assert all(row.starts_M.tolist() == [True] + [False] * (len(row) - 1) for row in whole.rows("student", False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_as_long_as_the_longest_row_without_its_padding(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], side: str
) -> None:
    rows = []
    for row in teacher.rows:
        num = len(row["input_ids"])
        added = {"input_ids": [0], "ids": [[0]], "logprobs": [[0.0]], "attention_mask": [0]}
        one = {**row, "attention_mask": [1] * num}
        rows.append(
            {
                name: pad * (60 - num) + one[name] if side == "left" else one[name] + pad * (60 - num)
                for name, pad in added.items()
            }
        )
    assert plan(settings_for(write(rows))).seq_len == max(len(row["input_ids"]) for row in teacher.rows) - 1
