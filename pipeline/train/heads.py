"""What the loss must know of a causal language model to stand for its head: found by trying the model, not by its name.

A model's logits may be more than the product of its head: scaled (Cohere, Granite), capped (Gemma), or changed in a way
that nobody here has heard of. So a short sequence goes through the model, known numbers are put in the place of the
head's output, and what the model makes of them is compared with what the loss would. What differs is refused.

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

_NUM_TOKENS = 8  # a few positions, so that one that looked ahead would be seen; short, so that a trial is cheap
# Where c tanh(z / c) is z in float32 for any cap that leaves a model its logits, and where it is c. Powers of two, by
# which a factor comes out as the model has it.
_SMALL, _LARGE = 2.0**-17, 2.0**20


@dataclass(frozen=True)
class LmHead:
    """A model's logits are `capped(scale * linear(hidden))`, hidden being the last hidden states of `decoder`.

    Attributes:
        decoder: the part of the model that makes the hidden states.
        linear: weight [V, H] and perhaps a bias [V]; it may round what it multiplies to few bits.
        scale: factor of the logits.
        softcap: c, where logits z become c tanh(z / c).
    """

    decoder: nn.Module
    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def inputs(self, hidden_BLH: Tensor) -> dict[str, Any]:
        """The arguments of `linear_sparse_kl` that stand for the model's logits."""
        bias_V: Tensor | None = self.linear.bias
        if not torch.is_autocast_enabled(hidden_BLH.device.type):
            hidden_BLH = hidden_BLH.to(self.linear.weight.dtype)  # of a model that keeps its hidden states wider
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
    """The head of a model, once the loss has been seen to stand for it: a few forward passes of 16 tokens.

    The model is left as it was, and torch's global random numbers are not used.

    Args:
        model: in any dtype, on the device where it can run.
        vocab_size: the real vocabulary; columns of the head at or past it are padding.

    Raises:
        InputError: its head is no plain linear layer, or its logits are not `LmHead`'s; or a token changes what comes
            before it; or it cannot be run on tokens alone.
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
    # subclasses compute something else: adapters and quantised layers are such; of ours the operands are known
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
    """What the head reads [B, L, H], and the scale and cap that the model puts on the head's output."""
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
    """The smallest part of the model whose last hidden states are what its head reads."""
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
    """The two sequences differ in their last token alone."""
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
    # in float32 torch's own sum over 262,144 ids is off by more than the fused one
    expected = cross_entropy(true_BLV.flatten(0, 1)[:, :vocab_size].double(), labels_N)
    # both round logits to the weight's dtype, in another order
    rounding = 8 * torch.finfo(head.linear.weight.dtype).eps * max(1.0, float(true_BLV.float().abs().amax()))
    if not abs(float(found) - float(expected)) <= rounding:
        raise _refusal(
            model, f"a cross-entropy of {found:.9g} by the fused head", f"{expected:.9g}, that of its logits"
        )


@contextmanager
def _as_in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without flash attention, which takes neither float32 nor a CPU."""
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
    """Equal but for sums in another order."""
    rounding = 64 * torch.finfo(expected.dtype).eps * float(expected.float().abs().amax())
    return found.shape == expected.shape and bool(((found - expected).abs() <= rounding).all())


def _refusal(model: PreTrainedModel, found: str, expected: str) -> InputError:
    return InputError(
        "this model's head cannot be trained by the fused loss",
        where=model.name_or_path or model.config.model_type,
        found=found,
        expected=expected,
    )
