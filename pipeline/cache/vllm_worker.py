"""Capture on the vLLM worker: rows of logits are reduced on their device, and travel as two tensors per request.

After every step, vLLM asks its model runner for the prompt logprobs of the requests in the batch. Capture replaces the
one bound method that answers, so that the prompt-logprob channel carries our record of every prompt token, the last one
included:

    runner V1   model_runner._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
    runner V2   model_runner.prompt_logprobs_worker.compute_prompt_logprobs(logits_fn, hidden_states, input_batch, ...)

Each method's signature is compared with the one that this code was written for. A vLLM with another one is refused.

Legend: N rows of a step, L targets of a request, C ids, W numbers, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import os
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from capgap.pipeline.cache.scoring import PackedRows, Recording, record_rows, row_offsets
from capgap.pipeline.stage.orphans import die_with

LogitsOf = Callable[[torch.Tensor], torch.Tensor]

_V1_SIGNATURE = ["hidden_states", "num_scheduled_tokens"]
_V2_SIGNATURE = [
    "logits_fn",
    "hidden_states",
    "input_batch",
    "all_token_ids",
    "num_computed_tokens",
    "prompt_lens",
]


@dataclass(frozen=True)
class RequestKey:
    """What the worker must know about a request beside its prompt; it travels as the request's id.

    Attributes:
        index: place of the request in its submission.
        label: the last token of the request, which is not part of the prompt.
        digest: the key of the request's samples.
    """

    index: int
    label: int
    digest: bytes

    def encode(self) -> str:
        """Return the key as a request id."""
        return f"{self.index}.{self.label}.{self.digest.hex()}"

    @staticmethod
    def decode(request_id: str) -> RequestKey:
        """Read the key from a request id, with or without the random suffix that vLLM appends."""
        index, label, digest = request_id.split("-")[0].split(".")
        return RequestKey(int(index), int(label), bytes.fromhex(digest))


@dataclass(frozen=True)
class _Span:
    """Rows of one request in a step: `num_rows` rows of the batch, from `row` on, at prompt positions from `start`."""

    request_id: str
    row: int
    num_rows: int
    start: int
    num_prompt: int
    next_tokens: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


class Capture:
    """Records the rows of every step and joins the chunks of each request.

    Args:
        recording: what to keep of each row of logits.
        answers: whether this worker's rows reach the engine. Where several workers share a teacher, all of them take
            part in the product with the head, but only one records.
    """

    def __init__(self, recording: Recording, answers: bool = True) -> None:
        self._recording, self._answers = recording, answers
        self._unfinished: dict[str, list[tuple[_Span, PackedRows]]] = {}

    def step(self, hidden_NH: torch.Tensor, logits_of: LogitsOf, spans: list[_Span]) -> dict[str, Any]:
        """Record the rows of one step, and return the requests that it finishes, as vLLM's `LogprobsTensors`.

        Args:
            hidden_NH: the last hidden states of the whole batch.
            logits_of: turns hidden states into logits; all workers that share a teacher must call it together.
            spans: the rows of each request.
        """
        from vllm.v1.outputs import LogprobsTensors

        finished = {}
        for span, packed in zip(spans, self._record(hidden_NH, logits_of, spans), strict=self._answers):
            chunks = self._unfinished.setdefault(span.request_id, [])
            # after preemption a request starts over, so the rows of its first attempt are dropped
            chunks[:] = [chunk for chunk in chunks if chunk[0].stop <= span.start]
            chunks.append((span, packed))
            if span.stop < span.num_prompt:
                continue
            del self._unfinished[span.request_id]
            ids_LC = _joined([chunk.ids_NC for _, chunk in chunks])
            numbers_LW = _joined([chunk.numbers_NW for _, chunk in chunks])
            finished[span.request_id] = LogprobsTensors(ids_LC, numbers_LW, ids_LC[:0, 0])
        return finished

    def _record(self, hidden_NH: torch.Tensor, logits_of: LogitsOf, spans: list[_Span]) -> list[PackedRows]:
        if not spans:
            return []
        device = hidden_NH.device
        rows_NH = _rows(hidden_NH, spans)
        labels_N = on_device(_joined([s.next_tokens for s in spans]), device).long()
        offsets_N = self._offsets(spans, device)
        sizes = [s.num_rows for s in spans]
        last = [end - 1 for end, s in zip(accumulate(sizes), spans, strict=True) if s.stop == s.num_prompt]
        last_rows = on_device(torch.tensor(last, dtype=torch.int64), device)
        parts = []
        for start in range(0, len(labels_N), self._recording.chunk_rows):
            part = slice(start, start + self._recording.chunk_rows)
            logits_NV = logits_of(rows_NH[part])
            if self._answers:
                offsets_part = None if offsets_N is None else offsets_N[part]
                own = last_rows[bisect_left(last, part.start) : bisect_left(last, part.stop)] - start
                parts.append(record_rows(self._recording, logits_NV, labels_N[part], offsets_part, own))
        if not self._answers:
            return []
        ids = torch.split(_joined([part.ids_NC for part in parts]), sizes)
        numbers = torch.split(_joined([part.numbers_NW for part in parts]), sizes)
        return [PackedRows(i, n) for i, n in zip(ids, numbers, strict=True)]

    def _offsets(self, spans: list[_Span], device: torch.device) -> torch.Tensor | None:
        drawn = [
            row_offsets(self._recording, RequestKey.decode(s.request_id).digest, s.start, s.num_rows) for s in spans
        ]
        found = [d for d in drawn if d is not None]
        return on_device(torch.from_numpy(np.concatenate(found)), device) if found else None


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move the tensor to the device; a copy from the host uses pinned memory, so that it does not block."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _rows(hidden_NH: torch.Tensor, spans: list[_Span]) -> torch.Tensor:
    """Return the rows of all spans in order, without a copy if they are adjacent, as in a batch of prompts only."""
    if all(span.row + span.num_rows == following.row for span, following in pairwise(spans)):
        return hidden_NH[spans[0].row : spans[-1].row + spans[-1].num_rows]
    return torch.cat([hidden_NH[s.row : s.row + s.num_rows] for s in spans])


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class CaptureExtension:
    """Mixed into vLLM's worker class; its methods are called through `collective_rpc`."""

    model_runner: Any

    def capgap_die_with(self, engine_pid: int) -> None:
        """If this worker runs in its own process, end that process when the engine's process dies for any reason."""
        if os.getpid() != engine_pid:
            die_with(engine_pid)

    def capgap_install(self, **recording: Any) -> str:
        """Replace the runner's method and return the runner's generation, `V1` or `V2`.

        A second call replaces the recording of the first.

        Raises:
            RuntimeError: this vLLM lacks the method, or the method has another signature.
        """
        return self.capgap_hook(Capture(Recording(**recording), answers=_first_of_its_group()))

    def capgap_hook(self, capture: Capture) -> str:
        """Replace the runner's method by the given capture and return the runner's generation, `V1` or `V2`."""
        self.capgap_remove()
        runner = self.model_runner
        worker = getattr(runner, "prompt_logprobs_worker", None)
        if worker is not None:
            _require_signature(getattr(worker, "compute_prompt_logprobs", None), _V2_SIGNATURE)
            worker.compute_prompt_logprobs = _v2_hook(worker, capture)
            return "V2"
        _require_signature(getattr(runner, "_get_prompt_logprobs_dict", None), _V1_SIGNATURE)
        runner._get_prompt_logprobs_dict = _v1_hook(runner, capture)
        return "V1"

    def capgap_remove(self) -> None:
        """Restore the runner's own method."""
        vars(self.model_runner).pop("_get_prompt_logprobs_dict", None)
        worker = getattr(self.model_runner, "prompt_logprobs_worker", None)
        if worker is not None:
            vars(worker).pop("compute_prompt_logprobs", None)


