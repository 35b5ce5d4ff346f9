"""DistillKit's `compression_config.yaml`: how its captures are packed."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record

FloatName = Literal["float16", "bfloat16", "float32", "float64"]


class ResidualBin(Record):
    """Some of a target's approximated values, quantised under one scale."""

    scale_dtype: FloatName
    """The dtype of the scale."""

    element_bits: int = Field(ge=1, le=32)
    """Bits of each value."""

    num_elements: int = Field(ge=1)
    """Values."""


class DistillKitConfig(Record):
    """The fields of DistillKit's own file, under their own names."""

    d: int = Field(ge=2, le=1 << 24)
    """Size of the vocabulary."""

    k: int = Field(ge=1, le=65535)
    """Ids kept of a target."""

    exact_k: int = Field(ge=0)
    """How many of the logprobs are stored as they are."""

    exact_dtype: FloatName = "float32"
    """The dtype of those."""

    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    """What the others are fitted with."""

    term_dtype: FloatName = "float32"
    """The dtype of the coefficients."""

    residual_bins: tuple[ResidualBin, ...]
    """What the fit leaves over."""

    delta_encoding: bool = True
    """Values are differences to the one before."""

    error_diffusion: bool = False
    """How they were rounded; nothing follows from it for reading."""

    normalize_t: bool = False
    """The fit's variable runs from 0 to 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        rest = self.k - self.exact_k
        if rest < 0 or sum(of.num_elements for of in self.residual_bins) > rest:
            raise ValueError(f"k: found {self.k}, expected at least exact_k and all elements of residual_bins")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k: found below k, expected polynomial_terms or residual_bins beside it")
        return self
