"""The number of ids that are kept of each target, where targets of the captures have different numbers of ids.

All profiles but `small` keep equally many ids of every target, as many as the narrowest has. `small` keeps all ids of a
narrower target. A target whose label does not count, for example in a prompt, may have fewer ids or none: it is then
uniform, as padding is.

Legend: T targets of a row, W ids of its widest target, K ids kept, N targets that count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from capgap.pipeline.interchange.captures import CapturedRow, RowTargets
from capgap.pipeline.interchange.ragged import Int64Array
from capgap.pipeline.stage.events import event
from capgap.schemas.errors import InputError

# The widths of the first rows decide, and this many rows are read.
_FIRST_ROWS = 16
# A cut of more than this share of all ids, to the width of the first rows' targets, needs an explicit --top_k.
MOST_CUT = 0.5
_SILENT = "set loss_mask to 0 where the teacher said nothing"


def uniform(num_targets: int, top_k: int, vocab_size: int) -> RowTargets:
    """Return targets with the uniform distribution, for positions at which the teacher has no target."""
    evenly = np.float32(-np.log(vocab_size))
    return RowTargets(
        np.broadcast_to(np.arange(top_k, dtype=np.int32), (num_targets, top_k)).copy(),
        np.full((num_targets, top_k), evenly, np.float32),
        np.full(num_targets, 1 - top_k / vocab_size, np.float32),
        np.full(num_targets, evenly, np.float32),
    )


def kept(row: CapturedRow, top_k: int, vocab_size: int, is_ragged: bool) -> RowTargets:
    """Return the top-k tokens [T, K] of each target of a row; the probability of ids that are cut is added to the tail.

    If `is_ragged` is set, a target may have fewer ids, and id 0 at logprob -inf follows its last one.

    Raises:
        InputError: A target whose label counts has fewer ids than needed.
    """
    targets = row.targets
    assert targets is not None
    widths_T, counts_T = targets.widths_T, row.counts_T
    is_narrow_T = widths_T < (1 if is_ragged else top_k)
    _require_ids(row, widths_T)
    if (is_narrow_T & counts_T).any():
        target = int(np.flatnonzero(is_narrow_T & counts_T)[0])
        least = int(widths_T[counts_T].min())
        raise InputError(
            "a target with fewer ids than are kept",
            where=f"{row.where}, target {target}",
            found=int(widths_T[target]),
            expected=f"at least {top_k}",
            fix=f"set --profile small, which keeps all ids of a narrow target, or --top_k {least} or fewer",
        )
    found = uniform(len(targets), top_k, vocab_size)
    is_told_T = ~is_narrow_T
    width = min(top_k, targets.ids_TW.shape[1])
    found.ids_TW[is_told_T], found.logprobs_TW[is_told_T] = 0, -np.inf
    found.ids_TW[is_told_T, :width] = np.maximum(targets.ids_TW[is_told_T, :width], 0)
    found.logprobs_TW[is_told_T, :width] = targets.logprobs_TW[is_told_T, :width]
    cut_T = np.exp(targets.logprobs_TW[is_told_T, width:]).sum(axis=1, dtype=np.float32)
    found.tail_T[is_told_T] = np.minimum(targets.tail_T[is_told_T] + cut_T, np.float32(1))
    found.label_logprobs_T[is_told_T] = targets.label_logprobs_T[is_told_T]
    return found


def choose_top_k(rows: Iterable[CapturedRow], is_ragged: bool, exported: int, most_cut: float) -> int:
    """Return how many ids to keep of each target: as many as the narrowest or the widest of the first rows has.

    Args:
        rows: Rows of the captures.
        is_ragged: Whether each target keeps all its ids, so that the widest decides.
        exported: Number of ids that a cache's export says that it has; 0 where no file is an export.
        most_cut: Largest share of all ids that may be cut because of the narrowest target.

    Raises:
        InputError: A target whose label counts has no ids, or a narrow target would cut more than `most_cut`.
    """
    parts: list[Int64Array] = []
    narrowest, where = 0, ""
    for number, row in enumerate(rows):
        if number >= _FIRST_ROWS and parts:
            break
        assert row.targets is not None
        widths_T, counts_T = row.targets.widths_T, row.counts_T
        _require_ids(row, widths_T)
        if not counts_T.any():
            continue
        least = int(widths_T[counts_T].min())
        if not parts or least < narrowest:
            target = int(np.flatnonzero(counts_T & (widths_T == least))[0])
            narrowest, where = least, f"{row.where}, target {target}"
        parts.append(widths_T[counts_T])
    widths_N = np.concatenate(parts)
    widest = int(widths_N.max())
    if is_ragged:
        return max(widest, exported)
    share = 1 - narrowest / float(widths_N.mean())
    if share > most_cut:
        raise InputError(
            "a target with far fewer ids than others have",
            where=where,
            found=f"{narrowest}, where others have up to {widest}: {share:.0%} of all ids would be cut",
            expected="about as many in each target",
            fix=f"set --profile small, which keeps all ids of a narrow target, or --top_k {narrowest} to cut them; "
            + _SILENT,
        )
    if narrowest < widest:
        event(
            "import_top_k",
            f"import: {narrowest} ids of each target are kept, as many as the narrowest of the first ones has "
            f"({where}); others have up to {widest}, and what is cut joins the tail",
            top_k=narrowest,
            widest=widest,
            where=where,
        )
    return narrowest


class Cuts:
    """Counts what is cut of targets whose label counts, because the first rows decided how many ids are kept.

    Args:
        top_k: Number of ids that are kept of each target.
        most_cut: Largest share of all ids that may be cut.
    """

    def __init__(self, top_k: int, most_cut: float) -> None:
        self._top_k, self._most_cut = top_k, most_cut
        self._num_targets = self._num_cut = self._num_ids = self._num_lost = self._widest = 0
        self._where = ""

    def add(self, rows: Iterable[CapturedRow]) -> None:
        """Count the targets of some rows; raises InputError as `finish` does where nothing at all may be cut."""
        for row in rows:
            assert row.targets is not None
            widths_T = np.where(row.counts_T, row.targets.widths_T, 0)
            is_cut_T = widths_T > self._top_k
            if is_cut_T.any() and not self._where:
                self._where = f"{row.where}, target {int(np.flatnonzero(is_cut_T)[0])}"
            self._num_targets += int(row.counts_T.sum())
            self._num_cut += int(is_cut_T.sum())
            self._num_ids += int(widths_T.sum())
            self._num_lost += int(np.maximum(widths_T - self._top_k, 0).sum())
            self._widest = max(self._widest, int(widths_T.max(initial=0)))
        if not self._most_cut:
            self._require_few()

    def finish(self) -> None:
        """Log how many targets were cut, if any were.

        Raises:
            InputError: More than `most_cut` of all ids were cut.
        """
        self._require_few()
        if self._num_cut:
            event(
                "import_cut",
                f"import: {self._num_cut:,} of {self._num_targets:,} targets have more than {self._top_k} ids, up to "
                f"{self._widest}, the first in {self._where}: {self._num_lost / self._num_ids:.0%} of all ids are cut "
                "and join the tail; --top_k says how many are kept",
                logging.WARNING,
                top_k=self._top_k,
                num_cut=self._num_cut,
                num_targets=self._num_targets,
                widest=self._widest,
                where=self._where,
            )

    def _require_few(self) -> None:
        if self._num_lost > self._most_cut * self._num_ids:
            raise InputError(
                "targets with far more ids than those of the first rows",
                where=self._where,
                found=f"up to {self._widest} in {self._num_cut:,} of {self._num_targets:,} targets: "
                f"{self._num_lost / self._num_ids:.0%} of all ids would be cut",
                expected=f"at most {self._top_k}, as in the first rows",
                fix=f"set --top_k {self._widest} and --profile small to keep them all, or --top_k {self._top_k} to cut "
                "them",
            )


def _require_ids(row: CapturedRow, widths_T: Int64Array) -> None:
    empty_T = row.counts_T & (widths_T == 0)
    if empty_T.any():
        raise InputError(
            "a target without ids, whose label counts",
            where=f"{row.where}, target {int(np.flatnonzero(empty_T)[0])}",
            found=f"{int(empty_T.sum())} of {len(widths_T)} targets of the row have none",
            expected="at least one id",
            fix=f"{_SILENT}, or leave the row out; where the first list is empty, as in vLLM's output, set --offset -1",
        )
