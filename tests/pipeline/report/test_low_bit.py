from __future__ import annotations

from typing import Any

import pytest

from capgap.pipeline.report.gather import gather
from capgap.pipeline.report.page import render_page
from capgap.pipeline.report.table import table_text

ARMS: dict[str, Any] = {"ptq": {"alpha": 0, "max_tokens": 0}, "qat": {"alpha": 0}, "qad": {}}
LOSSES = {"ptq": [3.4, 3.4], "qat": [3.3, 3.3], "qad": [3.1, 3.2]}
STUDENT: dict[str, Any] = {"model": {}, "quantize": {"format": "mxfp4", "head": True}}


def test_what_few_bits_take_and_what_is_won_back_stand_below_the_table(tmp_path, make_context) -> None:
    report = gather(make_context(tmp_path, LOSSES, arms=ARMS, student=STUDENT))
    found = report.low_bit
    assert found is not None and found.baseline == "ptq" and found.num_bytes == 700_000
    shares = {one.arm: (one.loss, one.kl) for one in found.won_back}
    # of 0.5 nats to a teacher of 2.9, and of a KL of 0.6; each seed's own share, and their mean
    assert shares["qad"] == (pytest.approx((0.3 + 0.2) / 2 / 0.5, abs=2e-3), pytest.approx(0.25 / 0.6, abs=2e-3))
    assert shares["qat"] == (pytest.approx(0.1 / 0.5, abs=2e-3), pytest.approx(0.1 / 0.6, abs=2e-3))
    shown = table_text(report.table)
    assert (
        "students in mxfp4: 4.25 bits a weight in linear layers and head; the weights that are served take 0.7 MB, and "
        "2.5 MB in 16 bits" in shown
    )
    assert "won back of the gap between ptq, only rounded, and the teacher: qat 20" in shown
    assert "won back of the gap between ptq" in render_page(report)


def test_without_a_rounded_arm_the_size_alone_is_shown_and_without_few_bits_nothing(tmp_path, make_context) -> None:
    losses = {"qat": [3.3], "qad": [3.1]}
    context = make_context(tmp_path / "few", losses, arms={"qat": {"alpha": 0}, "qad": {}}, student=STUDENT)
    shown = table_text(gather(context).table)
    assert "students in mxfp4" in shown and "won back" not in shown
    assert gather(make_context(tmp_path / "plain", {"cross_entropy": [3.5], "distilled": [3.4]})).low_bit is None
