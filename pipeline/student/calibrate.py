"""Scores the importance of the teacher's parts from its forward and backward passes over text.

`activation` follows Minitron (Muralidharan et al., arXiv 2407.14679). A magnitude is averaged over the tokens of each
sequence, and the score is the Euclidean norm of these means over sequences. For a hidden channel, the magnitude is the
absolute output of a norm layer, and the scores of all norm layers are added up. For a neuron it is the absolute input
of the feed-forward block's last matrix. For a head it is the Euclidean norm of its part of the input of the attention
block's last matrix.

`taylor` multiplies the same neurons and heads by masks of ones; for a hidden channel, it masks every write to the
residual stream. The score is the absolute derivative of a sequence's mean loss by the mask, averaged over sequences
(Molchanov et al., arXiv 1611.06440). Derivatives are taken for each sequence, because the absolute derivative of a
batch's mean loss would depend on the size of the batch.

Legend: B sequences, L tokens a sequence, M layers, H hidden channels, G groups, Q query heads of a group, D width of a
head, F neurons, C any of these channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from capgap.pipeline.stage.progress import Meter
from capgap.pipeline.store import Batch
from capgap.pipeline.student.hooks import after, around, before, frozen, masked
from capgap.pipeline.student.kept import Scores
from capgap.pipeline.student.shapes import Shape
from capgap.schemas.errors import InputError


@dataclass(frozen=True)
class CalibrationStatistics:
    """The measurements of the teacher that pruning uses.

    Attributes:
        scores: The scores of the teacher's parts. A layer's score is its block influence: 1 minus the mean cosine
            similarity of its input and output.
        energy_NH: For each norm layer in the order of the forward pass, each channel's mean share of the sum of squares
            of its input [2 M + 1, H], float64. Each row sums to one.
        loss: The mean loss over the labels, in nats/token; None for `activation`, which computes no loss.
    """

    scores: Scores
    energy_NH: Tensor
    loss: float | None


def calibrate(
    model: PreTrainedModel,
    shape: Shape,
    batches: Iterable[Batch],
    vocab_size: int,
    taylor: bool,
    meter: Meter | None = None,
) -> CalibrationStatistics:
    """Measure the teacher in one forward pass over the batches, with a backward pass for each if `taylor` is set.

    The model is left unchanged, and no gradients of weights are computed.

    Args:
        model: The teacher, on the device where it runs.
        shape: The teacher's shape.
        batches: Batches of calibration text without targets.
        vocab_size: Size of the real vocabulary.
        taylor: Whether to compute `taylor` scores instead of `activation` scores.
        meter: The progress bar to advance, or None.

    Raises:
        InputError: A score is not finite.
    """
    tally = _Tally(model, shape, vocab_size)
    with frozen(model):
        for batch in batches:
            batch = batch.to(model.device)
            if taylor:
                tally.add_taylor(batch)
            else:
                tally.add_activations(batch)
            if meter is not None:
                meter.advance(len(batch.labels_BL), batch.labels_BL.numel())
    return tally.result(taylor)


@torch.no_grad()
def loss_without_each_layer(
    model: PreTrainedModel, batches: Callable[[], Iterable[Batch]], vocab_size: int, meter: Meter | None = None
) -> Tensor:
    """Return by how much the mean loss over all labels rises when each layer is left out [M], float64, nats/token."""
    whole = _mean_loss(model, batches(), vocab_size, meter)
    risen = []
    for layer in model.get_decoder().layers:
        with around(layer, lambda given_BLH, _: given_BLH):
            risen.append(_mean_loss(model, batches(), vocab_size, meter) - whole)
    return torch.tensor(risen, dtype=torch.float64)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the output of the decoder's last norm [B, L, H]; attention ends where positions of the batch restart."""
    positions = {} if batch.positions_BL is None else {"position_ids": batch.positions_BL}
    hidden_BLH: Tensor = model.get_decoder()(
        input_ids=batch.input_ids_BL, use_cache=False, **positions
    ).last_hidden_state
    return hidden_BLH


