"""Scores of the teacher's parts, from its passes over text.

activation, as Minitron's (Muralidharan et al., arXiv 2407.14679): the absolute value, as a mean over the tokens of a
sequence, and of these the Euclidean norm over sequences: of what each norm puts out, for a channel, summed over all
norms; of the product that enters the feed-forward's last matrix, for a neuron; of the vector that a head hands to the
attention's last matrix, by its Euclidean norm, for a head.

taylor, by masks of ones on the same places and, for a channel, on every write to the residual stream: the absolute
value of the derivative of a sequence's mean loss, as a mean over sequences (Molchanov et al., arXiv 1611.06440). Of the
derivative of a mean over sequences the absolute value would depend on how many of them make a batch.

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
    """What was seen of the teacher.

    Attributes:
        scores: of its parts; layers by their block influence.
        energy_NH: of each norm, in the order in which they are passed, the mean share that each channel has in the
            square of its input [2 M + 1, H]; each row's sum is one. float64.
        loss: mean over the labels, nats; None for `activation`, which takes no loss.
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
    """One pass over the batches, and with `taylor` a backward pass beside each.

    The model is left as it was; no gradient of a weight is computed.

    Raises:
        InputError: an activation or a loss is not a number.
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
    """By how much the mean loss over all labels rises without each layer, nats [M] float64."""
    whole = _mean_loss(model, batches(), vocab_size, meter)
    risen = []
    for layer in model.get_decoder().layers:
        with around(layer, lambda given_BLH, _: given_BLH):
            risen.append(_mean_loss(model, batches(), vocab_size, meter) - whole)
    return torch.tensor(risen, dtype=torch.float64)


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The output of the decoder's last norm [B, L, H]; under the rule `document` no document sees another."""
    positions = {} if batch.positions_BL is None else {"position_ids": batch.positions_BL}
    hidden_BLH: Tensor = model.get_decoder()(
        input_ids=batch.input_ids_BL, use_cache=False, **positions
    ).last_hidden_state
    return hidden_BLH


def norms_of(model: PreTrainedModel) -> list[nn.Module]:
    """Every norm of the residual stream, in the order in which they are passed."""
    decoder = model.get_decoder()
    pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in decoder.layers)
    return [norm for pair in pairs for norm in pair] + [decoder.norm]


class _Tally:
    """Sums over sequences, float64 on the model's device."""

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
            # the sum has each sequence's own derivative in its own row of the masks
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
        """What every calibration wants to know: how far layers turn their input, and the energy of channels."""
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
                fix="its weights are broken, or its dtype is too narrow for its activations",
            )


def losses(model: PreTrainedModel, batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each sequence, summed over its labels, nats [B], and how many labels it has [B]."""
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
