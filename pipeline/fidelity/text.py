"""Shows the figures of a cache as lines and tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.table import Table

from capgap.schemas.fidelity import AtTemperature, Fidelity, KeptMass, RecordingFidelity, SamplingError, Support

Shown = str | Table


def shown(fidelity: Fidelity) -> Iterator[Shown]:
    """Yield the lines and tables of all figures, in order."""
    yield (
        f"{fidelity.location}: {fidelity.num_sampled:,} of {fidelity.num_sequences:,} sequences, context "
        f"{fidelity.context}, recorded at temperature {fidelity.temperature:g}"
    )
    for recording in fidelity.recordings:
        yield from _recording(recording)
    live = fidelity.live
    if live is not None:
        yield ""
        yield (
            f"the teacher itself, on {live.num_rows:,} rows at temperature {live.temperature:g}: entropy "
            f"{live.entropy:.4f} nats, label loss {live.label_loss:.4f}, ECE {live.ece:.2%}"
        )
        yield _masses(live.kept)
        yield _errors(live.sampling_errors)


def summary(fidelity: Fidelity) -> tuple[str, ...]:
    """Return one line of figures for each recording."""
    return tuple(_in_short(recording) for recording in fidelity.recordings)


def _in_short(recording: RecordingFidelity) -> str:
    first = recording.by_temperature[0]
    if first.tail is not None:
        kept = f"{1 - first.tail.mean:.2%} of the teacher's probability kept, tail {first.tail.p99:.2%} at p99"
    else:
        kept = f"{recording.distinct_ids:.1f} distinct ids of {recording.num_ids} samples"
    return (
        f"{recording.recording}, temperature {first.temperature:g}: {kept}, ECE against the text {recording.ece:.2%}, "
        f"next token among the ids at {recording.label_kept:.1%} of {recording.num_rows:,} rows"
    )


def _recording(recording: RecordingFidelity) -> Iterator[Shown]:
    is_sampled = recording.recording == "sampled"
    what = f"{recording.num_ids} samples" if is_sampled else f"{recording.num_ids} ids, {recording.profile}"
    parts = ", ".join(f"{part} {num_bytes:.1f}" for part, num_bytes in recording.num_bytes.parts.items())
    yield ""
    yield f"{recording.recording}: {what}, {recording.num_rows:,} rows"
    yield f"  bytes a token: {recording.num_bytes.stored:.1f} on disk; before compression {parts}"
    yield (
        f"  against the text: label loss {_nats(recording.label_loss)}, top-1 ECE {recording.ece:.2%}, "
        f"next token among the ids at {recording.label_kept:.1%} of rows; {recording.distinct_ids:.1f} ids a row"
    )
    for figures in recording.by_temperature:
        yield from _at_temperature(figures)
    if recording.sampling_errors:
        yield _errors(recording.sampling_errors)
    yield from _supports(recording.supports)


def _nats(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f} nats"


def _at_temperature(figures: AtTemperature) -> Iterator[Shown]:
    most = "" if figures.most_entropy is None else f", at most {figures.most_entropy:.4f}"
    yield f"  at temperature {figures.temperature:g}: entropy at least {figures.least_entropy:.4f} nats{most}"
    if figures.tail is not None:
        tail = figures.tail
        yield f"  tail: mean {tail.mean:.3%}, median {tail.median:.3%}, p95 {tail.p95:.3%}, p99 {tail.p99:.3%}"
    yield _masses(figures.kept)


def _masses(kept: tuple[KeptMass, ...]) -> Table:
    is_sampled = all(one.truncation_kl is None for one in kept)
    table = _table(
        "top k", "share of samples" if is_sampled else "probability", *([] if is_sampled else ["truncation KL"])
    )
    for one in kept:
        kl = [] if one.truncation_kl is None else [f"{one.truncation_kl:.5f}"]
        table.add_row(f"{one.num_ids:,}", f"{one.mass:.3%}", *kl)
    return table


def _errors(errors: tuple[SamplingError, ...]) -> Table:
    table = _table("samples", "error, independent", "error, systematic")
    for one in errors:
        systematic = "-" if one.systematic is None else f"{one.systematic:.2e}"
        table.add_row(f"{one.num_samples:,}", f"{one.independent:.2e}", systematic)
    return table


def _supports(supports: tuple[Support, ...]) -> Iterator[Shown]:
    yield "  a training can have:"
    # The tails of one divergence that have the same answer share a line.
    for (answer, named, first, why), same in groupby(supports, _answer):
        name, *others = named
        rest = ", ".join(f"{other} {', '.join(str(one.settings[other]) for one in same)}" for other in others)
        choice = f"{name} {first}{', ' if rest else ''}{rest}"
        yield f"    {answer:<3}  {choice}{'' if why is None else f': {why}'}"


def _answer(one: Support) -> tuple[str, tuple[str, ...], str, str | None]:
    first = next(iter(one.settings.values()))
    shown_first = f"{first:g}" if isinstance(first, float) else first
    return "yes" if one.supported else "no", tuple(one.settings), shown_first, one.why


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right")
    return table
