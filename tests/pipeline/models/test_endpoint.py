"""The key of an endpoint is in no error, wherever the error's text is cut."""

from __future__ import annotations

import pytest

from capgap.pipeline.models.endpoint import Endpoint
from capgap.schemas.run_endpoint import EndpointSettings

KEY = "abcdefghijklmnopqrstuvwxyz-0123456789"


@pytest.mark.parametrize("num_before", [0, 270, 299, 301])
def test_a_key_across_the_cut_of_an_error_is_not_shown_in_part(num_before: int, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with Endpoint(EndpointSettings(api_key_env="MY_KEY"), "m", "the judge", "judge", "judge.model") as endpoint:
        said = str(endpoint.named(ValueError(f"{'=' * num_before} {KEY} {'=' * 400}")))
    assert "abc" not in said and "found" in said
    assert said.count("=") <= 300
