"""Reads prompts as JSONL: conversations or texts that a model is to continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capgap.pipeline.corpus.records import read_record
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.run_rounds import RoundsSettings

Split = Literal["student", "heldout"]
"""The split of a prompt: students learn from answers to `student` prompts, and are measured on those to `heldout`."""

_SETTING = "rounds.prompts"


@dataclass(frozen=True)
class PromptRecord:
    """One prompt, which is a conversation or a text.

    Attributes:
        where: file and line of the prompt.
        messages: messages of the conversation, as chat templates expect them; empty for a text.
        text: the text to continue; empty for a conversation.
        references: right answers; empty if the line has none.
        tools: tools that the writer may call in the conversation, as chat templates expect them.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    text: str
    references: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def digest(self) -> bytes:
        """Digest by which equal prompts are recognized, 8 bytes; it does not depend on the place of the file."""
        said = json.dumps([self.messages, self.text, *self.tools], sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=8).digest()


def read_prompts(paths: Sequence[str]) -> list[PromptRecord]:
    """Return the prompts of all files, in order.

    Raises:
        InputError: a file is missing or cannot be read, a line is no prompt, or the files hold no prompt at all.
    """
    found = [prompt for path in paths for prompt in _prompts_of(Path(path))]
    if not found:
        raise InputError(
            "there is no prompt", where=f"{_SETTING}: {', '.join(paths)}", expected="one JSON object a line"
        )
    return found


def prompt_files(paths: Sequence[str]) -> list[Path]:
    """Return the files of prompts as paths.

    Raises:
        InputError: a file is missing.
    """
    for path in paths:
        if not Path(path).is_file():
            raise InputError("no such file", where=f"{_SETTING}: {path}", expected="prompts as JSONL")
    return [Path(path) for path in paths]


def split_prompts(prompts: Sequence[PromptRecord], settings: RoundsSettings, number: int) -> dict[Split, list[int]]:
    """Choose the prompts of a round, and return their places among all prompts.

    The digest of a prompt decides whether it is held out, so that no prompt changes its split, and equal prompts stay
    together. No round has a prompt twice, even if it asks for more prompts than there are.

    Args:
        prompts: all prompts.
        settings: the settings of the rounds.
        number: number of the round, from 0.

    Raises:
        InputError: no prompt is left to learn from, or none is held out.
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
    # a prompt is used once per round, because the same prompt with the same seed gives the same answer
    size = min(settings.prompts_per_round or len(learnt), len(learnt))
    first = number * size
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
        raise InputError("the file is no text in UTF-8", where=f"{_SETTING}: {path}") from None


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
        # read like a record of a corpus, so that tools, tool calls and all forms of conversations are understood
        read = read_record(where, found, "prompt", None if messages is None else "messages")
        if isinstance(read, str):
            return PromptRecord(where, (), read, references)
        if read.messages[-1]["role"] == "assistant":
            raise ValueError("a conversation that ends with the assistant")
        return PromptRecord(where, tuple(read.messages), "", references, tuple(read.tools))
    except (ValueError, RecursionError, BadRecordError) as error:
        found = f"{error.what}: {error.found}" if isinstance(error, BadRecordError) else str(error)
        raise InputError(
            "is no prompt",
            where=error.where if isinstance(error, BadRecordError) else where,
            found=found[:200],
            expected='{"messages": [{"role": "user", "content": ...}]} or {"prompt": ...}, perhaps with "reference"',
        ) from None


def _references(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    found = given if isinstance(given, list) else [given]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError("a reference that is neither a text nor a list of texts")
    return tuple(found)
