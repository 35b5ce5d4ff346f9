"""Rows into sequences: none is split, padding and first tokens count for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.pipeline.interchange.captures import CapturedRow
from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.interchange.pack import pack, to_sequences
from capgap.pipeline.store import read_blocks
from capgap.schemas.errors import InputError

MINIMAL = ("input_ids", "ids", "logprobs")


def row(first: int, length: int) -> CapturedRow:
    starts_M = np.zeros(length, np.bool_)
    starts_M[0] = True
    return CapturedRow("", np.arange(first, first + length, dtype=np.int32), starts_M, np.ones(length, np.bool_))


def test_rows_of_documents_share_sequences_and_rows_that_are_seen_whole_do_not() -> None:
    rows = [row(10, 6), row(20, 4), row(30, 7), row(40, 3), row(50, 2)]
    # sequences of ten tokens: 6 + 4, 7 + 3, and 2 that are left
    together = list(pack(rows, 9, "document"))
    assert [[len(one) for one in sequence.rows] for sequence in together] == [[6, 4], [7, 3], [2]]
    alone = list(pack(rows, 9, "packed"))
    assert [[len(one) for one in sequence.rows] for sequence in alone] == [[6], [4], [7], [3], [2]]


def test_starts_and_labels_of_a_sequence_are_those_of_its_rows() -> None:
    sequences = to_sequences(list(pack([row(10, 5), row(20, 3)], 9, "document")), 9, eos_id=1)
    assert sequences.tokens_BL1[0].tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 1, 1]
    assert np.flatnonzero(sequences.starts_BL1[0]).tolist() == [0, 5, 8]
    assert np.flatnonzero(sequences.mask_BL1[0]).tolist() == [1, 2, 3, 4, 6, 7]


def test_many_rows_leave_little_padding() -> None:
    rng = np.random.default_rng(0)
    rows = [row(0, int(length)) for length in rng.integers(2, 60, 2000)]
    sequences = list(pack(rows, 63, "document"))
    assert sum(len(one) for sequence in sequences for one in sequence.rows) == sum(map(len, rows))
    # measured: 5.5 % of padding
    assert sum(map(len, rows)) > 0.94 * 64 * len(sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_a_row_is_left_out(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], side: str
) -> None:
    plain = import_captures(settings_for(write(teacher.rows, "plain.parquet", MINIMAL))).cache
    rows = []
    for one in teacher.rows:
        pad = [3] * (40 - len(one["input_ids"]))
        nothing = [one[name][0] for name in ("ids", "logprobs")]
        ids, logprobs = ([value] * len(pad) for value in nothing)
        tokens, mask = one["input_ids"], [1] * len(one["input_ids"])
        if side == "left":
            padded = (pad + tokens, [0] * len(pad) + mask, ids + one["ids"], logprobs + one["logprobs"])
        else:
            padded = (tokens + pad, mask + [0] * len(pad), one["ids"] + ids, one["logprobs"] + logprobs)
        rows.append(dict(zip(("input_ids", "attention_mask", "ids", "logprobs"), padded, strict=True)))
    out = str(write(rows).parent / "padded")
    padded_cache = import_captures(settings_for(write(rows), out=out, seq_len=32, top_k=8)).cache
    pairs = zip(*(read_blocks(at.path, at.manifest.shard_sets["topk"]) for at in (plain, padded_cache)), strict=True)
    for (sequences, targets), (others, found) in pairs:
        for name, array in vars(sequences).items():
            assert np.array_equal(array, getattr(others, name)), name
        counts_BL = sequences.mask_BL1[:, 1:]
        for name in ("ids_BLK", "logprobs_BLK", "tail_BL", "label_logprobs_BL"):
            here, there = (getattr(of, name)[counts_BL] for of in (targets, found))
            assert np.array_equal(here, there, equal_nan=name == "label_logprobs_BL"), name


@pytest.mark.parametrize("name", ["loss_mask", "labels"])
def test_what_is_no_label_does_not_count(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], name: str
) -> None:
    def marked(row: dict[str, Any]) -> list[int]:
        counts = [i % 3 == 0 for i in range(len(row["input_ids"]))]
        if name == "loss_mask":
            return [int(one) for one in counts]
        return [token if one else -100 for token, one in zip(row["input_ids"], counts, strict=True)]

    rows = [row | {name: marked(row)} for row in teacher.rows]
    made = import_captures(settings_for(write(rows, columns=(*MINIMAL, name))))
    found = sum(made.corpus.manifest.totals[f"num_{split}_labels"] for split in ("student", "heldout"))
    assert found == sum(len(range(3, len(row["input_ids"]), 3)) for row in rows)
    if name == "labels":
        wrong = [row | {name: [*row[name][1:], -100]} for row in rows]
        with pytest.raises(InputError, match=r"labels that are not the row's own tokens"):
            import_captures(settings_for(write(wrong, columns=(*MINIMAL, name)), out=str(tmp_of(made))))


def tmp_of(made: Any) -> Path:
    return made.cache.path.parent.parent / "wrong"


@pytest.mark.parametrize("long_rows, num_labels", [("cut", 19), ("drop", 0)])
def test_long_rows_are_refused_cut_or_dropped(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], long_rows: str, num_labels: int
) -> None:
    captures = write(teacher.rows, columns=MINIMAL)
    with pytest.raises(InputError, match=r"row 3: the row is longer than a sequence; found 33 tokens"):
        import_captures(settings_for(captures, seq_len=19))
    made = import_captures(settings_for(captures, seq_len=19, long_rows=long_rows), force=True)
    lengths = [len(row["input_ids"]) for row in teacher.rows]
    expected = sum(length - 1 if length <= 20 else num_labels for length in lengths)
    found = [made.corpus.manifest.totals[f"num_{split}_labels"] for split in ("student", "heldout")]
    assert sum(found) == expected


def test_a_row_with_a_target_after_its_last_token_keeps_it(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    rows = [row | {name: [*row[name], row[name][0]] for name in ("ids", "logprobs")} for row in teacher.rows]
    made = import_captures(settings_for(write(rows, columns=MINIMAL), profile="lossless", context="packed"))
    by_tokens = {tuple(row["input_ids"]): row for row in rows}
    for sequences, targets in read_blocks(made.cache.path, made.cache.manifest.shard_sets["topk"]):
        for b in range(len(sequences)):
            end = int(np.flatnonzero(sequences.starts_BL1[b])[-1]) or 33
            found = by_tokens[tuple(sequences.tokens_BL1[b, :end].tolist())]
            assert targets.ids_BLK[b, : min(end, 32)].tolist() == found["ids"][: min(end, 32)]
            assert not sequences.mask_BL1[b, end:].any()
