"""The live teacher's targets of sequences: in the cache's own batches, and with each request by itself."""

from __future__ import annotations

from collections.abc import Sequence

from capgap.pipeline.cache.convert import join, to_requests, to_targets
from capgap.pipeline.cache.scoring import Engine, Request, Scored
from capgap.pipeline.store import Codec
from capgap.pipeline.verify.sample import Part, joined
from capgap.schemas.records import Sequences, Targets
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_corpus import ContextRule

View = dict[RecordingName, Targets]
"""Targets of all parts' compared sequences, by recording."""


def in_batches(engine: Engine, parts: Sequence[Part], context: ContextRule, names: Sequence[RecordingName]) -> View:
    """Score every part as one submission, as its shard was scored."""
    scored = []
    for part in parts:
        several = _requests(part.sequences, context)
        answers = iter(engine.score([request for requests in several for request in requests]))
        rows = [join([next(answers) for _ in requests]) for requests in several]
        scored += rows[: part.group.num_sequences]
    return _targets(scored, names)


def alone(engine: Engine, parts: Sequence[Part], context: ContextRule, names: Sequence[RecordingName]) -> View:
    """Score every request of the compared sequences as a submission of its own."""
    scored = []
    for part in parts:
        compared = part.sequences.part(slice(part.group.num_sequences))
        scored += [
            join([engine.score([request])[0] for request in requests]) for requests in _requests(compared, context)
        ]
    return _targets(scored, names)


def as_stored(targets: Targets, parts: Sequence[Part], codec: Codec) -> Targets:
    """Return the same targets after they were encoded and decoded, so that they are rounded as the cache's own are."""
    compared = [part.sequences.part(slice(part.group.num_sequences)) for part in parts]
    _, read = codec.decode(codec.encode(Sequences.joined(compared), targets), "rows scored again")
    assert read is not None
    return read


def kept_of(parts: Sequence[Part], name: RecordingName) -> Targets:
    """Return the targets that the cache keeps of the compared sequences."""
    return joined([part.kept[name] for part in parts])


def _requests(sequences: Sequences, context: ContextRule) -> list[list[Request]]:
    rows = zip(sequences.tokens_BL1, sequences.starts_BL1, strict=True)
    return [to_requests(tokens_L1, starts_L1, context) for tokens_L1, starts_L1 in rows]


def _targets(scored: list[Scored], names: Sequence[RecordingName]) -> View:
    return {name: to_targets(scored, name) for name in names}
