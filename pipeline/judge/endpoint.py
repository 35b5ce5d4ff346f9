"""One client of an endpoint of OpenAI's form. Its key is in no text that leaves here: no reply, no error.

Sending again after timeouts, lost connections, 429 and 5xx is the client library's, which heeds `Retry-After`.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    NotFoundError,
    OpenAI,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
)

from capgap.pipeline.judge.prompts import Messages
from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.judge_results import Ask, JudgeIdentity
from capgap.schemas.run_judge import JudgeSettings
from capgap.schemas.secrets import remember_secret

# What a server of its own takes for a key, where none is set.
_NO_KEY = "none"

# Anything shorter is no secret, and replacing it would spoil replies.
_SHORTEST_SECRET = 6

# What an endpoint lists of a model and stands for it; when a server was started is no part of who judges.
_IDENTITY = ("id", "owned_by", "root")

# How endpoints say that they do not list models.
_NOT_LISTING = (400, 404, 405, 501)

_AGAIN = "run the same command again, which goes on where this one stopped"


class RefusedError(Exception):
    """The endpoint refuses this one request, for example because it is too long for the judge."""


class Endpoint:
    """Asks the judge.

    Raises:
        SettingError: the key holds characters that no key has.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self._settings = settings
        self._key = key_of(settings)
        remember_secret(self._key)
        self._client = OpenAI(
            api_key=self._key or _NO_KEY,
            base_url=settings.base_url,
            timeout=settings.timeout_s,
            max_retries=settings.num_retries,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connections; requests under way fail."""
        self._client.close()

    def identity(self) -> JudgeIdentity:
        """Who answers here under the judge's name; without more than the name where the endpoint lists no models.

        Raises:
            MachineError: the endpoint cannot be reached, or does not answer in OpenAI's form.
            SettingError: it does not take the key.
        """
        return JudgeIdentity(model=self._settings.model, served=self._listed().get(self._settings.model, {}))

    def ask(self, messages: Messages) -> Ask:
        """One reply.

        Raises:
            MachineError: the endpoint cannot be reached, is too slow, too busy or fails, as often as it was asked.
            SettingError: it does not take the key, or has no such model.
            RefusedError: it does not take this request.
        """
        settings = self._settings
        more: dict[str, Any] = {} if settings.temperature is None else {"temperature": settings.temperature}
        try:
            made = self._client.chat.completions.create(
                model=settings.model,
                messages=list(messages),  # type: ignore[arg-type]
                max_completion_tokens=settings.max_tokens,
                **more,
            )
            choice = made.choices[0]
            reply, finish, answered_by = choice.message.content or "", choice.finish_reason, made.model
        except (OpenAIError, ValueError, AttributeError, TypeError, IndexError) as error:
            raise self._named(error) from None
        return Ask(
            messages=messages,
            reply=self._clean(reply),
            finish=None if finish is None else self._clean(finish),
            answered_by=self._clean(answered_by or ""),
        )

    def _listed(self) -> dict[str, dict[str, str]]:
        """What the endpoint lists, by name."""
        try:
            models = self._client.models.list().data
            found = [{name: getattr(model, name, None) for name in _IDENTITY} for model in models]
        except (OpenAIError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, APIStatusError) and error.status_code in _NOT_LISTING:
                return {}
            raise self._named(error) from None
        return {
            str(one["id"]): {name: self._clean(str(value)) for name, value in one.items() if value is not None}
            for one in found
        }

    def _named(self, error: Exception) -> Exception:
        """The error in the user's words."""
        where, found = self._settings.base_url, self._clean(_said(error))
        match error:
            case APITimeoutError():
                asked = f"{self._settings.num_retries + 1} requests of up to {self._settings.timeout_s:g} s"
                return MachineError(
                    "the judge does not answer in time",
                    where=where,
                    found=asked,
                    fix=f"raise judge.timeout_s, or {_AGAIN}",
                )
            case APIConnectionError():
                return MachineError("the judge cannot be reached", where=where, found=found, fix=f"start it; {_AGAIN}")
            case AuthenticationError() | PermissionDeniedError():
                name = self._settings.api_key_env
                fix = f"put another into {name}" if self._key else f"put one into the environment variable {name}"
                return SettingError("the judge does not take the key", where=where, found=found, fix=fix)
            case NotFoundError():
                return SettingError(
                    "no such model, or no endpoint of OpenAI's form",
                    where=where,
                    found=found,
                    expected=self._settings.model,
                    fix="change judge.model or judge.base_url",
                )
            case RateLimitError():
                return MachineError(
                    "the judge's rate limit is reached",
                    where=where,
                    found=found,
                    fix=f"lower judge.num_parallel; {_AGAIN}",
                )
            case APIStatusError() if error.status_code < 500:
                return RefusedError(found)
            case APIStatusError():
                return MachineError("the judge fails", where=where, found=found, fix=_AGAIN)
            case _:
                return MachineError(
                    "does not answer in OpenAI's form",
                    where=where,
                    found=found,
                    fix=f"change judge.base_url, or {_AGAIN}",
                )

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text


def key_of(settings: JudgeSettings) -> str:
    """The key of the environment; empty where there is none.

    Raises:
        SettingError: it holds what no key holds. The error does not repeat it.
    """
    key = os.environ.get(settings.api_key_env, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise SettingError(
            "holds characters that no key has", where=settings.api_key_env, expected="printable ASCII without spaces"
        )
    return key


def _said(error: Exception) -> str:
    """Short, on one line; what lies behind a lost connection stands in its cause."""
    text = str(error.__cause__ or error) if isinstance(error, APIConnectionError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__
