"""DistillKit's `compression_config.yaml`, which says how its captures are packed."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record

FloatName = Literal["float16", "bfloat16", "float32", "float64"]


class ResidualBin(Record):
    """A group of residuals of a target's fitted logprobs, quantised with one scale."""

    scale_dtype: FloatName
    """The dtype of the scale."""

    element_bits: int = Field(ge=1, le=32)
    """Bits of each residual."""

    num_elements: int = Field(ge=1)
    """Number of residuals in the group."""


class DistillKitConfig(Record):
    """The fields of DistillKit's own file, under their own names."""

    d: int = Field(ge=2, le=1 << 24)
    """Size of the vocabulary."""

    k: int = Field(ge=1, le=65535)
    """Number of ids stored of a target."""

    exact_k: int = Field(ge=0)
    """Number of logprobs that are stored exactly; the others are fitted."""

    exact_dtype: FloatName = "float32"
    """The dtype of the exact logprobs."""

    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    """Terms of the fit to the other logprobs: powers, a square root or an exponential."""

    term_dtype: FloatName = "float32"
    """The dtype of the fit's coefficients."""

    residual_bins: tuple[ResidualBin, ...]
    """Groups of the fit's residuals."""

    delta_encoding: bool = True
    """Whether values are stored as differences to the value before."""

    error_diffusion: bool = False
    """Whether values were rounded with error diffusion, which does not matter for reading."""

    normalize_t: bool = False
    """Whether the fit's variable runs from 0 to 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        rest = self.k - self.exact_k
        if rest < 0 or sum(of.num_elements for of in self.residual_bins) > rest:
            raise ValueError(f"k: found {self.k}, expected at least exact_k and all elements of residual_bins")
        if rest and not self.polynomial_terms and not self.residual_bins:
            raise ValueError("exact_k: found below k, expected polynomial_terms or residual_bins beside it")
        return self
