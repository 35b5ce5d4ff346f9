"""Run requests in vLLM, and yield each as soon as it is finished.

`LLM.generate` does the same, but returns only when all requests are finished.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Submission = Sequence[tuple[str, list[int], Any]]
"""Requests as triples of request id, prompt tokens and sampling parameters."""

Run = Callable[[Submission], Iterator[tuple[int, Any]]]
"""Runs a submission, and yields the place in it and vLLM's output of each request as soon as that is finished."""


def finished_requests(
    llm: Any, submission: Submission, named: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[tuple[int, Any]]:
    """Run a submission, and yield the place in it and vLLM's output of each request as soon as that is finished.

    Args:
        llm: a `vllm.LLM`.
        submission: the requests to run.
        named: makes a context that turns errors of the engine into one-line errors. It covers the calls of vLLM only,
            so that errors of the caller between two outputs pass unchanged.
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
        # requests that an error left in the engine would otherwise be taken for answers to the next submission
        if places:
            with contextlib.suppress(Exception):
                engine.abort_request(list(places))
