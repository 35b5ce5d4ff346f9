"""Finds out how a causal language model computes its logits, so that the fused loss can replace its head.

A model may change its head's output before it returns logits: scale it (Cohere, Granite), cap it (Gemma), or do
something unknown. So a short sequence runs through the model with known numbers in place of the head's output, and the
logits are compared with those of the fused loss. A model whose logits differ is refused. Its name is never looked at.

Legend: B sequences, L tokens a sequence, H hidden, V columns of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.models.configs import max_positions
from capgap.pipeline.models.head_product import operands
from capgap.pipeline.train.modes import in_evaluation
from capgap.schemas.errors import InputError

_NUM_TOKENS = 8  # enough positions to notice a model that looks ahead, and few enough for a cheap trial
# For any useful cap c, c tanh(z / c) in float32 equals z at the small value and c at the large one. They are powers of
# two, so that dividing by them gives the model's factor exactly.
_SMALL, _LARGE = 2.0**-17, 2.0**20


@dataclass(frozen=True)
class LmHead:
    """The head of a model with logits `cap(scale * linear(hidden))`, where hidden are the decoder's last hidden states.

    Attributes:
        decoder: The part of the model that computes the hidden states.
        linear: The layer with weight [V, H] and an optional bias [V]; it may round its operands to few bits.
        scale: The factor by which the logits are multiplied.
        softcap: The value c of a soft cap, by which logits z become c tanh(z / c); None without a cap.
    """

    decoder: nn.Module
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def inputs(self, hidden_BLH: Tensor) -> dict[str, Any]:
        """Return the arguments of `linear_sparse_kl` that reproduce the model's logits from its hidden states."""
        bias_V: Tensor | None = self.linear.bias
        if not torch.is_autocast_enabled(hidden_BLH.device.type):
            hidden_BLH = hidden_BLH.to(self.linear.weight.dtype)  # some models keep hidden states in a wider dtype
        hidden_BLH, weight_VH = operands(self.linear, hidden_BLH)
        if self.scale != 1:
            hidden_BLH, bias_V = hidden_BLH * self.scale, None if bias_V is None else bias_V * self.scale
        return {
            "hidden_NH": hidden_BLH.flatten(0, 1),
            "weight_VH": weight_VH,
            "bias_V": bias_V,
            "softcap": self.softcap,
        }


def served_head(model: PreTrainedModel, vocab_size: int) -> LmHead:
    """Return the head of a model after checking, by a few forward passes of 16 tokens, that the loss can replace it.

    The model is left unchanged, and torch's global random state is not used.

    Args:
        model: The model, in any dtype, on a device where it can run.
        vocab_size: Size of the real vocabulary; columns of the head at or past it are padding.

    Raises:
        InputError: The head is not a plain linear layer, the logits are not computed as `LmHead` describes, a token
            changes the hidden states before it, or the model does not run on token ids alone.
    """
    linear = _plain_linear(model)
    with torch.no_grad(), _as_in_evaluation(model):
        return _tried(model, linear, vocab_size)


def _plain_linear(model: PreTrainedModel) -> nn.Linear:
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(model, "an encoder beside the decoder", "a decoder alone: a causal language model")
    linear = model.get_output_embeddings()
    if linear is None:
        raise _refusal(model, "no output embeddings", "a head")
    # A subclass, such as an adapter or a quantised layer, may compute something else. capgap's own have `operands`.
    is_known = hasattr(linear, "operands") or type(linear).forward is nn.Linear.forward
    if not isinstance(linear, nn.Linear) or not is_known:
        raise _refusal(model, f"a head of type {type(linear).__name__}", "a plain linear layer")
    if not linear.weight.is_floating_point() or linear.weight.element_size() < 2:
        raise _refusal(model, f"a head in {linear.weight.dtype}", "weights that can be trained, of 16 bits or more")
    return linear


def _tried(model: PreTrainedModel, linear: nn.Linear, vocab_size: int) -> LmHead:
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(_NUM_TOKENS, max_positions(model.config) or _NUM_TOKENS)
    ids_BL = torch.randint(vocab_size, (2, num_tokens), generator=generator)
    ids_BL[1, :-1] = ids_BL[0, :-1]
    ids_BL[1, -1] = (ids_BL[0, -1] + 1) % vocab_size
    ids_BL = ids_BL.to(linear.weight.device)
    try:
        true_BLV = model(input_ids=ids_BL, use_cache=False).logits
        if not true_BLV.isfinite().all():
            raise _refusal(model, "logits that are not finite", "weights that are numbers")
        read_BLH, scale, softcap = _logits_of_probe(model, linear, ids_BL, generator)
        decoder = _decoder_that_gives(model, read_BLH, ids_BL)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _refusal(model, str(error).strip().partition("\n")[0], "a model that runs on token ids alone") from error
    _require_causal(model, read_BLH)
    head = LmHead(decoder, linear, scale, softcap)
    _require_equal_loss(model, head, read_BLH, true_BLV, vocab_size, generator)
    return head


