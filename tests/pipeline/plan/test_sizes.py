from __future__ import annotations

from typing import Any

import pytest

from capgap.pipeline.plan.sizes import ModelSize
from capgap.schemas.run_quantize import QuantizeSettings


@pytest.mark.parametrize(
    ("given", "tied", "num_bytes"),
    [
        # 800 weights of layers at 4.25 bits, and 200 of embedding and head in 16
        ({}, True, 425 + 400),
        # one matrix becomes two: one in 16 bits and one at 4.25
        ({"head": True}, True, 425 + 400 + 106.25),
        ({"head": True}, False, 425 + 200 + 53.125),
    ],
)
def test_a_packed_model_has_two_matrices_where_its_head_is_quantised(
    given: dict[str, Any], tied: bool, num_bytes: float
) -> None:
    size = ModelSize(1000, 800, "here", tied)
    assert size.packed_bytes(QuantizeSettings(format="mxfp4", **given)) == num_bytes


def test_both_at_few_bits_take_less_than_one_in_16() -> None:
    few = QuantizeSettings(format="int4", group_size=32, head=True, embedding=True)
    assert ModelSize(1000, 800, "here").packed_bytes(few) == (800 + 2 * 200) * 4.5 / 8
