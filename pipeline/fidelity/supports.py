"""Finds out which settings of a training a cache supports, by the trainer's own checks, so that both always agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from capgap.kernels.sparse_kl import Divergence, Tail
from capgap.pipeline.train.caches import choose
from capgap.pipeline.train.objective import objective_of
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.fidelity import Support
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_train import TrainSettings

# These are the temperatures that users ask about first; a cache's own temperatures are reported too.
_USUAL_TEMPERATURES = (1.0, 2.0)


def supports(facts: CacheFacts, recording: RecordingName) -> tuple[Support, ...]:
    """Return whether a training supports each divergence with each tail, each temperature and all token weights.

    The three groups are checked separately, because they do not depend on one another. The temperatures are those of
    the recording and the usual ones.
    """
    return tuple(_asked(facts, recording, settings) for settings in _choices(facts, recording))


def _choices(facts: CacheFacts, recording: RecordingName) -> Iterator[dict[str, Any]]:
    for divergence in get_args(Divergence):
        for tail in get_args(Tail):
            yield {"divergence": divergence, "tail": tail}
    for temperature in sorted({*facts.recordings[recording].temperatures, *_USUAL_TEMPERATURES}):
        yield {"temperature": temperature}
    for weights in get_args(TrainSettings.model_fields["token_weights"].annotation):
        yield {"token_weights": weights}


def _asked(facts: CacheFacts, recording: RecordingName, settings: dict[str, Any]) -> Support:
    try:
        asked = TrainSettings.model_validate({"recording": recording, **settings})
        choose(facts, asked)
        objective_of(asked, recording, "the cache")
    except ValidationError as error:
        why = error.errors()[0]["msg"].removeprefix("Value error, ")
    except CapgapError as error:
        expected = "" if error.expected is None else f"; expected {error.expected}"
        why = f"{error.what}{expected}"
    else:
        return Support(settings=settings, supported=True, why=None)
    return Support(settings=settings, supported=False, why=why)
