from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.store.quantise import NUM_COMPANDED, Companded, LogUniform

# every size that a logprob can have, densely
LOGPROBS = -np.concatenate([np.linspace(0, 30, 300_001), np.geomspace(1e-9, 2000, 100_000)]).astype(np.float32)
# float32 holds logprobs of up to 24 nats, and of up to 1024, no more exactly than this
ROUNDING = {LogUniform: 1e-4, Companded: 4e-6}


@pytest.mark.parametrize("kind", [LogUniform, Companded])
def test_the_error_is_the_stated_one_and_no_smaller(kind) -> None:
    quantiser = kind()
    found = quantiser.decode(quantiser.encode(LOGPROBS))
    error = np.abs(found - np.maximum(LOGPROBS, quantiser.floor_nats)).max()
    assert 0.99 * quantiser.error_nats < error <= quantiser.error_nats + ROUNDING[kind]
    assert found.dtype == np.float32


@pytest.mark.parametrize("kind", [LogUniform, Companded])
def test_the_order_of_logprobs_is_kept(kind) -> None:
    codes = kind().encode(np.sort(LOGPROBS)[::-1])
    assert (np.diff(codes.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("kind", [LogUniform, Companded])
def test_every_code_stands_for_a_logprob_of_its_own(kind) -> None:
    quantiser = kind()
    codes = np.arange(NUM_COMPANDED if kind is Companded else 1 << 16)
    logprobs = quantiser.decode(codes.astype(quantiser.encode(LOGPROBS).dtype))
    assert (np.diff(logprobs) < 0).all() and logprobs[0] == 0
    assert (quantiser.encode(logprobs) == codes).all()
    assert logprobs[-1] == pytest.approx(quantiser.floor_nats, rel=1e-6)


def test_companded_codes_are_finest_where_a_token_is_likely() -> None:
    """Half a step of 1/48 nat at probability 1, half a step of 1/5 nat at 1/92 and below."""
    quantiser = Companded()
    for low, high, error in ((-0.02, 0, 1 / 96 * 1.02), (-0.7, 0, 1 / 96 * np.sqrt(2) * 1.02), (-20, -5, 1 / 10)):
        logprobs = LOGPROBS[(low <= LOGPROBS) & (high >= LOGPROBS)]
        assert np.abs(quantiser.decode(quantiser.encode(logprobs)) - logprobs).max() <= error + 4e-6


def test_what_only_rounding_puts_above_0_becomes_0() -> None:
    assert LogUniform().encode(np.array([1e-5], np.float32)) == 0
    assert Companded().encode(np.array([1e-5], np.float32)) == 0


@pytest.mark.parametrize("code", [NUM_COMPANDED, 255])
def test_a_code_that_stands_for_nothing_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"code {code}, expected at most 183"):
        Companded().decode(np.array([0, code], np.uint8))
