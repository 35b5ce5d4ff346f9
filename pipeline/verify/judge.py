"""The rule: is what was kept as near to a teacher as the teacher, asked in other ways, is to itself?

Two views of the same teacher differ by rounding. How much is measured live: in batches and alone, in the cache's dtype
and in float32. Of a cache are asked

- spread: the root mean square of its differences is at most twice the largest of the teacher's own, and the largest
  difference four times. Another machine rounds otherwise, not more.
- mean: rounding is one thing in one sequence and another in the next, so that the differences of an id are alike in no
  two sequences; those of another teacher are. The correlation of an id's differences between sequences is at most three
  times the teacher's own, and 0.03 (`topk`) or 0.004 (`sampled`), and four of its standard errors.

The second has the power. Of a real model of 135 million parameters in bfloat16, the correlation of another batch or
dtype is below 0.01, of one whose last layer's weights have moved by 0.5 % from 0.1 on, though that adds a tenth to the
spread (docs/how-to/resume.md has the rates). It is asked of differences beyond 1e-3 nats and what the profile rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from capgap.pipeline.verify.compare import Apart
from capgap.schemas.run_cache import RecordingName

SLACK_NATS = 1e-3
SLACK_SAMPLES = 0.01
_RMS_FACTOR, _MAX_FACTOR, _MOVED_FACTOR = 2, 4, 2
_COMMON_FACTOR, _COMMON_ERRORS = 3, 4
_LEAST_COMMON: dict[RecordingName, float] = {"topk": 0.03, "sampled": 0.004}


def judge(name: RecordingName, found: Apart, own: Sequence[Apart], error_nats: float) -> tuple[list[str], list[str]]:
    """Lines about one recording, and what is wrong with it.

    Args:
        name: of the recording.
        found: the cache against the teacher.
        own: the teacher against itself, in every other way that it was asked.
        error_nats: by which a stored logprob may be off.
    """
    slack = error_nats + SLACK_NATS
    most = _MAX_FACTOR * max(floor.max_nats for floor in own) + slack
    rms = _RMS_FACTOR * max(floor.rms_nats for floor in own) + slack
    what = "labels" if name == "sampled" else "kept ids and labels"
    lines = [
        f"  {name}: logprobs of {what} are {found.rms_nats:.2g} nats apart (rms), at most {found.max_nats:.2g}; the "
        f"teacher from itself {_largest(own, 'rms_nats'):.2g} and {_largest(own, 'max_nats'):.2g}; allowed {rms:.2g} "
        f"and {most:.2g}"
    ]
    wrong = []
    # not a number is wrong too
    if not found.rms_nats <= rms:
        wrong.append(f"{name} logprobs {found.rms_nats:.3g} nats apart (rms) where {rms:.3g} are allowed")
    if not found.max_nats <= most:
        wrong.append(f"{name} logprobs {found.max_nats:.3g} nats apart where {most:.3g} are allowed")
    if name == "sampled":
        moved = _MOVED_FACTOR * _largest(own, "moved_samples") + SLACK_SAMPLES
        lines.append(
            f"  {name}: {found.moved_samples:.2%} of the samples are others, of the teacher's own "
            f"{_largest(own, 'moved_samples'):.2%}; allowed {moved:.2%}"
        )
        if found.moved_samples > moved:
            wrong.append(f"{found.moved_samples:.1%} other samples where {moved:.1%} are allowed")
    is_beyond = found.rms_nats > slack or found.moved_samples > SLACK_SAMPLES
    if is_beyond and found.common == found.common:
        more_lines, more_wrong = _judge_common(name, found, own)
        lines, wrong = lines + more_lines, wrong + more_wrong
    return lines, wrong


def _judge_common(name: RecordingName, found: Apart, own: Sequence[Apart]) -> tuple[list[str], list[str]]:
    allowed = max(_COMMON_FACTOR * _largest(own, "common"), _LEAST_COMMON[name])
    allowed += _COMMON_ERRORS * _largest(own, "common_error")
    line = (
        f"  {name}: between sequences the differences of an id have a correlation of {found.common:.2g}, the teacher's "
        f"own {_largest(own, 'common'):.2g}; allowed {allowed:.2g}"
    )
    if found.common <= allowed:
        return [line], []
    return [line], [f"{name} differences of a correlation of {found.common:.2g} where {allowed:.2g} is allowed"]


def _largest(own: Sequence[Apart], name: str) -> float:
    """Of the teacher's own figures; equal views have no correlation, which counts as 0."""
    return max((value for floor in own if (value := getattr(floor, name)) == value), default=0.0)
