"""Loads the templates of HTML pages, which share one style and one form of tables.

A page is one file without scripts, and loads nothing from elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

MEANINGS = {
    "parameters": "All of the model's parameters, tied ones once.",
    "loss, nats/token": "Minus the logarithm of the real next token's probability, on held-out text. Less is better.",
    "bits/byte": "The loss for each byte of text, in bits: comparable between tokenizers. Less is better.",
    "KL to teacher": "KL divergence from the teacher's distributions to the student's, nats/token. 0 means equal.",
    "top-1": "Share of tokens at which the model's first choice is the teacher's.",
    "acceptance": "Share of drafts that the teacher would accept from the student in speculative decoding.",
    "ECE": "Expected calibration error: how far the model's confidence is, on average, from how often it is right.",
    "tokens/s": "Tokens a second over the time of all processes of the stage together, their starts included.",
    "step tokens/s": "Median of the tokens per second over a training's logged steps.",
    "device hours": "Sum of the hours over all devices of the stage.",
    "identity": "Digest of the stage's settings and inputs.",
    "content": "Digest of the stage's files: two stages with the same content have equal files.",
    "low": "Lower end of the 95 % interval.",
    "high": "Upper end of the 95 % interval.",
    "seeds": "Number of students that differ in their seed only.",
    "not beaten": "Whether no other model is both cheaper and better.",
    "over size": "Verdict on the student's loss over the teacher's size.",
    "over cross-entropy": "Verdict on the student's loss over the teacher's own loss.",
    "noise, nats": "Standard deviation of one run's loss about its teacher's mean.",
}
"""Explanation of each column heading, by the heading's text; a browser shows it while the mouse is on the heading."""

_SHARED = Path(__file__).parent


def page_template(path: Path) -> Template:
    """Load the template at `path`; texts put into it are escaped.

    The template may include `style.html.j2` and import from `parts.html.j2`.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["meanings"] = MEANINGS
    return environment.get_template(path.name)
