"""Chooses the parts of the teacher that pruning keeps: the most important ones, in their original order.

Legend: M layers of the teacher, H hidden channels, G groups (key and value heads), Q query heads of a group, F neurons
of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capgap.pipeline.student.shapes import Shape
from capgap.schemas.run_prune import LayerImportance


@dataclass(frozen=True)
class Scores:
    """The importance of each part of the teacher, where a higher score means more important. On the CPU, float64.

    Attributes:
        layers_M: The scores of layers.
        hidden_H: The scores of hidden channels, over all layers together.
        heads_MGQ: The scores of query heads.
        neurons_MF: The scores of neurons.
    """

    layers_M: Tensor
    hidden_H: Tensor
    heads_MGQ: Tensor
    neurons_MF: Tensor


@dataclass(frozen=True)
class KeptParts:
    """Ascending int64 indices of the kept parts in the teacher.

    Attributes:
        layers: The kept layers.
        hidden: The kept hidden channels, the same in all layers.
        groups: For each kept layer, its kept key and value heads.
        heads: For each kept layer, its kept query heads, numbered over all groups.
        neurons: For each kept layer, its kept neurons.
    """

    layers: Tensor
    hidden: Tensor
    groups: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def choose(scores: Scores, target: Shape, layers: LayerImportance) -> KeptParts:
    """Choose the parts with the highest scores, as many as the target has; of equal scores the first one is kept.

    The score of a group is the sum of its query heads' scores. Each kept group keeps the same number of query heads.

    Args:
        scores: The scores of all parts.
        target: The shape of the pruned model.
        layers: How layers are chosen; `first_and_last` keeps the first and last layers whatever their scores.
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
    """Return uniform random scores in [0, 1), which depend only on the shape and the seed."""
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
    """Return the middle layers; if an odd number is removed, one more is removed at the end than at the start."""
    first = (num_layers - number) // 2
    return torch.arange(first, first + number)
