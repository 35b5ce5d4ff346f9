"""Carries requests out in vLLM, and hands out each as soon as it is finished.

`LLM.generate` does the same, and says nothing before the last of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Submission = Sequence[tuple[str, list[int], Any]]
"""Request ids, tokens and sampling parameters."""

Run = Callable[[Submission], Iterator[tuple[int, Any]]]
"""Carries a submission out, and yields the place in it and vLLM's output of each request that is finished."""


def finished_requests(
    llm: Any, submission: Submission, named: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[tuple[int, Any]]:
    """As `Run`.

    Args:
        llm: a `vllm.LLM`.
        submission: to be carried out.
        named: within it the engine's faults are said in one line; what the caller makes of an output is not.
    """
    engine = llm.llm_engine
    places = {request_id: place for place, (request_id, _, _) in enumerate(submission)}
    try:
        for request_id, tokens, params in submission:
            with named():
                engine.add_request(request_id, {"prompt_token_ids": tokens}, params)
        while engine.has_unfinished_requests():
            with named():
                outputs = engine.step()
            for output in outputs:
                if output.finished:
                    yield places.pop(output.request_id), output
    finally:
        # what an error has left behind must not be taken for answers to the next submission
        if places:
            with contextlib.suppress(Exception):
                engine.abort_request(list(places))
