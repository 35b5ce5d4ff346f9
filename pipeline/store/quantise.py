"""Logprobs as small whole numbers, with the error that this costs.

    LogUniform    code = round(64 a)                               any a; error at most 1/128 nat
    Companded     code = round(96 (1 - exp(-b / 2)) + 5 (a - b))   a up to 24; error at most 1/10 nat, less where likely

with a = -logprob and b the smaller of a and 2 log 9.6. Companded steps are 1/48 nat at probability 1, grow with
1 / sqrt(p), so that the same care goes to each part of sqrt(p), and stop at 1/5 nat: 184 codes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from capgap.schemas.records import FloatArray

_STEPS_A_NAT = 64
_LARGEST = 0xFFFF

_BEND_NATS = 2 * np.log(9.6)
_BEND_CODE = 86
_BENT_STEPS_A_NAT = 5
NUM_COMPANDED = 184


class Quantiser(Protocol):
    """Codes of logprobs.

    Attributes:
        error_nats: a decoded logprob is at most so far from max(logprob, floor_nats).
        floor_nats: the lowest logprob that has a code; lower ones become it.
    """

    error_nats: float
    floor_nats: float

    def encode(self, logprobs: FloatArray) -> npt.NDArray[Any]:
        """Codes that never fall where logprobs do not rise."""

    def decode(self, codes: npt.NDArray[Any]) -> FloatArray:
        """The logprobs that the codes stand for, float32."""


class LogUniform:
    """Steps of 1/64 nat; codes are of two bytes."""

    error_nats = 0.5 / _STEPS_A_NAT
    floor_nats = -_LARGEST / _STEPS_A_NAT

    def encode(self, logprobs: FloatArray) -> npt.NDArray[np.uint16]:
        """Round; a logprob above 0, which only rounding makes, is 0."""
        places: npt.NDArray[Any] = logprobs * np.float32(-_STEPS_A_NAT)
        np.rint(places, out=places)
        return np.clip(places, 0, _LARGEST, out=places).astype(np.uint16)

    def decode(self, codes: npt.NDArray[Any]) -> FloatArray:
        """Exact multiples of 1/64."""
        return codes.astype(np.float32) * np.float32(-1 / _STEPS_A_NAT)


class Companded:
    """184 steps that grow from 1/48 to 1/5 nat; codes are of one byte."""

    error_nats = 0.5 / _BENT_STEPS_A_NAT
    floor_nats = -float(_BEND_NATS + (NUM_COMPANDED - 1 - _BEND_CODE) / _BENT_STEPS_A_NAT)

    def __init__(self) -> None:
        codes = np.arange(256).clip(max=NUM_COMPANDED - 1)
        curved = -2 * np.log1p(-np.minimum(codes, _BEND_CODE) / 96)
        self._logprobs = -(curved + np.maximum(codes - _BEND_CODE, 0) / _BENT_STEPS_A_NAT).astype(np.float32)

    def encode(self, logprobs: FloatArray) -> npt.NDArray[np.uint8]:
        """Round on the bent scale; in place, for memory that is touched first costs more than the arithmetic."""
        places = np.negative(logprobs)
        np.clip(places, 0, -self.floor_nats, out=places)
        curved = np.minimum(places, np.float32(_BEND_NATS))
        places -= curved
        places *= np.float32(_BENT_STEPS_A_NAT)
        curved *= np.float32(-0.5)
        np.exp(curved, out=curved)
        curved *= np.float32(96)
        places -= curved
        places += np.float32(96)
        return np.rint(places, out=places).astype(np.uint8)

    def decode(self, codes: npt.NDArray[Any]) -> FloatArray:
        """One look-up a code.

        Raises:
            ValueError: a code that is not one of the 184.
        """
        if codes.size and codes.max() >= NUM_COMPANDED:
            raise ValueError(f"code {codes.max()}, expected at most {NUM_COMPANDED - 1}")
        return np.take(self._logprobs, codes)
