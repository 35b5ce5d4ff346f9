"""An endpoint of OpenAI's form, on this machine, whose judge says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from endpoint_server import Answer, Body, EndpointServer, serving

MODEL = "tiny-judge"


def said(text: str, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Answer({"id": "1", "object": "chat.completion", "created": 1, "model": f"{MODEL}-1", "choices": [choice]})


@dataclass
class JudgeServer(EndpointServer):
    """The judge's side; `judge` makes what is answered of a request's body and the number of requests before it."""

    judge: Callable[[Body, int], Answer] = lambda body, number: said("Rating: [[5]]")
    models: list[dict[str, Any]] | Answer = field(
        default_factory=lambda: [{"id": MODEL, "object": "model", "created": 1, "owned_by": "a test", "root": "/m"}]
    )

    def reply(self, body: Body, number: int) -> Answer:
        return self.judge(body, number)

    def prompts(self) -> list[str]:
        """What was asked, each as one text."""
        return [json.dumps(body["messages"]) for body in self.asked]


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    with serving(JudgeServer()) as state:
        yield state
