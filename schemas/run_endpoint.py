"""Settings of an endpoint of OpenAI's form: where a model is served, and how it is asked."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record


class EndpointSettings(Record):
    """A model that is served, on this machine or elsewhere."""

    base_url: str = Field("http://localhost:8000/v1", json_schema_extra=OPERATIONAL)
    """Where an endpoint of OpenAI's form stands; the default is that of `vllm serve`."""

    api_key_env: str = Field("OPENAI_API_KEY", json_schema_extra=OPERATIONAL)
    """Environment variable that holds the key. The key itself is never written anywhere."""

    num_parallel: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Requests that are under way at once."""

    timeout_s: float = Field(120.0, gt=0, json_schema_extra=OPERATIONAL)
    """Seconds that one reply may take."""

    num_retries: int = Field(5, ge=0, json_schema_extra=OPERATIONAL)
    """How often a request is sent again after a timeout, a lost connection, 429 or 5xx: after the time that the
    endpoint asks for, up to two minutes, else after 0.5 s, and twice as long each time, up to 8 s."""

    def require_no_key(self, section: str) -> None:
        """Raise ValueError where an address or a name could be, or hold, a key; what stands there is not repeated.

        Called by the run file: an error that arises here would be told with what was found.

        Args:
            section: that these settings are, for the error.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{section}.base_url: expected http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                f"{section}.base_url: found more than an address, expected no name, no password and no query; "
                f"the key belongs into the environment variable that {section}.api_key_env names"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                f"{section}.api_key_env: expected the name of an environment variable, which holds the key"
            )
