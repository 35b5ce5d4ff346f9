"""Quantisation of logprobs to small integers, with the error of each method.

    LogUniform    code = round(64 a)                               any a; error at most 1/128 nat
    Companded     code = round(96 (1 - exp(-b / 2)) + 5 (a - b))   a up to 24; error at most 1/10 nat, less for high p

with a = -logprob, p = exp(-a), and b the smaller of a and 2 log 9.6. A companded step is 1/48 nat at p = 1 and grows
with 1 / sqrt(p) up to 1/5 nat, so that codes are spread evenly over sqrt(p). There are 184 codes.
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
    """Converts between logprobs and integer codes.

    Attributes:
        error_nats: Largest distance of a decoded logprob from max(logprob, floor_nats), in nats.
        floor_nats: The lowest logprob that has a code, in nats; lower logprobs are raised to it.
    """

    error_nats: float
    floor_nats: float

    def encode(self, logprobs: FloatArray) -> npt.NDArray[Any]:
        """Return the codes of logprobs; a lower logprob never gets a smaller code."""

    def decode(self, codes: npt.NDArray[Any]) -> FloatArray:
        """Return the logprobs of codes, float32, nats."""


class LogUniform:
    """Quantises in steps of 1/64 nat; a code has two bytes."""

    error_nats = 0.5 / _STEPS_A_NAT
    floor_nats = -_LARGEST / _STEPS_A_NAT

    def encode(self, logprobs: FloatArray) -> npt.NDArray[np.uint16]:
        """Return the codes of logprobs, uint16; a logprob that rounding has raised above 0 gets the code of 0."""
        places: npt.NDArray[Any] = logprobs * np.float32(-_STEPS_A_NAT)
        np.rint(places, out=places)
        return np.clip(places, 0, _LARGEST, out=places).astype(np.uint16)

    def decode(self, codes: npt.NDArray[Any]) -> FloatArray:
        """Return the logprobs as float32, which are exact multiples of 1/64 nat."""
        return codes.astype(np.float32) * np.float32(-1 / _STEPS_A_NAT)


class Companded:
    """Quantises with 184 codes in steps that grow from 1/48 to 1/5 nat; a code has one byte."""

    error_nats = 0.5 / _BENT_STEPS_A_NAT
    floor_nats = -float(_BEND_NATS + (NUM_COMPANDED - 1 - _BEND_CODE) / _BENT_STEPS_A_NAT)

    def __init__(self) -> None:
        codes = np.arange(256).clip(max=NUM_COMPANDED - 1)
        curved = -2 * np.log1p(-np.minimum(codes, _BEND_CODE) / 96)
        self._logprobs = -(curved + np.maximum(codes - _BEND_CODE, 0) / _BENT_STEPS_A_NAT).astype(np.float32)

    def encode(self, logprobs: FloatArray) -> npt.NDArray[np.uint8]:
        """Return the codes of logprobs, uint8.

        The steps work in place because touching new memory takes longer than the arithmetic.
        """
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
        """Look up the logprob of each code, float32, nats.

        Raises:
            ValueError: A code is 184 or larger.
        """
        if codes.size and codes.max() >= NUM_COMPANDED:
            raise ValueError(f"code {codes.max()}, expected at most {NUM_COMPANDED - 1}")
        return np.take(self._logprobs, codes)
