"""What of the teacher stays: its most important parts, in the order in which they stood.

Legend: M layers of the teacher, H its hidden channels, G its key and value groups, Q query heads of a group,
F its neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capgap.pipeline.student.shapes import Shape
from capgap.schemas.run_prune import LayerImportance


@dataclass(frozen=True)
class Scores:
    """How important each part of the teacher is: the higher, the more. All on the CPU, float64.

    Attributes:
        layers_M: of layers.
        hidden_H: of hidden channels, over all layers.
        heads_MGQ: of query heads.
        neurons_MF: of neurons.
    """

    layers_M: Tensor
    hidden_H: Tensor
    heads_MGQ: Tensor
    neurons_MF: Tensor


@dataclass(frozen=True)
class KeptParts:
    """Indices into the teacher, int64, rising.

    Attributes:
        layers: layers that stay.
        hidden: channels that stay, the same in all layers.
        groups: of each layer that stays, its key and value heads that stay.
        heads: of each layer that stays, its query heads that stay, counted over all groups.
        neurons: of each layer that stays, its neurons that stay.
    """

    layers: Tensor
    hidden: Tensor
    groups: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def choose(scores: Scores, target: Shape, layers: LayerImportance) -> KeptParts:
    """The parts of the highest scores, as many as the target has; of equal ones the first.

    A group is as important as its query heads together. Of each group that stays, the same number of query heads stays.
    """
    if layers == "first_and_last":
        layers_kept = _between(len(scores.layers_M), target.num_layers)
    else:
        layers_kept = _best(scores.layers_M, target.num_layers)
    groups, heads = [], []
    for layer in layers_kept.tolist():
        heads_GQ = scores.heads_MGQ[layer]
        kept_groups = _best(heads_GQ.sum(dim=1), target.num_key_value_heads)
        size = heads_GQ.shape[1]
        kept_heads = [group * size + _best(heads_GQ[group], target.heads_per_group) for group in kept_groups.tolist()]
        groups.append(kept_groups)
        heads.append(torch.cat(kept_heads))
    return KeptParts(
        layers=layers_kept,
        hidden=_best(scores.hidden_H, target.hidden_size),
        groups=tuple(groups),
        heads=tuple(heads),
        neurons=tuple(_best(scores.neurons_MF[layer], target.intermediate_size) for layer in layers_kept.tolist()),
    )


def random_scores(teacher: Shape, seed: int) -> Scores:
    """Uniform ones, a pure function of shape and seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    return Scores(
        layers_M=uniform(teacher.num_layers),
        hidden_H=uniform(teacher.hidden_size),
        heads_MGQ=uniform(teacher.num_layers, teacher.num_key_value_heads, teacher.heads_per_group),
        neurons_MF=uniform(teacher.num_layers, teacher.intermediate_size),
    )


def _best(scores_N: Tensor, number: int) -> Tensor:
    return scores_N.argsort(descending=True, stable=True)[:number].sort().values


def _between(num_layers: int, number: int) -> Tensor:
    """Layers without the first and the last ones; of an odd number that go, one more at the end."""
    first = (num_layers - number) // 2
    return torch.arange(first, first + number)
