"""What people write stays text, and all of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.corpus.plain_text import plain


@settings(max_examples=200)
@given(
    st.text(st.sampled_from("<|>as k"), max_size=12), st.lists(st.text("<|>as k", min_size=1, max_size=4), max_size=4)
)
def test_plain_text_has_no_special_token_in_it_but_single_characters_and_lacks_nothing(
    text: str, specials: list[str]
) -> None:
    said = plain(text, specials)
    assert not any(special in said for special in specials if len(special.strip()) > 1)
    assert said.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("special", "said"),
    [
        ("<|user|>", "a< |user|>b"),
        ("!", "a!b"),
        (" !", "a !b"),
        (" <s>", "a < s>b"),
        ("\n<s>", "a\n< s>b"),
        ("of it", "ao f itb"),
    ],
)
def test_a_special_token_is_set_apart_where_a_blank_can_do_it(special: str, said: str) -> None:
    assert plain(f"a{special}b", [special]) == said
