"""Settings of a student that is the teacher, pruned."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record

Importance = Literal["activation", "taylor", "random"]
"""What decides which hidden channels, heads and neurons stay."""

LayerImportance = Literal["block_influence", "loss", "first_and_last", "random"]
"""What decides which layers stay."""


class PruneSettings(Record):
    """The shape to prune the teacher to, and how what stays is chosen. A size that is left out is the teacher's."""

    num_layers: int | None = Field(None, ge=1)
    """Depth."""

    hidden_size: int | None = Field(None, ge=1)
    """Width: the channels of the residual stream, the same ones in every layer."""

    num_heads: int | None = Field(None, ge=1)
    """Query heads of a layer. The width of a head stays the teacher's."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads of a layer. Each goes or stays with its group of query heads; where `num_heads` leaves fewer
    query heads to a group than the teacher has, every group that stays loses equally many."""

    intermediate_size: int | None = Field(None, ge=1)
    """Neurons of a feed-forward layer."""

    importance: Importance = "activation"
    """Score of channels, heads and neurons. `activation`: their size in forward passes over text (Minitron, arXiv
    2407.14679). `taylor`: what the loss of a sequence would change without them, to first order, as a mean of absolute
    values over sequences (Molchanov et al., arXiv 1611.06440). `random`: random scores from the
    student's seed, the baseline."""

    layers: LayerImportance | None = None
    """Score of layers. `block_influence`: how far a layer turns its input, one minus the cosine (ShortGPT, arXiv
    2403.03853). `loss`: how much the loss rises without it. `first_and_last`: as many at the beginning as at the end go
    (MiniMA, arXiv 2311.07052). `random`: at random, from the student's seed. Where it is left out, `random` with
    `importance: random`, else `block_influence`."""

    num_sequences: int = Field(256, ge=1)
    """Sequences of the student's text behind the scores (all of them, if there are fewer)."""

    batch_sequences: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass."""

    @property
    def layer_importance(self) -> LayerImportance:
        """`layers`, with its default."""
        if self.layers is not None:
            return self.layers
        return "random" if self.importance == "random" else "block_influence"

    def decisive(self) -> dict[str, Any]:
        """As for every record, with the score of layers spelt out."""
        return super().decisive() | {"layers": self.layer_importance}