def norms_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return every norm layer of the residual stream in the order of the forward pass."""
    decoder = model.get_decoder()
    pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in decoder.layers)
    return [norm for pair in pairs for norm in pair] + [decoder.norm]


class _Tally:
    """Adds up the scores over sequences, in float64 on the model's device."""

    def __init__(self, model: PreTrainedModel, shape: Shape, vocab_size: int) -> None:
        self._model, self._shape, self._vocab_size = model, shape, vocab_size
        self._layers, self._norms = list(model.get_decoder().layers), norms_of(model)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=model.device)

        num_layers, num_norms = shape.num_layers, len(self._norms)
        self._turned_M = zeros(num_layers)
        self._energy_NH = zeros(num_norms, shape.hidden_size)
        self._hidden_NH = zeros(num_norms, shape.hidden_size)
        self._heads_MC, self._neurons_MF = (
            zeros(num_layers, shape.num_heads),
            zeros(num_layers, shape.intermediate_size),
        )
        self._num_sequences, self._num_tokens, self._num_labels, self._nats = 0, 0, 0, 0.0

    @torch.no_grad()
    def add_activations(self, batch: Batch) -> None:
        with ExitStack() as hooks:
            self._watch(hooks)
            for number, norm in enumerate(self._norms):
                hooks.enter_context(after(norm, self._norm_put_out(number)))
            for number, layer in enumerate(self._layers):
                hooks.enter_context(before(layer.self_attn.o_proj, self._heads_put_out(number)))
                hooks.enter_context(before(layer.mlp.down_proj, self._neurons_put_out(number)))
            hidden_states(self._model, batch)
        self._count(batch)

    def add_taylor(self, batch: Batch) -> None:
        size, shape, device = len(batch.labels_BL), self._shape, self._model.device

        def ones(width: int) -> Tensor:
            return torch.ones((size, width), device=device, dtype=torch.float32, requires_grad=True)

        hidden_BH = ones(shape.hidden_size)
        heads = [ones(shape.num_heads) for _ in self._layers]
        neurons = [ones(shape.intermediate_size) for _ in self._layers]
        with torch.enable_grad(), ExitStack() as hooks:
            self._watch(hooks)
            hooks.enter_context(after(self._model.get_input_embeddings(), masked(hidden_BH), replace=True))
            for layer, heads_BC, neurons_BF in zip(self._layers, heads, neurons, strict=True):
                attention, feed_forward = layer.self_attn.o_proj, layer.mlp.down_proj
                hooks.enter_context(before(attention, masked(heads_BC, shape.head_dim), replace=True))
                hooks.enter_context(before(feed_forward, masked(neurons_BF), replace=True))
                for write in (attention, feed_forward):
                    hooks.enter_context(after(write, masked(hidden_BH), replace=True))
            nats_B, labels_B = losses(self._model, batch, self._vocab_size)
            # Each sequence has its own row of each mask, so the sum's derivative there is that of its own loss.
            loss = (nats_B / labels_B.clamp(min=1)).sum()
            slopes = torch.autograd.grad(loss, [hidden_BH, *heads, *neurons])
        self._hidden_NH[0] += _over_sequences(slopes[0])
        for number in range(shape.num_layers):
            self._heads_MC[number] += _over_sequences(slopes[1 + number])
            self._neurons_MF[number] += _over_sequences(slopes[1 + shape.num_layers + number])
        self._nats += float(nats_B.detach().sum(dtype=torch.float64))
        self._num_labels += int(labels_B.sum())
        self._count(batch)

    def result(self, taylor: bool) -> CalibrationStatistics:
        if not taylor:
            self._hidden_NH, self._heads_MC = self._hidden_NH.sqrt(), self._heads_MC.sqrt()
            self._neurons_MF = self._neurons_MF.sqrt()
        else:
            for sums in (self._hidden_NH, self._heads_MC, self._neurons_MF):
                sums /= self._num_sequences
        groups = (self._shape.num_layers, self._shape.num_key_value_heads, self._shape.heads_per_group)
        scores = Scores(
            layers_M=(1 - self._turned_M / self._num_tokens).cpu(),
            hidden_H=self._hidden_NH.sum(dim=0).cpu(),
            heads_MGQ=self._heads_MC.reshape(groups).cpu(),
            neurons_MF=self._neurons_MF.cpu(),
        )
        self._require_finite(scores)
        loss = self._nats / max(self._num_labels, 1) if taylor else None
        return CalibrationStatistics(scores, (self._energy_NH / self._num_tokens).cpu(), loss)

    def _watch(self, hooks: ExitStack) -> None:
        """Record what both kinds of scores need: the cosine similarity across layers, and the energy of channels."""
        for number, layer in enumerate(self._layers):
            hooks.enter_context(around(layer, self._layer_turned(number)))
        for number, norm in enumerate(self._norms):
            hooks.enter_context(before(norm, self._norm_took_in(number)))

    def _count(self, batch: Batch) -> None:
        self._num_sequences += len(batch.labels_BL)
        self._num_tokens += batch.labels_BL.numel()

    def _layer_turned(self, number: int) -> Callable[[Tensor, Tensor], None]:
        def see(into_BLH: Tensor, out_BLH: Tensor) -> None:
            cosine_BL = cosine_similarity(into_BLH.detach().float(), out_BLH.detach().float(), dim=-1)
            self._turned_M[number] += cosine_BL.sum(dtype=torch.float64)

        return see

    def _norm_took_in(self, number: int) -> Callable[[Tensor], None]:
        def see(into_BLH: Tensor) -> None:
            squares_BLH = into_BLH.detach().float().square()
            shares_BLH = squares_BLH / squares_BLH.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            self._energy_NH[number] += shares_BLH.sum(dim=(0, 1), dtype=torch.float64)

        return see

    def _norm_put_out(self, number: int) -> Callable[[Tensor], None]:
        def see(out_BLH: Tensor) -> None:
            self._hidden_NH[number] += _squares_of_means(out_BLH.float().abs())

        return see

    def _heads_put_out(self, number: int) -> Callable[[Tensor], None]:
        def see(out_BLC: Tensor) -> None:
            norms_BLC = out_BLC.float().reshape(*out_BLC.shape[:2], -1, self._shape.head_dim).norm(dim=-1)
            self._heads_MC[number] += _squares_of_means(norms_BLC)

        return see

    def _neurons_put_out(self, number: int) -> Callable[[Tensor], None]:
        def see(out_BLF: Tensor) -> None:
            self._neurons_MF[number] += _squares_of_means(out_BLF.float().abs())

        return see

    def _require_finite(self, scores: Scores) -> None:
        if not all(bool(one.isfinite().all()) for one in vars(scores).values()):
            raise InputError(
                "the teacher's scores are not numbers",
                where=self._model.name_or_path or self._model.config.model_type,
                expected="activations and losses that are finite",
                fix="check its weights, and whether its dtype is too narrow for its activations",
            )


