"""The load-balancing loss, which keeps the use of a mixture's experts even (Switch Transformer: arXiv 2101.03961).

It depends on the decoder and not on the head, so it works with the fused head. Transformers defines it in the module of
each such model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.schemas.errors import InputError


class RouterLoss:
    """The load-balancing loss of a model, averaged over its layers and the tokens of a micro-batch.

    Args:
        model: A mixture of experts.

    Raises:
        InputError: Transformers has no load-balancing loss for the model.
    """

    arguments = {"output_router_logits": True}  # noqa: RUF012
    """Arguments of the decoder's forward, so that its output has the router logits that `__call__` reads."""

    def __init__(self, model: PreTrainedModel) -> None:
        loss: Callable[..., torch.Tensor] | None = getattr(
            sys.modules[type(model).__module__], "load_balancing_loss_func", None
        )
        self._num_chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
        if loss is None or self._num_chosen is None:
            raise InputError(
                "this model has no load-balancing loss",
                where=model.name_or_path or model.config.model_type,
                found="train.router_loss_weight above 0",
                expected="a mixture of experts that transformers can balance",
                fix="leave train.router_loss_weight out",
            )
        self._loss = loss

    def __call__(self, output: Any) -> torch.Tensor:
        """Return the loss, a scalar, from the decoder's output.

        It is the number of experts that a token uses if all experts are used evenly, and rises to the number of all
        experts if every token uses the same ones.
        """
        router_logits = output.router_logits
        return self._loss(router_logits, router_logits[0].shape[-1], self._num_chosen)
