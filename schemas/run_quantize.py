"""Settings of a student whose linear layers compute with few bits."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record

LowBitFormat = Literal["int8", "int4", "fp8", "mxfp4", "nvfp4"]
"""How the numbers of a linear layer are kept."""

GroupSize = Literal[32, 64, 128]
"""Those that vLLM's kernels for int4 take."""

_DEFAULT_GROUP_SIZE: GroupSize = 128
_WEIGHTS_ALONE = ("int4", "mxfp4", "nvfp4")
_EMBEDDED = ("int8", "int4")


class QuantizeSettings(Record):
    """The format of the student's linear layers, and by choice of its head and embedding. Norms and biases keep the
    precision of the training."""

    format: LowBitFormat
    """`int8`: weights by output channel, activations by token. `fp8`: the same in E4M3. `int4`: weights alone, in
    groups of `group_size` inputs. `mxfp4`: weights and activations in groups of 32 that share a power of two. `nvfp4`:
    weights and activations in groups of 16 that share an FP8 scale, and one scale for the whole matrix; that of the
    activations is measured once, on `num_sequences`."""

    group_size: GroupSize | None = None
    """With `int4` only: neighbouring inputs that share a scale; 128 where it is left out. It must divide the inputs of
    every layer that is quantised."""

    activations: bool | None = None
    """Whether activations are quantised too. `int4` never does it, `int8` and `fp8` always do, `mxfp4` and `nvfp4` do
    unless this is false."""

    ignore: tuple[str, ...] = ()
    """Linear layers that stay as they are, each by the end of its name: `down_proj`, or `layers.0.mlp.down_proj`."""

    head: bool = False
    """Whether the head is quantised, in the same format as the other linear layers. Where it is one matrix with the
    embedding, they are trained as one, and saved as two."""

    embedding: bool = False
    """With `int8` and `int4` only, which vLLM reads on GPUs: whether the embedding is quantised, its weights alone, by
    row with `int8`, in groups of `group_size` with `int4`."""

    num_sequences: int = Field(32, ge=1)
    """With `nvfp4` and its activations only: sequences of the student's text on which their largest values are measured
    (all of them, if there are fewer)."""

    batch_sequences: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one of those forward passes."""

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
        """Of a quantised layer, with the scales of its groups; those of whole rows are too few to count."""
        scales = {"int4": 16 / self.int4_group_size, "mxfp4": 8 / 32, "nvfp4": 8 / 16}
        return 4 + scales[self.format] if self.format in scales else 8.0

    @property
    def needs_text(self) -> bool:
        """Whether the model must see text before its activations have scales."""
        return self.format == "nvfp4" and self.has_activations

    def meant(self) -> dict[str, Any]:
        """Group size and activations, with their defaults."""
        size = {"group_size": self.int4_group_size} if self.format == "int4" else {}
        return {"activations": self.has_activations, **size}