def losses(model: PreTrainedModel, batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropies of each sequence's labels [B], in nats, and its number of labels [B]."""
    hidden_BLH, head = hidden_states(model, batch), model.get_output_embeddings()
    nats = []
    for hidden_LH, labels_L in zip(hidden_BLH, batch.labels_BL, strict=True):
        counted_L = labels_L >= 0
        nats.append(
            cross_entropy(head(hidden_LH[counted_L])[:, :vocab_size].float(), labels_L[counted_L], reduction="sum")
        )
    return torch.stack(nats), (batch.labels_BL >= 0).sum(dim=1)


def _mean_loss(model: PreTrainedModel, batches: Iterable[Batch], vocab_size: int, meter: Meter | None) -> float:
    nats, num_labels = 0.0, 0
    for batch in batches:
        nats_B, labels_B = losses(model, batch.to(model.device), vocab_size)
        nats += float(nats_B.sum(dtype=torch.float64))
        num_labels += int(labels_B.sum())
        if meter is not None:
            meter.advance(len(labels_B), batch.labels_BL.numel())
    return nats / max(num_labels, 1)


def _squares_of_means(values_BLC: Tensor) -> Tensor:
    return values_BLC.mean(dim=1, dtype=torch.float64).square().sum(dim=0)


def _over_sequences(slopes_BC: Tensor) -> Tensor:
    return slopes_BC.double().abs().sum(dim=0)
