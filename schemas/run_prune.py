"""Settings of a student that is made by pruning the teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record

Importance = Literal["activation", "taylor", "random"]
"""The score that decides which hidden channels, heads and neurons are kept."""

LayerImportance = Literal["block_influence", "loss", "first_and_last", "random"]
"""The score that decides which layers are kept."""


class PruneSettings(Record):
    """The shape to which the teacher is pruned, and how the parts that are kept are chosen. A size that is left out is
    the teacher's."""

    num_layers: int | None = Field(None, ge=1)
    """Number of layers to keep."""

    hidden_size: int | None = Field(None, ge=1)
    """Hidden channels (of the residual stream) to keep, the same ones in every layer."""

    num_heads: int | None = Field(None, ge=1)
    """Query heads to keep in each layer. The size of a head stays the teacher's."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads to keep in each layer. Each is kept or removed with its group of query heads. If `num_heads`
    leaves fewer query heads per group than the teacher has, every kept group loses the same number."""

    intermediate_size: int | None = Field(None, ge=1)
    """Neurons of a feed-forward layer to keep."""

    importance: Importance = "activation"
    """Score of channels, heads and neurons. `activation`: size of their activations in forward passes over text
    (Minitron, arXiv 2407.14679). `taylor`: first-order estimate of how much a sequence's loss changes without them, as
    the mean absolute value over sequences (Molchanov et al., arXiv 1611.06440). `random`: random scores from the
    student's seed, as a baseline."""

    layers: LayerImportance | None = None
    """Score of layers. `block_influence`: one minus the cosine between a layer's input and output (ShortGPT, arXiv
    2403.03853). `loss`: rise of the loss without the layer. `first_and_last`: removes as many layers at the beginning
    as at the end (MiniMA, arXiv 2311.07052). `random`: random scores from the student's seed. Left out, `random` with
    `importance: random`, else `block_influence`."""

    num_sequences: int = Field(256, ge=1)
    """Sequences of the student's text on which scores are computed. If there are fewer sequences, all are used."""

    batch_sequences: int = Field(4, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass. Lower it if the device runs out of memory."""

    @property
    def layer_importance(self) -> LayerImportance:
        """`layers`, with its default."""
        if self.layers is not None:
            return self.layers
        return "random" if self.importance == "random" else "block_influence"

    def meant(self) -> dict[str, Any]:
        """Return the score of layers, with its default."""
        return {"layers": self.layer_importance}
