"""What a manifest says of a codec beside its name and the length of its sequences."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record

# Manifests may come from strangers: these bound what their numbers can ask for. A count of samples has 16 bits.
MAX_VOCAB_SIZE = 1 << 24
MAX_IDS = (1 << 16) - 1

_Temperature = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]

EXPECTED = (
    f"numbers vocab_size, at most {MAX_VOCAB_SIZE}, and num_ids, at most {MAX_IDS}; if ids are ranked, ranking, "
    "ids-by-frequency.u32, and ranking_sha256; for topk at more than one temperature, temperature and "
    "extra_temperatures; and for topk whose labels' logprobs are not all known, unknown_labels, true"
)


class CodecSettings(Record):
    """The settings of one codec, as `codec_settings` of a shard set has them; what is left out is not written."""

    vocab_size: int = Field(strict=True, ge=1, le=MAX_VOCAB_SIZE)
    """Ids are below it."""

    num_ids: int = Field(strict=True, ge=0, le=MAX_IDS)
    """Samples (`sampled`) or kept ids (`topk`, projected `chunks`) a target; 0 where there are none."""

    temperature: _Temperature | None = None
    """The temperature at which the teacher was recorded; only beside further ones."""

    extra_temperatures: Annotated[tuple[_Temperature, ...], Field(min_length=1)] | None = None
    """Further temperatures at which `topk` has a tail."""

    unknown_labels: bool | None = Field(None, strict=True)
    """A label's logprob may be unknown, where its id is not kept; for `topk`."""

    ranking: Literal["ids-by-frequency.u32"] | None = None
    """The file of ranks; ids are stored as they are where it is left out."""

    ranking_sha256: str | None = Field(None, strict=True)
    """Its digest."""

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
        """Whether there are settings that other codecs do not have."""
        return self.temperature is not None or self.unknown_labels is not None
