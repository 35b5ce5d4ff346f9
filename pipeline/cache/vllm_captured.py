"""Score requests whose rows are captured on the worker, and take these rows from vLLM's front end.

Legend: L targets of a request, C ids, W numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from capgap.pipeline.cache.scoring import Recording, Request, Scored, unpack
from capgap.pipeline.cache.vllm_submission import Run
from capgap.pipeline.cache.vllm_worker import RequestKey
from capgap.pipeline.stage.progress import advance_within
from capgap.schemas.errors import InputError, MachineError

# Capture and vLLM's sampler both compute head and log-softmax in float32; only the batch of the matrix product differs.
_GREEDY_TOLERANCE_NATS = 5e-3
_SIGNATURE = ["self", "prompt_logprobs_tensors"]


class CapturedRequests:
    """Scores requests whose rows, the last one included, the worker captures as two arrays per request."""

    def __init__(self, recording: Recording) -> None:
        import vllm

        self._recording = recording
        self._params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0, logprobs=0
        )

    def score(self, run: Run, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests as one submission, and return the results in the order of the requests."""
        submission = [
            (
                RequestKey(index, int(request.tokens_L1[-1]), request.digest).encode(),
                request.tokens_L1[:-1].tolist(),
                self._params,
            )
            for index, request in enumerate(requests)
        ]
        found: dict[int, Scored] = {}
        with _rows_kept_whole():
            for index, output in run(submission):
                found[index] = _scored(self._recording, requests[index], output)
                advance_within(requests[index].share)
        return [found[index] for index in range(len(requests))]


def require_known_front_end() -> None:
    """Raise RuntimeError where vLLM's front end is not the one that this code was written for."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    method = getattr(LogprobsProcessor, "_update_prompt_logprobs", None)
    found = list(inspect.signature(method).parameters) if method is not None else None
    if found != _SIGNATURE:
        raise RuntimeError(f"front end: found {found}, expected {_SIGNATURE}")


def unknown_vllm(why: str) -> MachineError:
    """Return the error for a vLLM that lacks the methods which capture replaces; `why` says what was found."""
    import vllm

    return MachineError(
        "this vLLM cannot be captured",
        where=f"vllm {vllm.__version__}",
        found=why,
        expected="vLLM 0.30 to 0.33",
        fix="install one of these, or set cache.engine to transformers",
    )


class _Rows:
    """What `RequestOutput.prompt_logprobs` holds: two arrays, and no Python object per logprob."""

    def __init__(self, tensors: Any) -> None:
        self.ids_LC: np.ndarray = tensors[0].numpy()
        self.numbers_LW: np.ndarray = tensors[1].numpy()


@contextmanager
def _rows_kept_whole() -> Iterator[None]:
    """Make vLLM's front end pass the tensors on, where it would otherwise make a Python object of every logprob."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    def keep_rows(self: Any, prompt_logprobs_tensors: Any) -> None:
        self.prompt_logprobs = _Rows(prompt_logprobs_tensors)

    original = LogprobsProcessor._update_prompt_logprobs
    LogprobsProcessor._update_prompt_logprobs = keep_rows
    try:
        yield
    finally:
        LogprobsProcessor._update_prompt_logprobs = original


def _scored(recording: Recording, request: Request, output: Any) -> Scored:
    where = request.name
    rows, length = output.prompt_logprobs, len(request.tokens_L1) - 1
    if not isinstance(rows, _Rows) or len(rows.ids_LC) != length:
        found = len(rows.ids_LC) if isinstance(rows, _Rows) else "none"
        raise InputError("vLLM returned a wrong number of rows", where=where, found=found, expected=length)
    scored = unpack(recording, rows.ids_LC, rows.numbers_LW, where)
    _require_own_rows(output, scored, where)
    return scored


def _require_own_rows(output: Any, scored: Scored, where: str) -> None:
    """The greedy token that vLLM's sampler chose after the prompt must be the top of the last captured row."""
    completion = output.outputs[0]
    greedy, top = float(completion.logprobs[0][completion.token_ids[0]].logprob), scored.top_logprob
    # if a padding column of the head is NaN, both logprobs are NaN, and the rows of the real ids are still valid
    if not (abs(top - greedy) <= _GREEDY_TOLERANCE_NATS or (math.isnan(top) and math.isnan(greedy))):
        raise InputError(
            "the captured rows are not those of the request",
            where=where,
            found=f"a top logprob of {top:.4f} after the last token",
            expected=f"{greedy:.4f}, the logprob of the greedy token",
            fix="report this together with the version of vLLM; cache.engine: transformers is not affected",
        )
