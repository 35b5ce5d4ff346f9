"""Hooks that read or change the inputs and outputs of a model's modules for the length of a block.

Legend: B sequences, L tokens a sequence, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def before(module: nn.Module, see: Callable[[Tensor], Any], replace: bool = False) -> Iterator[None]:
    """Call `see` with the module's input; with `replace`, its result replaces the input."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen = see(inputs[0])
        return (seen, *inputs[1:]) if replace else None

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, see: Callable[[Tensor], Any], replace: bool = False) -> Iterator[None]:
    """Call `see` with the module's output; with `replace`, its result replaces the output."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        seen = see(output)
        return seen if replace else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def around(module: nn.Module, see: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `see` with the module's input and output; its result replaces the output unless it is None."""
    handle = module.register_forward_hook(lambda _, inputs, output: see(inputs[0], output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Compute no gradients of the model's weights, and afterwards restore which weights need gradients."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def masked(mask_BC: Tensor, width: int = 1) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies values [B, L, C x width] by their sequence's mask, one entry per `width`."""

    def multiply(values_BLC: Tensor) -> Tensor:
        return values_BLC * mask_BC.repeat_interleave(width, dim=1)[:, None].to(values_BLC.dtype)

    return multiply
