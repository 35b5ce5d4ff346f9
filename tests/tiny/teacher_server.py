"""A server with `prompt_logprobs`, as vLLM has them, whose rows are those of a real tiny model in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from endpoint_server import Answer, Body, EndpointServer, serving
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

KEY = "sk-test-0123456789"
MODEL = "tiny-teacher"


def listed(name: str = MODEL, root: str = "/m", longest: int = 4096) -> list[dict[str, Any]]:
    """What a server says of its one model."""
    return [{"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": root, "max_model_len": longest}]


def refused(message: str, status: int = 400) -> Answer:
    return Answer({"error": {"message": message, "type": "BadRequestError", "code": status}}, status=status)


@dataclass
class TeacherServer(EndpointServer):
    """The teacher's side.

    Attributes:
        folder: of the model.
        max_logprobs: of a token that it gives.
        change: what becomes of an answer on its way, of the answer, the request's body and the number of requests
            before it.
        most_at_once: the most requests that were under way at one time.
    """

    folder: str = ""
    max_logprobs: int = 64
    change: Callable[[Answer, Body, int], Answer] = lambda answer, body, number: answer
    models: list[dict[str, Any]] | Answer = field(default_factory=listed)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._model = LlamaForCausalLM.from_pretrained(self.folder).eval()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
        self._at_once = 0
        self._one = threading.Lock()

    def reply(self, body: Body, number: int) -> Answer:
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.change(self._answer(body), body, number)
        finally:
            with self.lock:
                self._at_once -= 1

    def _answer(self, body: Body) -> Answer:
        if body["prompt_logprobs"] > self.max_logprobs:
            return refused(
                f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed: "
                f"{self.max_logprobs}"
            )
        prompt = body["prompt"]
        ids = self._tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        choice = {
            "index": 0,
            "text": "x",
            "finish_reason": "length",
            "prompt_token_ids": ids,
            "prompt_logprobs": self._rows(ids, body["prompt_logprobs"]),
        }
        return Answer({"id": "1", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]})

    def _rows(self, ids: list[int], top_k: int) -> list[dict[str, Any] | None]:
        # one request after the other, so that its sums are always taken alike
        with self._one, torch.inference_mode():
            logprobs_LV = torch.log_softmax(self._model(torch.tensor([ids])).logits[0, :-1].float(), -1)
        rows: list[dict[str, Any] | None] = [None]
        for logprobs_V, token in zip(logprobs_LV, ids[1:], strict=True):
            top = torch.topk(logprobs_V, top_k).indices.tolist()
            # as vLLM has it: the token first, and once
            rows.append({str(one): {"logprob": float(logprobs_V[one]), "rank": 1} for one in [token, *top]})
        return rows


@contextmanager
def teacher_server(folder: str) -> Iterator[TeacherServer]:
    with serving(TeacherServer(folder=folder)) as state:
        yield state
