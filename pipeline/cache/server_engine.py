"""A teacher behind an endpoint with `prompt_logprobs`, such as `vllm serve`; needs no weights and no device locally.

request --> POST /v1/completions, token ids in --> prompt_logprobs, ids and logprobs out --> top-k tokens and tail
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic_core import from_json

from capgap.pipeline.cache.request_checks import require_kept, require_scorable
from capgap.pipeline.cache.scoring import Recording, Request, Scored
from capgap.pipeline.cache.server_rows import rows_of
from capgap.pipeline.models.endpoint import FAULTS, IDENTITY, Endpoint, RefusedError
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.progress import advance_within
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.run_endpoint import EndpointSettings

SERVER_DTYPE = "the server's dtype"

_LONGEST = "max_model_len"

# Largest share of equal logprobs between neighbours in the top k. With 16-bit logits nearly half are equal, with 32-bit
# logits almost none.
_MOST_TIES = 0.1


class ServerEngine:
    """An engine whose teacher runs behind a server.

    Args:
        settings: address and limits of the server.
        model: the server's name for the teacher.
        recording: what to keep; must be `topk` at temperature 1.
        seq_len: the largest L of a request.

    Raises:
        MachineError: the server cannot be reached, or does not answer like an OpenAI-compatible server.
        SettingError: the server rejects the key, does not serve the model, or takes shorter sequences only.
    """

    def __init__(self, settings: EndpointSettings, model: str, recording: Recording, seq_len: int) -> None:
        require_kept(recording.top_k, recording.vocab_size)
        self._recording, self._seq_len, self._num_parallel = recording, seq_len, settings.num_parallel
        self._endpoint = endpoint_of(settings, model)
        self.name, self.dtype = f"server {model}", SERVER_DTYPE
        try:
            served = require_served(self._endpoint, settings, seq_len)
        except BaseException:
            self.close()
            raise
        if (root := served.get("root", model)) != model:
            self.name += f" ({root})"
        self._looked = False

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests, `cache.server.num_parallel` at a time, and return the results in order.

        Raises:
            InputError: a request cannot be scored, or the answer does not belong to its tokens.
            MachineError: the server cannot be reached, is too slow, too busy or fails, in every attempt.
            SettingError: the server rejects the key, or allows fewer logprobs.
        """
        require_scorable(requests, self._recording.vocab_size, self._seq_len)
        pool = ThreadPoolExecutor(self._num_parallel, thread_name_prefix="capgap-server")
        scored: list[Scored] = []
        try:
            # results are read in order, so that the first error is raised before the whole queue is worked off
            for request, one in zip(requests, pool.map(self._score, requests), strict=True):
                scored.append(one)
                advance_within(request.share)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self.close()
            raise
        pool.shutdown()
        if not self._looked:
            self._looked = True
            _say_if_rounded(scored)
        return scored

    def ids_of(self, text: str) -> list[int] | None:
        """Return the ids of a text by the server's own tokenizer; None where the server does not return ids."""
        try:
            ids = self._complete(text, 0, add_special_tokens=False)["choices"][0].get("prompt_token_ids")
        except RefusedError:
            return None
        return None if ids is None else list(ids)

    def close(self) -> None:
        """Close the connections to the server."""
        self._endpoint.close()

    def _score(self, request: Request) -> Scored:
        try:
            found = self._complete(request.tokens_L1.tolist(), self._recording.top_k)
        except RefusedError as error:
            raise self._refusal(str(error), request) from None
        try:
            if found["model"] != self._endpoint.model:
                raise MismatchError(
                    "the answer comes from another model than the one that was asked",
                    where=request.name,
                    found=self._endpoint.clean(str(found["model"])),
                    expected=self._endpoint.model,
                )
            return rows_of(found["choices"][0], self._recording, request)
        except FAULTS as error:
            raise self._endpoint.named(error) from None

    def _complete(self, prompt: str | list[int], num_logprobs: int, **more: Any) -> dict[str, Any]:
        """Request a completion and return it as plain JSON values.

        The client library would make an object of every logprob, which takes minutes.

        Raises:
            RefusedError: the server refuses this request.
            MachineError, SettingError: as `Endpoint.named`.
        """
        extra = {"prompt_logprobs": num_logprobs, "return_token_ids": True, **more}
        try:
            answer = self._endpoint.client.completions.with_raw_response.create(
                model=self._endpoint.model, prompt=prompt, max_tokens=1, temperature=0, extra_body=extra
            )
            found = from_json(answer.content, cache_strings="keys")
            if not isinstance(found, dict):
                raise TypeError(f"found {type(found).__name__}, expected an object")
        except FAULTS as error:
            raise self._endpoint.named(error) from None
        return found

    def _refusal(self, said: str, request: Request) -> InputError | SettingError:
        if "logprobs" in said:
            return SettingError(
                "the server allows fewer logprobs",
                where="cache.top_k",
                found=said,
                expected=f"{self._recording.top_k} logprobs",
                fix=f"start the server with --max-logprobs {self._recording.top_k}, or lower cache.top_k",
            )
        return InputError(
            "the server refuses the request",
            where=request.name,
            found=said,
            fix=f"start the server with --max-model-len {self._seq_len + 2} or more, or follow its message",
        )


def endpoint_of(settings: EndpointSettings, model: str) -> Endpoint:
    """Return the client of a teacher's server.

    Raises:
        SettingError: the key holds characters that a key cannot have.
    """
    return Endpoint(settings, model, "the teacher's server", "cache.server", "teacher.served")


def require_served(endpoint: Endpoint, settings: EndpointSettings, seq_len: int) -> dict[str, str]:
    """Return the server's entry for the teacher; empty where the server lists no models.

    Raises:
        MachineError: the server cannot be reached, or does not answer like an OpenAI-compatible server.
        SettingError: the server rejects the key, does not serve the teacher, or takes shorter sequences only.
    """
    listed = endpoint.listed((*IDENTITY, _LONGEST))
    if not listed:
        return {}
    if endpoint.model not in listed:
        raise SettingError(
            "the server does not serve this teacher",
            where=f"teacher.served, at {settings.base_url}",
            found=", ".join(listed),
            expected=endpoint.model,
            fix="set teacher.served to the server's name for the model, or start the server with the expected model",
        )
    served = listed[endpoint.model]
    longest = served.get(_LONGEST, "")
    # all seq_len + 1 tokens of a sequence are the prompt, and vLLM must generate one more
    if longest.isdigit() and int(longest) < seq_len + 2:
        raise SettingError(
            "the server takes shorter sequences",
            where="corpus.seq_len",
            found=f"{seq_len}, and --max-model-len {longest}",
            expected=f"--max-model-len {seq_len + 2} or more: a sequence, its last label, and a token to generate",
            fix=f"start the server with this value, or lower corpus.seq_len to {int(longest) - 2}",
        )
    return served


def _say_if_rounded(scored: Sequence[Scored]) -> None:
    """Warn if the server's logits seem to have 16 bits, with which half of all rows keep other ids."""
    steps = np.concatenate([np.diff(one.logprobs_LK, axis=1).ravel() for one in scored])
    ties = float((steps == 0).mean()) if steps.size else 0.0
    if ties > _MOST_TIES:
        text = (
            f"cache: {ties:.0%} of neighbours among the server's top-k tokens have equal logprobs: its logits are of "
            'few bits; start the server with --hf-overrides \'{"head_dtype": "float32"}\''
        )
        event("server_rounds", text, logging.WARNING, share_of_ties=ties)
