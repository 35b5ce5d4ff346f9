"""A stranger's text cannot control the terminal that shows it."""

from __future__ import annotations

import pytest

from capgap.schemas.errors import CapgapError
from capgap.schemas.printable import fit_to_show, printable, printable_name


@pytest.mark.parametrize(
    "evil",
    [
        "\x1b[2J",
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x1b]52;c;cm0gLXJmIH4=\x1b\\",
        "\x1bc",
        "\x9b31m",
        "\x00",
        "\x07",
        "\x08",
        "\r",
        "\x7f",
        "\u202e",
        "\u2066",
        "\u2028",
        "\ufeff",
        "\ud800",
        "\U000e0041",
    ],
)
def test_what_controls_a_terminal_goes_out(evil: str) -> None:
    text = printable(f"before {evil}after")
    assert text.startswith("before ?")
    assert text.endswith("after")
    text.encode()
    said = str(CapgapError("fails", where=f"a{evil}b", fix=f"run capgap verify a{evil}b"))
    assert not any(one in said for one in "\x1b\x00\x07\x08\r\x7f\x9b\u202e\u2066\u2028\ufeff\ud800\U000e0041")


def test_lines_words_and_other_scripts_stay() -> None:
    text = "a\tb\n\u00e4\u00f6 \u4e2d\u6587 \u0639\u0631 \U0001f600 [bold] 50 %"
    assert printable(text) == text
    assert fit_to_show(text) == text
    assert printable_name("a\nb") == "a?b"
