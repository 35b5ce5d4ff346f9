"""The rule of the comparison: is the cache as near to a teacher as the teacher, scored in other ways, is to itself?

Two views of the same teacher differ by rounding. How much is measured live: in batches and alone, in the cache's dtype
and in float32. A cache must pass two tests:

- spread: the root mean square of its differences is at most twice the largest of the teacher's own, and the largest
  difference at most four times. Another machine rounds differently, but not more.
- mean: rounding differs from sequence to sequence, so an id's differences are not alike between sequences; those of
  another teacher are. The correlation of an id's differences between sequences is at most three times the teacher's
  own, or 0.03 (`topk`) or 0.004 (`sampled`) if that is more, plus four standard errors of the teacher's own.

The second test detects small changes. For a real model of 135 million parameters in bfloat16, the correlation is below
0.01 for another batch or dtype, and from 0.1 on for a model whose last layer's weights have moved by 0.5 %, although
that adds only a tenth to the spread (docs/how-to/resume.md has the rates). It is applied only to differences beyond
1e-3 nats plus the rounding of the profile.
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
    """Return lines about one recording, and a list of its faults.

    Args:
        name: Name of the recording.
        found: Difference between the cache and the teacher.
        own: Differences between the teacher and itself, in every other way in which it was scored.
        error_nats: Largest rounding error of a stored logprob.
    """
    slack = error_nats + SLACK_NATS
    most = _MAX_FACTOR * max(floor.max_nats for floor in own) + slack
    rms = _RMS_FACTOR * max(floor.rms_nats for floor in own) + slack
    what = "labels" if name == "sampled" else "kept ids and labels"
    lines = [
        f"  {name}: logprobs of {what} are {found.rms_nats:.2g} nats apart (rms), at most {found.max_nats:.2g}; "
        f"between the teacher and itself {_largest(own, 'rms_nats'):.2g} and {_largest(own, 'max_nats'):.2g}; "
        f"allowed {rms:.2g} and {most:.2g}"
    ]
    wrong = []
    # written so that NaN counts as a fault
    if not found.rms_nats <= rms:
        wrong.append(f"{name} logprobs {found.rms_nats:.3g} nats apart (rms) where {rms:.3g} are allowed")
    if not found.max_nats <= most:
        wrong.append(f"{name} logprobs {found.max_nats:.3g} nats apart where {most:.3g} are allowed")
    if name == "sampled":
        moved = _MOVED_FACTOR * _largest(own, "moved_samples") + SLACK_SAMPLES
        lines.append(
            f"  {name}: {found.moved_samples:.2%} of the samples differ, against {_largest(own, 'moved_samples'):.2%} "
            f"between the teacher and itself; allowed {moved:.2%}"
        )
        if found.moved_samples > moved:
            wrong.append(f"{found.moved_samples:.1%} of the samples differ where {moved:.1%} are allowed")
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
    return [line], [f"{name} differences have a correlation of {found.common:.2g} where {allowed:.2g} is allowed"]


def _largest(own: Sequence[Apart], name: str) -> float:
    """Return the largest of the teacher's own values; equal views have no correlation, which counts as 0."""
    return max((value for floor in own if (value := getattr(floor, name)) == value), default=0.0)
