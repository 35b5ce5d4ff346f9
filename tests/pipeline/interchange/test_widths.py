"""How many ids are kept where targets have more or fewer of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.pipeline.interchange.captures import CapturedRow, RowTargets
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.interchange.widths import MOST_CUT, choose_top_k, kept
from capgap.pipeline.store import read_blocks
from capgap.schemas.errors import InputError
from capgap.schemas.records import TopkTargets

VOCAB = 50
MINIMAL = ("input_ids", "ids", "logprobs")


def row_of(widths: list[int], counts: list[bool] | None = None) -> CapturedRow:
    """A row whose targets have so many ids, each with a probability of 1 in 20."""
    num, widest = len(widths), max(widths)
    is_id_TW = np.arange(widest) < np.array(widths)[:, None]
    targets = RowTargets(
        np.where(is_id_TW, np.arange(10, 10 + widest), -1).astype(np.int32),
        np.where(is_id_TW, np.float32(np.log(0.05)), -np.inf).astype(np.float32),
        (1 - 0.05 * np.array(widths)).astype(np.float32),
        np.full(num, np.nan, np.float32),
    )
    starts_M, mask_M = np.arange(num + 1) == 0, np.array([True, *(counts or [True] * num)])
    return CapturedRow("captures.parquet, row 3", np.zeros(num + 1, np.int32), starts_M, mask_M, targets)


def test_a_target_whose_label_does_not_count_decides_nothing_and_is_uniform() -> None:
    row = row_of([0, 1, 8, 8], [False, False, True, True])
    assert choose_top_k([row], False, 0, MOST_CUT) == 8
    for is_ragged, num_silent in ((False, 2), (True, 1)):
        found = kept(row, 8, VOCAB, is_ragged)
        assert found.logprobs_TW[:num_silent] == pytest.approx(-np.log(VOCAB))
        assert found.tail_T[:num_silent] == pytest.approx(1 - 8 / VOCAB)
        assert found.ids_TW[2:].tolist() == [list(range(10, 18))] * 2
        assert found.tail_T[2:] == pytest.approx(0.6)


def test_the_number_is_told_where_it_is_not_that_of_all(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_top_k([row_of([8, 8])], False, 0, MOST_CUT) == 8
        assert not caplog.text
        assert choose_top_k([row_of([8, 7, 8])], False, 0, MOST_CUT) == 7
    assert "7 ids of each target are kept" in caplog.text and "row 3, target 1" in caplog.text
    (told,) = [vars(record) for record in caplog.records]
    assert told["event"] == "import_top_k" and (told["fields"]["top_k"], told["fields"]["widest"]) == (7, 8)


def test_one_narrow_target_does_not_cut_all_others_unasked() -> None:
    with pytest.raises(InputError, match=r"row 3, target 2: a target with far fewer ids.*found 2, where .*--top_k 2"):
        choose_top_k([row_of([8] * 5), row_of([8, 8, 2, 8])], False, 0, MOST_CUT)
    with pytest.raises(InputError, match=r"far fewer"):
        choose_top_k([row_of([8, 7])], False, 0, 0)


def test_a_ragged_recording_keeps_of_each_target_what_it_has() -> None:
    row = row_of([8, 2, 5])
    assert choose_top_k([row], True, 0, MOST_CUT) == 8
    assert choose_top_k([row], True, 12, MOST_CUT) == 12, "an export says how many its widest has"
    found = kept(row, 6, VOCAB, True)
    assert np.isfinite(found.logprobs_TW).sum(axis=1).tolist() == [6, 2, 5]
    assert found.tail_T == pytest.approx([0.7, 0.9, 0.75]), "what is cut joins the tail"
    assert (found.ids_TW[np.isneginf(found.logprobs_TW)] == 0).all()
    assert kept(row, 12, VOCAB, True).ids_TW.shape == (3, 12)


def test_a_target_without_ids_whose_label_counts_is_refused_by_name() -> None:
    row = row_of([8, 0, 8])
    for is_ragged in (False, True):
        with pytest.raises(InputError, match=r"captures.parquet, row 3, target 1: a target without ids"):
            choose_top_k([row], is_ragged, 0, MOST_CUT)
        with pytest.raises(InputError, match=r"captures.parquet, row 3, target 1: a target without ids"):
            kept(row, 1, VOCAB, is_ragged)
    with pytest.raises(
        InputError, match=r"target 1: a target with fewer ids than are kept; found 2.*--top_k 2 or fewer"
    ):
        kept(row_of([8, 2]), 4, VOCAB, False)


SILENCES: dict[str, tuple[list[Any] | None, list[Any] | None]] = {
    "nothing": ([], []),
    "null": (None, None),
    "id 0 without a probability": ([0] * 8, [float("-inf")] * 8),
}


@pytest.mark.parametrize("name", SILENCES)
def test_a_prompt_without_targets_leaves_the_answer_s_whole(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], name: str
) -> None:
    ids, logprobs = SILENCES[name]

    def answered(row: dict[str, Any]) -> dict[str, Any]:
        num = len(row["input_ids"]) // 3
        return {
            "input_ids": row["input_ids"],
            "loss_mask": [0] * num + [1] * (len(row["input_ids"]) - num),
            "ids": [ids] * (num - 1) + row["ids"][num - 1 :],
            "logprobs": [logprobs] * (num - 1) + row["logprobs"][num - 1 :],
        }

    captures = write([answered(row) for row in teacher.rows])
    made = import_captures(settings_for(captures, profile="lossless", context="packed"))
    assert made.cache.manifest.facts["recordings"]["topk"]["num_ids"] == 8
    by_tokens = {tuple(row["input_ids"]): row for row in teacher.rows}
    for split in ("topk", "heldout-topk"):
        for sequences, targets in read_blocks(made.cache.path, made.cache.manifest.shard_sets[split]):
            assert isinstance(targets, TopkTargets)
            for b in range(len(sequences)):
                # a row stands alone in its sequence, and its padding begins a document
                end = int(np.flatnonzero(sequences.starts_BL1[b])[-1]) or 33
                row = by_tokens[tuple(sequences.tokens_BL1[b, :end].tolist())]
                num = end // 3 - 1
                assert targets.ids_BLK[b, num : end - 1].tolist() == row["ids"][num:]
                assert targets.logprobs_BLK[b, num : end - 1].tolist() == row["logprobs"][num:]
                # where nothing was said: uniform
                assert targets.logprobs_BLK[b, :num] == pytest.approx(-np.log(teacher.vocab_size))


@pytest.mark.parametrize("top_k", [None, 1, 8])
def test_a_target_without_ids_is_refused_by_its_row(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], top_k: int | None
) -> None:
    row = teacher.rows[20]
    empty = row | {name: [*row[name][:3], [], *row[name][4:]] for name in ("ids", "logprobs")}
    captures = write([*teacher.rows[:20], empty, *teacher.rows[21:]], columns=MINIMAL)
    with pytest.raises(InputError, match=r"captures.parquet, row 20, target 3: a target without ids"):
        import_captures(settings_for(captures, top_k=top_k))


def narrowed(rows: list[dict[str, Any]], width: int) -> list[dict[str, Any]]:
    return [row | {name: [one[:width] for one in row[name]] for name in ("ids", "logprobs")} for row in rows]


@pytest.mark.parametrize("profile", ["near-lossless", "small"])
def test_targets_that_are_wider_than_the_first_rows_are_counted_and_the_first_is_named(
    teacher: Any,
    write: Callable[..., Path],
    settings_for: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    profile: str,
) -> None:
    captures = write([*narrowed(teacher.rows[:40], 5), *teacher.rows[40:]], columns=MINIMAL)
    settings = settings_for(captures, profile=profile)
    made = import_captures(settings)
    assert made.cache.manifest.facts["recordings"]["topk"]["num_ids"] == 5
    (said,) = [record for record in caplog.records if vars(record).get("event") == "import_cut"]
    num_cut, num_targets = (sum(len(row["ids"]) for row in rows) for rows in (teacher.rows[40:], teacher.rows))
    assert said.levelname == "WARNING"
    assert f"{num_cut:,} of {num_targets:,} targets have more than 5 ids, up to 8" in said.getMessage()
    # the first of those that are trained on
    assert re.search(r"the first in .*captures\.parquet, row (4\d|5\d), target 0: \d\d% of all ids", said.getMessage())
    caplog.clear()
    import_captures(settings.model_copy(update={"top_k": 5}), force=True)
    assert "targets have more than" not in caplog.text, "whoever names a number knows it"


def test_a_cut_of_more_than_half_of_all_ids_is_refused_whatever_the_first_rows_have(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    captures = write([*narrowed(teacher.rows[:30], 1), *teacher.rows[30:]], columns=MINIMAL)
    said = r"row [3-5]\d, target 0: targets with far more ids .* found up to 8 in .*expected at most 1.*--top_k 8 and"
    with pytest.raises(InputError, match=said):
        import_captures(settings_for(captures))
