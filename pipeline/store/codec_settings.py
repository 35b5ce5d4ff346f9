"""The settings of a codec in a manifest, other than its name and the length of its sequences."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record

# A manifest may come from anyone, so these limits bound the memory that it can ask for. Counts of samples have 16 bits.
MAX_VOCAB_SIZE = 1 << 24
MAX_IDS = (1 << 16) - 1

_Temperature = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

EXPECTED = (
    f"numbers vocab_size, at most {MAX_VOCAB_SIZE}, and num_ids, at most {MAX_IDS}; if ids are ranked, ranking, "
    "ids-by-frequency.u32, and ranking_sha256; for topk at more than one temperature, temperature and "
    "extra_temperatures; and for topk whose labels' logprobs are not all known, unknown_labels, true"
)


class CodecSettings(Record):
    """The settings of one codec, as in `codec_settings` of a shard set; settings that are None are not written."""

    vocab_size: int = Field(strict=True, ge=1, le=MAX_VOCAB_SIZE)
    """All ids are below this number."""

    num_ids: int = Field(strict=True, ge=0, le=MAX_IDS)
    """Samples (`sampled`) or kept ids (`topk`, projected `chunks`) a target; 0 if targets have no ids."""

    temperature: _Temperature | None = None
    """The capture temperature; written only if there are extra temperatures."""

    extra_temperatures: Annotated[tuple[_Temperature, ...], Field(min_length=1)] | None = None
    """Further temperatures for which `topk` stores a tail."""

    unknown_labels: bool | None = Field(None, strict=True)
    """Whether a label's logprob may be unknown if its id is not kept; for `topk` only."""

    ranking: Literal["ids-by-frequency.u32"] | None = None
    """The file of the ranking. If it is left out, ids are stored as they are."""

    ranking_sha256: str | None = Field(None, strict=True)
    """The SHA-256 digest of the ranking's file, hexadecimal."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.temperature is None) != (self.extra_temperatures is None):
            raise ValueError("temperature and extra_temperatures: found one, expected both or neither")
        if (self.ranking is None) != (self.ranking_sha256 is None):
            raise ValueError("ranking and ranking_sha256: found one, expected both or neither")

        if self.unknown_labels is False:
            raise ValueError("unknown_labels: found false, expected it to be left out")
        return self

    @property
    def only_for_topk(self) -> bool:
        """Return whether a setting is present that only `topk` codecs have."""
        return self.temperature is not None or self.unknown_labels is not None
