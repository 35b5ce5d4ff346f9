"""Settings of a student whose linear layers are quantised to few bits."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record

LowBitFormat = Literal["int8", "int4", "fp8", "mxfp4", "nvfp4"]
"""The number format of a quantised linear layer."""

GroupSize = Literal[32, 64, 128]
"""The group sizes that vLLM's int4 kernels support."""

_DEFAULT_GROUP_SIZE: GroupSize = 128
_WEIGHTS_ALONE = ("int4", "mxfp4", "nvfp4")
_EMBEDDED = ("int8", "int4")


class QuantizeSettings(Record):
    """The number format of the student's linear layers and, if requested, of its head and embedding. Norms and biases
    keep the precision of the training."""

    format: LowBitFormat
    """Number format. `int8`: 8-bit integers, one scale per output channel of the weights and per token of the
    activations. `fp8`: the same in E4M3. `int4`: 4-bit integers, weights only, one scale per group of `group_size`
    inputs. `mxfp4`: weights and activations in groups of 32 with one power of two. `nvfp4`: weights and activations in
    groups of 16 with one FP8 scale, and one scale per matrix; that of the activations is measured once
    (`num_sequences`)."""

    group_size: GroupSize | None = None
    """With `int4` only: neighbouring inputs that share a scale. It must divide the number of inputs of every quantised
    layer. Smaller groups are more exact and take more bits. Left out, 128."""

    activations: bool | None = None
    """Whether activations are quantised too. `int4` never does it, and `int8` and `fp8` always do; `mxfp4` and `nvfp4`
    do it unless this is false."""

    ignore: tuple[str, ...] = ()
    """Linear layers that are not quantised, each by the end of its name: `down_proj`, or `layers.0.mlp.down_proj`."""

    head: bool = False
    """Quantise the head in the same format as the linear layers. If head and embedding are one matrix, they are trained
    as one and saved as two."""

    embedding: bool = False
    """With `int8` and `int4` only: quantise the embedding's weights, with one scale per row (`int8`) or per group of
    `group_size` (`int4`). vLLM reads such a model on GPUs only."""

    num_sequences: int = Field(32, ge=1)
    """With `nvfp4` and quantised activations only: sequences of the student's text on which the largest activations are
    measured. If there are fewer sequences, all are used."""

    batch_sequences: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass of that measurement."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.group_size is not None and self.format != "int4":
            raise ValueError(
                f"group_size: found {self.group_size} with format {self.format}, expected it with int4; "
                "the other formats have one of their own, or none"
            )
        if self.activations is False and self.format not in _WEIGHTS_ALONE:
            raise ValueError(
                f"activations: found false with format {self.format}, expected {' or '.join(_WEIGHTS_ALONE)}"
            )
        if self.activations and self.format == "int4":
            raise ValueError("activations: found true with format int4, expected false: int4 is for weights alone")
        if self.embedding and self.format not in _EMBEDDED:
            raise ValueError(
                f"embedding: found true with format {self.format}, expected {' or '.join(_EMBEDDED)}; vLLM reads "
                "embeddings of integers alone"
            )
        return self

    @property
    def has_activations(self) -> bool:
        """`activations`, with its default."""
        return self.format != "int4" if self.activations is None else self.activations

    @property
    def int4_group_size(self) -> int:
        """`group_size`, with its default."""
        return self.group_size or _DEFAULT_GROUP_SIZE

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of a quantised layer, with the scales of groups; scales of whole rows are not counted."""
        scales = {"int4": 16 / self.int4_group_size, "mxfp4": 8 / 32, "nvfp4": 8 / 16}
        return 4 + scales[self.format] if self.format in scales else 8.0

    @property
    def needs_text(self) -> bool:
        """Whether the scales of the activations are measured on text before the training."""
        return self.format == "nvfp4" and self.has_activations

    def meant(self) -> dict[str, Any]:
        """Return `group_size` and `activations`, with their defaults."""
        size = {"group_size": self.int4_group_size} if self.format == "int4" else {}
        return {"activations": self.has_activations, **size}
