"""Reads prompts, JSONL: conversations that a model is to go on with, or texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capgap.schemas.errors import InputError
from capgap.schemas.run_rounds import RoundsSettings

Split = Literal["student", "heldout"]
"""Prompts whose answers are learnt, and those whose answers are what students are measured on."""

_SETTING = "rounds.prompts"


@dataclass(frozen=True)
class PromptRecord:
    """One line of a file.

    Attributes:
        where: file and line.
        messages: of a conversation; empty for a text.
        text: to be continued; empty for a conversation.
        references: right answers, where the line has them.
    """

    where: str
    messages: tuple[dict[str, str], ...]
    text: str
    references: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """What tells prompts apart, 8 bytes; where its file lies is not in it."""
        said = json.dumps([self.messages, self.text], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).digest()


def read_prompts(paths: Sequence[str]) -> list[PromptRecord]:
    """All prompts, in order.

    Raises:
        InputError: a file is missing or cannot be read, a line is no prompt, or there is none at all.
    """
    found = [prompt for path in paths for prompt in _prompts_of(Path(path))]
    if not found:
        raise InputError(
            "there is no prompt", where=f"{_SETTING}: {', '.join(paths)}", expected="one JSON object a line"
        )
    return found


def prompt_files(paths: Sequence[str]) -> list[Path]:
    """The files.

    Raises:
        InputError: one is missing.
    """
    for path in paths:
        if not Path(path).is_file():
            raise InputError("no such file", where=f"{_SETTING}: {path}", expected="prompts as JSONL")
    return [Path(path) for path in paths]


def split_prompts(prompts: Sequence[PromptRecord], settings: RoundsSettings, number: int) -> dict[Split, list[int]]:
    """The places of the prompts of a round.

    Which prompts are held out is decided by the digest of each, so that none moves, and all that are equal stay
    together.

    Raises:
        InputError: none is left to learn from, or none is held out.
    """
    places = [int.from_bytes(prompt.digest, "big") / 2**64 for prompt in prompts]
    heldout = [i for i, place in enumerate(places) if place < settings.heldout_fraction]
    learnt = [i for i, place in enumerate(places) if place >= settings.heldout_fraction]
    for name, some in (("held out", heldout), ("left to learn from", learnt)):
        if not some:
            raise InputError(
                f"no prompt is {name}",
                where=_SETTING,
                found=f"{len(prompts)} prompts, of which {settings.heldout_fraction:.0%} are held out by their digest",
                expected="at least one",
                fix="give more prompts, or change rounds.heldout_fraction",
            )
    size = settings.prompts_per_round or len(learnt)
    first = number * size if settings.prompts_per_round else 0
    chosen = [learnt[(first + i) % len(learnt)] for i in range(size)]
    return {"student": chosen, "heldout": heldout[: settings.num_heldout_prompts]}


def _prompts_of(path: Path) -> Iterator[PromptRecord]:
    (path,) = prompt_files([str(path)])
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _prompt(line, f"{path}:{number}")
    except UnicodeDecodeError:
        raise InputError("is no text in UTF-8", where=f"{_SETTING}: {path}") from None


def _prompt(line: str, where: str) -> PromptRecord:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, no object")
        messages, text = found.get("messages"), found.get("prompt")
        if (messages is None) == (text is None):
            raise ValueError("both of messages and prompt" if messages is not None else "neither messages nor prompt")
        if text is not None and (not isinstance(text, str) or not text):
            raise ValueError("a prompt that is no text, or empty")
        references = _references(found.get("reference"))
        return PromptRecord(where, () if messages is None else _messages(messages), text or "", references)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "is no prompt",
            where=where,
            found=str(error)[:200],
            expected='{"messages": [{"role": "user", "content": ...}]} or {"prompt": ...}, perhaps with "reference"',
        ) from None


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages that are no list, or empty")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError("a message without role and content as texts")
    if messages[-1]["role"] == "assistant":
        raise ValueError("a conversation that ends with the assistant")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _references(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    found = given if isinstance(given, list) else [given]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError("a reference that is neither a text nor several")
    return tuple(found)
