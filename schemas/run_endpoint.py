"""Settings of an OpenAI-compatible endpoint: where a server runs a model, and how it is asked."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record


class EndpointSettings(Record):
    """A model that a server runs, on this machine or elsewhere."""

    base_url: str = Field("http://localhost:8000/v1", json_schema_extra=OPERATIONAL)
    """Address of an OpenAI-compatible endpoint. The default is that of `vllm serve` on this machine."""

    api_key_env: str = Field("OPENAI_API_KEY", json_schema_extra=OPERATIONAL)
    """Name of the environment variable that holds the API key. The key itself is never written anywhere."""

    num_parallel: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Number of requests sent at the same time."""

    timeout_s: float = Field(120.0, gt=0, json_schema_extra=OPERATIONAL)
    """Longest time to wait for one reply, in seconds."""

    num_retries: int = Field(5, ge=0, json_schema_extra=OPERATIONAL)
    """How often a request is repeated after a timeout, a lost connection or the status 429 or 5xx. It waits as long as
    the endpoint requests, up to two minutes, or else 0.5 s, then twice as long each time, up to 8 s."""

    def require_no_key(self, section: str) -> None:
        """Raise ValueError if `base_url` or `api_key_env` may hold a key, without repeating its value.

        The run file calls this, because an error of a validator of this class would be reported with the value found.

        Args:
            section: name of the section that these settings are in, for the error.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{section}.base_url: expected http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"{section}.base_url: found more than an address, expected no name, no password and no query; "
                f"put the key into the environment variable that {section}.api_key_env names"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                f"{section}.api_key_env: expected the name of an environment variable, which holds the key"
            )
