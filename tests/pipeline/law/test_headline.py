"""The sentence at the head of a fit claims a best teacher only where one was shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from law_tables import planted, run, size, teacher, valley

from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.headline import headline
from capgap.pipeline.law.page import render_page
from capgap.pipeline.law.summary import lines
from capgap.pipeline.law.table import write_table
from capgap.schemas.law import LawRun
from capgap.schemas.law_fit import LawFit

RATIOS = np.geomspace(1, 32, 6).tolist()


@pytest.fixture
def fit(tmp_path: Path):
    def make(runs: Sequence[LawRun]) -> LawFit:
        write_table(tmp_path / "runs.jsonl", runs)
        return fit_table(tmp_path / "runs.jsonl")

    return make


def test_a_law_is_a_ratio_with_its_interval_and_leads_page_and_lines(fit) -> None:
    law = fit(planted(valley(4.0), [100e6, 200e6, 400e6], RATIOS))
    ratio = law.laws[0].proportional
    assert headline(law) == (
        f"The best teacher has about {ratio.value:.3g} times its student's parameters (95 % interval "
        f"{ratio.interval.low:.3g} to {ratio.interval.high:.3g}), measured on 3 students of 100M to 400M parameters."
    )
    assert ratio.interval.low < 4 < ratio.interval.high
    assert next(iter(lines(law))) == headline(law)
    page = render_page(law)
    assert page.index("The best teacher has about") < page.index("<h2")


def test_one_student_with_a_best_is_no_law(fit) -> None:
    sentence = headline(fit(planted(valley(4.0), [1e6], RATIOS)))
    assert sentence.startswith("A best teacher is shown in 1 of 1 curves (4")
    assert sentence.endswith("), and a law over students needs 3 students with one.")


def test_no_best_is_claimed_where_none_was_shown(fit) -> None:
    falling = fit(planted(lambda t, s: 4.0 - 0.05 * float(np.log(t / s)), [1e6, 2e6], RATIOS))
    assert headline(falling) == (
        "No best size of teacher was found: for 2 of 2 students it may lie beyond the sizes that were tried (edge)."
    )
    missing = fit([run(size(1e6), one, 0, 4.0) for one in (None, teacher(4e6))])
    assert headline(missing) == (
        "The best teacher is not known: too few teachers or seeds: none of 1 curves can be judged."
    )


def test_a_table_whose_runs_are_all_there_is_not_said_to_miss_some(fit) -> None:
    untrained = {"tokens": 0, "budget": "untrained", "metrics": {"kl": 1.0}}
    rows = [run(size(1e6), one, seed, 4.0, **untrained) for one in (None, teacher(4e6)) for seed in (0, 1)]
    assert headline(fit(rows)) == (
        "The best teacher is not known: the table has no run of a student that a teacher taught."
    )
    few = planted(valley(4.0), [1e6], [1, 2, 4])
    lost = [one.model_copy(update={"loss": None, "missing": "failed"}) if one.teacher else one for one in few]
    assert "runs are missing, and none of 1 curves can be judged" in headline(fit(lost))


@pytest.mark.filterwarnings("error")
def test_a_student_whose_runs_with_teachers_are_all_missing_has_no_loss_alone_and_no_nan(fit) -> None:
    whole = planted(valley(4.0), [1e6, 2e6], RATIOS)
    lost = [
        one.model_copy(update={"loss": None, "missing": "failed"})
        if one.teacher and one.student.num_parameters == 1_000_000
        else one
        for one in whole
    ]
    first, second = fit(lost).curves
    assert first.supervised_loss is None and second.supervised_loss is not None