def _first_of_its_group() -> bool:
    from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized

    return not model_parallel_is_initialized() or get_tp_group().rank_in_group == 0


def _require_signature(method: Callable[..., Any] | None, expected: list[str]) -> None:
    found = list(inspect.signature(method).parameters) if method is not None else None
    if found != expected:
        raise RuntimeError(f"capture hook: found {found}, expected {expected}")


def _v1_hook(runner: Any, capture: Capture) -> Callable[..., dict[str, Any]]:
    def get_prompt_logprobs(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        wanted = runner.num_prompt_logprobs
        spans = []
        for request_id in runner.input_batch.req_ids:
            if request_id not in wanted or request_id not in num_scheduled_tokens:
                continue
            request = runner.requests[request_id]
            num_prompt, start = len(request.prompt_token_ids), request.num_computed_tokens
            num_rows = min(num_scheduled_tokens[request_id], num_prompt - start)
            if num_rows <= 0:
                continue
            label = RequestKey.decode(request_id).label
            following = torch.tensor([*request.prompt_token_ids[start + 1 : start + num_rows + 1], label][:num_rows])
            row = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request_id]])
            spans.append(_Span(request_id, row, num_rows, start, num_prompt, following))
        finished = capture.step(hidden_states, runner.model.compute_logits, spans)
        for request_id in finished:
            del wanted[request_id]
        if finished and runner.device.type != "cpu":
            finished = {request_id: tensors.to_cpu_nonblocking() for request_id, tensors in finished.items()}
            runner._sync_device()
        return finished

    return get_prompt_logprobs


def _v2_hook(worker: Any, capture: Capture) -> Callable[..., dict[str, Any]]:
    def compute_prompt_logprobs(
        logits_fn: LogitsOf,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: np.ndarray,
    ) -> dict[str, Any]:
        spans = []
        for place, request_id in enumerate(input_batch.req_ids):
            slot = input_batch.idx_mapping_np[place]
            num_prompt = int(prompt_lens[slot])
            start = int(input_batch.num_computed_prefill_tokens_np[place])
            resumed_after_prompt = num_prompt < input_batch.prefill_len_np[place]
            if not worker.uses_prompt_logprobs[slot] or start >= num_prompt or resumed_after_prompt:
                continue
            num_rows = min(int(input_batch.num_scheduled_tokens[place]), num_prompt - start)
            following = all_token_ids[slot, start + 1 : start + num_rows + 1].clone()
            if start + num_rows == num_prompt:
                following[-1] = RequestKey.decode(request_id).label
            row = int(input_batch.query_start_loc_np[place])
            spans.append(_Span(request_id, row, num_rows, start, num_prompt, following))
        return capture.step(hidden_states, logits_fn, spans)

    return compute_prompt_logprobs