def _logits_of_probe(
    model: PreTrainedModel, linear: nn.Linear, ids_BL: Tensor, generator: torch.Generator
) -> tuple[Tensor, float, float | None]:
    """Return the input of the head [B, L, H], and the scale and the soft cap that the model applies to its output."""
    seen: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output_BLV: Tensor) -> Tensor:
        probe_BLV = (torch.rand(output_BLV.shape, generator=generator) * 400 - 200).to(output_BLV.device)
        probe_BLV[0, 0], probe_BLV[0, 1] = _SMALL, _LARGE
        seen.extend((inputs[0], probe_BLV))
        return probe_BLV

    handle = linear.register_forward_hook(replace)
    try:
        found_BLV = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        handle.remove()
    if len(seen) != 2 or seen[0].shape[:2] != ids_BL.shape or found_BLV.shape != seen[1].shape:
        raise _refusal(model, "a head that is not applied once to each token", "one product a token")
    read_BLH, probe_BLV = seen
    rounding = 32 * torch.finfo(found_BLV.dtype).eps
    found_BLV = found_BLV.float()
    scale, most = float(found_BLV[0, 0, 0]) / _SMALL, float(found_BLV[0, 1, 0])
    softcap = most if 0 < most < 0.5 * scale * _LARGE else None
    expected_BLV = scale * probe_BLV
    if softcap is not None:
        expected_BLV = softcap * torch.tanh(expected_BLV / softcap)
    if not torch.allclose(found_BLV, expected_BLV, rtol=rounding, atol=rounding * _SMALL):
        raise _refusal(model, "logits that are changed in another way", "a factor or a soft cap on them at most")
    return read_BLH, scale, softcap


def _decoder_that_gives(model: PreTrainedModel, read_BLH: Tensor, ids_BL: Tensor) -> nn.Module:
    """Return the smallest part of the model whose last hidden states are the input of its head."""
    parts: tuple[nn.Module, ...] = (model.get_decoder(), model.base_model)
    for decoder in parts:
        if decoder is model:
            continue
        output = decoder(input_ids=ids_BL, use_cache=False)
        hidden_BLH = getattr(output, "last_hidden_state", None)
        if hidden_BLH is not None and _close(hidden_BLH.to(read_BLH.dtype), read_BLH):
            return decoder
    raise _refusal(model, "a head that reads something else", "one that reads the decoder's last hidden states")


def _require_causal(model: PreTrainedModel, read_BLH: Tensor) -> None:
    """Refuse a model whose hidden states differ before the last token, the only one in which both sequences differ."""
    if not _close(read_BLH[0, :-1], read_BLH[1, :-1]):
        raise _refusal(model, "a token that changes the hidden states before it", "a causal model")


def _require_equal_loss(
    model: PreTrainedModel,
    head: LmHead,
    hidden_BLH: Tensor,
    true_BLV: Tensor,
    vocab_size: int,
    generator: torch.Generator,
) -> None:
    labels_N = torch.randint(vocab_size, (hidden_BLH.shape[:2].numel(),), generator=generator).to(hidden_BLH.device)
    nothing_N1 = torch.zeros((len(labels_N), 1), device=labels_N.device)
    targets = SparseTargets(nothing_N1.long(), nothing_N1, None)
    arguments = head.inputs(hidden_BLH)
    found = linear_sparse_kl(
        **arguments, targets=targets, labels_N=labels_N, alpha=0.0, vocab_size=vocab_size, want_kl=False
    ).loss
    # In float32, torch's own sum over 262,144 ids has a larger error than the fused loss.
    expected = cross_entropy(true_BLV.flatten(0, 1)[:, :vocab_size].double(), labels_N)
    # Both losses round logits to the weight's dtype, but in a different order of operations.
    rounding = 8 * torch.finfo(head.linear.weight.dtype).eps * max(1.0, float(true_BLV.float().abs().amax()))
    if not abs(float(found) - float(expected)) <= rounding:
        raise _refusal(
            model, f"a cross-entropy of {found:.9g} by the fused head", f"{expected:.9g}, that of its logits"
        )


@contextmanager
def _as_in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Switch off dropout, and flash attention too, because it runs neither in float32 nor on a CPU."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}.values()
    flash = [(c, c._attn_implementation) for c in configs if "flash" in str(c._attn_implementation)]
    for config, _ in flash:
        config._attn_implementation_internal = "eager"
    try:
        with in_evaluation(model):
            yield
    finally:
        for config, name in flash:
            config._attn_implementation_internal = name


def _close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding that another order of summation causes."""
    rounding = 64 * torch.finfo(expected.dtype).eps * float(expected.float().abs().amax())
    return found.shape == expected.shape and bool(((found - expected).abs() <= rounding).all())


def _refusal(model: PreTrainedModel, found: str, expected: str) -> InputError:
    return InputError(
        "this model's head cannot be trained by the fused loss",
        where=model.name_or_path or model.config.model_type,
        found=found,
        expected=expected,
    )
