"""A client of an OpenAI-compatible endpoint. Its key never appears in a text that this module returns or raises.

The client library repeats requests after timeouts, lost connections, 429 and 5xx, and heeds `Retry-After`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

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

from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.run_endpoint import EndpointSettings
from capgap.schemas.secrets import remember_secret

# The client library needs some key even where none is set, and a server of one's own takes any.
_NO_KEY = "none"

# A shorter key is no secret, and replacing it everywhere would damage replies.
_SHORTEST_SECRET = 6

# The listed fields that identify a model. The time of the server's start is left out, as it does not change answers.
IDENTITY = ("id", "owned_by", "root")

# The client library's errors, and those of reading an answer that does not have OpenAI's form.
FAULTS = (OpenAIError, ValueError, AttributeError, TypeError, IndexError, KeyError)

# The status codes with which endpoints say that they do not list models.
_NOT_LISTING = (400, 404, 405, 501)

# The characters of an endpoint's error that are shown.
_MOST_SHOWN = 300

_AGAIN = "run the same command again, which goes on where this one stopped"


class RefusedError(Exception):
    """The endpoint refuses this one request, for example because it is too long for the model."""


class Endpoint:
    """A client that asks a served model.

    Args:
        settings: address and limits of the endpoint.
        model: the endpoint's name for the model.
        who: name of the model in errors, such as `the judge`.
        section: the run file's section of the settings, for errors.
        model_setting: the setting that names the model, for errors.

    Raises:
        SettingError: the key holds characters that a key cannot have.
    """

    def __init__(self, settings: EndpointSettings, model: str, who: str, section: str, model_setting: str) -> None:
        self.model, self.who = model, who
        self._settings, self._section, self._model_setting = settings, section, model_setting
        self._key = key_of(settings)
        remember_secret(self._key)
        self.client = OpenAI(
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
        """Close the connections; requests in progress fail."""
        self.client.close()

    def listed(self, names: Sequence[str] = IDENTITY) -> dict[str, dict[str, str]]:
        """Return the fields `names` of each listed model, by the model's id; empty where the endpoint lists no models.

        Raises:
            MachineError: the endpoint cannot be reached, or does not answer in OpenAI's form.
            SettingError: the endpoint rejects the key.
        """
        try:
            models = self.client.models.list().data
            found = [{name: getattr(model, name, None) for name in names} for model in models]
        except FAULTS as error:
            if isinstance(error, APIStatusError) and error.status_code in _NOT_LISTING:
                return {}
            raise self.named(error) from None
        return {
            str(one["id"]): {name: self.clean(str(value)) for name, value in one.items() if value is not None}
            for one in found
        }

    def named(self, error: Exception) -> Exception:
        """Turn an error of `FAULTS` into a CapgapError, or into RefusedError if only this one request is at fault."""
        who, section = self.who, self._section
        where, found = self._settings.base_url, self._said(error)
        match error:
            case APITimeoutError():
                asked = f"{self._settings.num_retries + 1} requests of up to {self._settings.timeout_s:g} s"
                return MachineError(
                    f"{who} does not answer in time",
                    where=where,
                    found=asked,
                    fix=f"raise {section}.timeout_s, or {_AGAIN}",
                )
            case APIConnectionError():
                return MachineError(f"{who} cannot be reached", where=where, found=found, fix=f"start it; {_AGAIN}")
            case AuthenticationError() | PermissionDeniedError():
                name = self._settings.api_key_env
                fix = f"put another into {name}" if self._key else f"put one into the environment variable {name}"
                return SettingError(f"{who} does not take the key", where=where, found=found, fix=fix)
            case NotFoundError():
                return SettingError(
                    "no such model, or no endpoint of OpenAI's form",
                    where=where,
                    found=found,
                    expected=self.model,
                    fix=f"change {self._model_setting} or {section}.base_url",
                )
            case RateLimitError():
                return MachineError(
                    f"{who}'s rate limit is reached",
                    where=where,
                    found=found,
                    fix=f"lower {section}.num_parallel; {_AGAIN}",
                )
            case APIStatusError() if error.status_code < 500:
                return RefusedError(found)
            case APIStatusError():
                return MachineError(f"{who} fails", where=where, found=found, fix=_AGAIN)
            case _:
                return MachineError(
                    "does not answer in OpenAI's form",
                    where=where,
                    found=found,
                    fix=f"change {section}.base_url, or {_AGAIN}",
                )

    def clean(self, text: str) -> str:
        """Return the text with the key replaced by `[key]`."""
        return text.replace(self._key, "[key]") if len(self._key) >= _SHORTEST_SECRET else text

    def _said(self, error: Exception) -> str:
        """Return an error's text without the key, short and on one line; for a lost connection, its cause's text."""
        text = str(error.__cause__ or error) if isinstance(error, APIConnectionError) else str(error)
        # the key is replaced before the text is cut, because half a key would not be found
        return self.clean(" ".join(text.split()))[:_MOST_SHOWN] or type(error).__name__


def key_of(settings: EndpointSettings) -> str:
    """Return the key of the environment variable; empty where there is none.

    Raises:
        SettingError: the key holds characters that a key cannot have. The error does not repeat the key.
    """
    key = os.environ.get(settings.api_key_env, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise SettingError(
            "holds characters that no key has", where=settings.api_key_env, expected="printable ASCII without spaces"
        )
    return key
