"""Charts as SVG: text of the user's own stands in them as it is."""

from __future__ import annotations

import pytest

from capgap.pipeline.pages.svg import draw


@pytest.mark.parametrize(
    ("label", "written"),
    [(r"models\gpt2", r"models\gpt2"), (r"a\1b", r"a\1b"), ("a < b", "a &lt; b"), ('"a"', "&#34;a&#34;")],
)
def test_a_label_is_kept_whatever_signs_a_name_in_it_has(label: str, written: str) -> None:
    drawn = draw("chart", label, 2, lambda figure: None)
    assert f'aria-label="{written}"' in drawn
