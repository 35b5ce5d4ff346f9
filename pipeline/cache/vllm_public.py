"""The `topk` recording through vLLM's public interface: prompt logprobs in flat lists.

    prompt of L tokens -> entries 1 .. L - 1: logprobs of the label and of the top-k tokens, for rows 0 .. L - 2
                       -> the generated token's top-k tokens: row L - 1, the last one

The last row's label is not part of the prompt. Where it is not among the top-k tokens, the sequence is submitted once
more for that one logprob. The tail is 1 minus the sum of the kept probabilities, so it is imprecise below 1e-6; capture
on the worker sums the tail itself. Only `topk` at temperature 1 is possible this way, and not for a head with padding
columns: vLLM's logprobs are normalised over all columns, and the content of the padding columns is not known.

Legend: L targets of a request, K ids kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from capgap.pipeline.cache.scoring import Recording, Request, Scored, unpack
from capgap.pipeline.cache.vllm_submission import Run
from capgap.pipeline.stage.progress import advance_within
from capgap.schemas.errors import InputError, SettingError


class PublicRequests:
    """Scores requests through vLLM's public `FlatLogprobs`, which give every row of a request."""

    def __init__(self, recording: Recording) -> None:
        import vllm

        self._recording = recording
        self._params = vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=recording.top_k,
            logprobs=recording.top_k,
            flat_logprobs=True,
        )

    def score(self, run: Run, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests as one submission, and return the results in the order of the requests."""
        submission = [(str(i), request.tokens_L1[:-1].tolist(), self._params) for i, request in enumerate(requests)]
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for index, output in run(submission):
            found[index] = self._rows(requests[index], output)
            advance_within(requests[index].share)
        unknown = [index for index, (_, numbers_LW) in found.items() if np.isneginf(numbers_LW[-1, 0])]
        for place, logprob in self._last_labels(run, [requests[index] for index in unknown]):
            found[unknown[place]][1][-1, 0] = logprob
        return [unpack(self._recording, *found[index], request.name) for index, request in enumerate(requests)]

    def _rows(self, request: Request, output: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and numbers in the columns of `PackedRows`; an unknown logprob of the last label is -inf."""
        prompt, last, length = output.prompt_logprobs, output.outputs[0].logprobs, len(request.tokens_L1) - 1
        shape = (length, self._recording.top_k + 1)
        ids = np.concatenate([np.asarray(part.token_ids, dtype=np.int32) for part in (prompt, last)])
        if len(prompt) != length or len(last) != 1 or ids.size != length * shape[1]:
            raise InputError(
                "vLLM returned a wrong number of rows",
                where=request.name,
                found=f"{len(prompt)} positions with {ids.size} logprobs in total",
                expected=f"{length} positions with {length * shape[1]} logprobs",
            )
        logprobs = np.concatenate([np.asarray(part.logprobs, dtype=np.float32) for part in (prompt, last)])
        logprobs = logprobs.reshape(shape)
        ids_LK, logprobs_LK = ids.reshape(shape)[:, 1:], logprobs[:, 1:]
        label_L = logprobs[:, 0].copy()
        at_label = np.flatnonzero(ids_LK[-1] == request.tokens_L1[-1])
        label_L[-1] = logprobs_LK[-1, at_label[0]] if at_label.size else -np.inf
        tail_L = np.maximum(0.0, 1.0 - np.exp(logprobs_LK, dtype=np.float64).sum(axis=1))
        columns = np.stack([label_L, logprobs_LK[:, 0], tail_L.astype(np.float32)], axis=1)
        return np.ascontiguousarray(ids_LK), np.concatenate([columns, logprobs_LK], axis=1)

    @staticmethod
    def _last_labels(run: Run, requests: Sequence[Request]) -> list[tuple[int, float]]:
        import vllm

        submission = []
        for index, request in enumerate(requests):
            label = int(request.tokens_L1[-1])
            params = vllm.SamplingParams(
                max_tokens=1, temperature=0.0, detokenize=False, logprob_token_ids=[label], flat_logprobs=True
            )
            submission.append((str(index), request.tokens_L1[:-1].tolist(), params))
        # vLLM lists the sampled token first and the requested token second
        return [(index, output.outputs[0].logprobs.logprobs[1]) for index, output in run(submission)]


def require_public(recording: Recording, num_columns: int, why: str) -> None:
    """Raise SettingError where vLLM's public logprobs cannot give what the recording keeps.

    Args:
        recording: what to keep of each row of logits.
        num_columns: number of columns of the teacher's head, padding included.
        why: reason for using the public logprobs, as told to the user.
    """
    if recording.num_samples:
        found = "both" if recording.top_k else "sampled"
        _refuse("cache.recording", found, "topk, the only one that vLLM's public logprobs can give", why)
    if recording.temperature != 1.0:
        _refuse("cache.temperature", recording.temperature, "1, the temperature of vLLM's public logprobs", why)
    if recording.extra_temperatures:
        found = ", ".join(f"{temperature:g}" for temperature in recording.extra_temperatures)
        _refuse("cache.extra_temperatures", found, "none: tails at other temperatures need all logits", why)
    if num_columns != recording.vocab_size:
        _refuse(
            "teacher",
            f"a head of {num_columns} columns",
            f"{recording.vocab_size}, the vocabulary: vLLM's public logprobs include the padding columns",
            why,
        )


def _refuse(where: str, found: object, expected: str, why: str) -> None:
    raise SettingError(
        f"cannot be kept without capture ({why})",
        where=where,
        found=found,
        expected=expected,
        fix="install a vLLM from 0.30 to 0.33 and set cache.capture to auto, or set cache.engine to transformers",
    )
