from __future__ import annotations

import pytest

from capgap.schemas.amounts import bytes_text


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0.0 kB"),
        (312, "0.3 kB"),
        (42_000, "42.0 kB"),
        (3.2e6, "3.20 MB"),
        (7e9, "7.00 GB"),
        (1.25e15, "1,250.00 TB"),
    ],
)
def test_an_amount_has_the_unit_in_which_it_can_be_read(num_bytes: float, said: str) -> None:
    assert bytes_text(num_bytes) == said
