"""Layers that compute with the numbers of a low-bit checkpoint and learn in the precision of their weights.

    weight, input --compressed-tensors' fake quantisation--> numbers of few bits --> product
    gradients    <-- straight through, as if nothing had been rounded

The scales of a weight are a function of the weight and are computed anew in every pass. So a checkpoint that is written
from the weights holds exactly the numbers that the layer computed with, and a training has to keep only its weights.

Legend: O output features, I input features, G groups of inputs, B sequences, L tokens a sequence, V rows of the
embedding, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.quantization import (
    DynamicType,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_quantize import QuantizeSettings

SETTING = "student.quantize"
SAVED_DTYPE = torch.bfloat16
"""The dtype of scales and unquantised tensors in a low-bit checkpoint: low-bit kernels do not support float32 there."""
# Layers that vLLM merges into one matrix, which has a single scale.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MOST_NAMED = 3


@dataclass(frozen=True)
class WeightScales:
    """The scales of a weight, float32.

    Attributes:
        scale: [O, 1], one per output channel, or [O, G], one per group.
        global_scale: [1], for `nvfp4` only.
    """

    scale: Tensor
    global_scale: Tensor | None = None


class LowBitLinear(nn.Linear):
    """A linear layer that shares the parameters of another one, and rounds inputs and weight before it multiplies them.

    Args:
        of: the layer that it replaces.
        scheme: compressed-tensors' description of the numbers.
    """

    scheme: QuantizationScheme
    input_global_scale: Tensor | None

    def __init__(self, of: nn.Linear, scheme: QuantizationScheme) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self.scheme = scheme
        # all layers, this one included, that share the global scale of their merged matrix
        self.fused: tuple[LowBitLinear, ...] = (self,)
        # not persistent, so that it is not saved with the weights in high precision
        self.register_buffer("input_global_scale", None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Return the product of rounded input and rounded weight, plus the bias, which is not rounded."""
        return linear(*self.operands(input), self.bias)

    def operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rounded input and the rounded weight."""
        if self.scheme.input_activations is not None:
            input = _straight_through(input, self._rounded_input)
        return input, _straight_through(self.weight, self._rounded_weight)

    @torch.no_grad()
    def weight_scales(self) -> WeightScales:
        """Compute the scales of the weight, in float32 whatever the weight's dtype is."""
        args = _weights_of(self.scheme)
        shared = self._weight_global_scale() if args.strategy == QuantizationStrategy.TENSOR_GROUP else None
        return _scales(self, args, self.weight.float(), shared)

    def _weight_global_scale(self) -> Tensor:
        largest = torch.stack([one.weight.abs().amax() for one in self.fused]).amax().float()
        shared: Tensor = generate_gparam(-largest, largest)
        return shared

    def _rounded_weight(self, weight_OI: Tensor) -> Tensor:
        scales = self.weight_scales()
        rounded_OI: Tensor = fake_quantize(
            weight_OI.float(), scales.scale, None, _weights_of(self.scheme), global_scale=scales.global_scale
        )
        return rounded_OI

    def _rounded_input(self, input: Tensor) -> Tensor:
        args = self.scheme.input_activations
        assert args is not None
        # the library gives each token its own scale only if the input has a dimension for sequences
        input_BLI = input.float().reshape(-1, 1, input.shape[-1])
        shared = self.input_global_scale
        scale, _ = compute_dynamic_scales_and_zp(input_BLI, args, self, shared)
        rounded: Tensor = fake_quantize(input_BLI, scale, None, args, global_scale=shared)
        return rounded.reshape(input.shape)


class LowBitEmbedding(nn.Embedding):
    """An embedding that shares the rows of another one, and rounds them when they are looked up.

    Args:
        of: the embedding that it replaces.
        scheme: compressed-tensors' description of the weights, without activations; no scale covers more than one row.
    """

    scheme: QuantizationScheme

    def __init__(self, of: nn.Embedding, scheme: QuantizationScheme) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = of.num_embeddings, of.embedding_dim, of.padding_idx
        self.weight, self.scheme = of.weight, scheme

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """Return the rounded rows [..., H] of ids [...]."""
        return _straight_through(embedding(input, self.weight, self.padding_idx), self.rounded)

    @torch.no_grad()
    def weight_scales(self) -> WeightScales:
        """Compute the scales of the rows, in float32 whatever their dtype is."""
        return _scales(self, _weights_of(self.scheme), self.weight.float(), None)

    def rounded(self, rows: Tensor) -> Tensor:
        """Return the rows [..., H] rounded to the values that the checkpoint holds."""
        args, rows_VH = _weights_of(self.scheme), rows.float().flatten(0, -2)
        rounded_VH: Tensor = fake_quantize(rows_VH, _scales(self, args, rows_VH, None).scale, None, args)
        return rounded_VH.view(rows.shape)


class _StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass, and lets gradients pass unchanged."""

    @staticmethod
    @torch.compiler.disable
    def forward(ctx: Any, value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        with eager_on(value.device):
            return rounded(value.detach()).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _straight_through(value: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    found: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def eager_on(device: torch.device) -> Iterator[None]:
    """Within this context, compressed-tensors does not use torch.compile on a CPU.

    It would compile its rounding to FP4, which takes half a minute in every process and needs a C++ compiler.
    """
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext():
        yield


def scheme_of(settings: QuantizeSettings, weights_alone: bool = False) -> QuantizationScheme:
    """Return compressed-tensors' description of a format; with `weights_alone`, as for embeddings, of weights only."""
    names = {"int8": "W8A8", "int4": "W4A16", "fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}
    name = names[settings.format]
    if settings.format in ("mxfp4", "nvfp4") and not settings.has_activations:
        name += "A16"
    scheme = preset_name_to_scheme(name, ["Linear"])
    if weights_alone:
        scheme.input_activations = None
    weights = _weights_of(scheme)
    if settings.format == "int4":
        weights.group_size = settings.int4_group_size
    # where the format leaves the dtype of scales open, it is that of the checkpoint and of vLLM
    weights.scale_dtype = weights.scale_dtype or SAVED_DTYPE
    return scheme


def layers_to_quantise(model: PreTrainedModel, settings: QuantizeSettings) -> tuple[str, ...]:
    """Return the names of the linear layers that the settings select, after checking that each can take the format.

    No weights are read.

    Raises:
        InputError: no layer is selected, other layers than linear ones hold weights, or the number of inputs of a layer
            is no multiple of the group size.
        SettingError: an entry of `ignore` matches no layer.
    """
    every = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    head = model.get_output_embeddings()
    inside = {name: layer for name, layer in every.items() if settings.head or layer is not head}
    _require_linear(model, inside, has_others=any(layer is not head for layer in inside.values()))
    for end in settings.ignore:
        if not any(_ends(name, end) for name in inside):
            raise SettingError(
                "no linear layer of the student has this name",
                where=f"{SETTING}.ignore",
                found=end,
                expected=f"the end of a name, such as {', '.join(sorted({n.rpartition('.')[2] for n in inside}))}",
            )
    chosen = {n: layer for n, layer in inside.items() if not any(_ends(n, end) for end in settings.ignore)}
    if not chosen:
        raise _refusal(model, f"every linear layer in {SETTING}.ignore", "a linear layer to quantise")
    inputs = {name: layer.in_features for name, layer in chosen.items()}
    if settings.embedding:
        inputs |= {name: table.embedding_dim for name, table in _only_embedding(model).items()}
    _require_groups(model, inputs, settings)
    return tuple(chosen)


def make_low_bit(
    model: PreTrainedModel,
    names: Iterable[str],
    scheme: QuantizationScheme,
    input_global_scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace each named layer by a `LowBitLinear`; the model keeps its parameters and their names.

    Args:
        model: the model, which is changed in place.
        names: names of plain linear layers.
        scheme: the numbers of all these layers.
        input_global_scales: the global scale of each layer's inputs, [1] float32 by name; None if the scheme has none.
    """
    made = {}
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear, name
        made[name] = LowBitLinear(layer, scheme)
        if input_global_scales is not None:
            made[name].input_global_scale = input_global_scales[name]
        model.set_submodule(name, made[name])
    for name, one in made.items():
        parent, _, own = name.rpartition(".")
        together = next((ends for ends in _FUSED if own in ends), (own,))
        one.fused = tuple(made[full] for end in together if (full := f"{parent}.{end}".lstrip(".")) in made)


def make_low_bit_embedding(model: PreTrainedModel, scheme: QuantizationScheme) -> None:
    """Replace the embedding by a `LowBitEmbedding`; the model keeps its parameters and their names."""
    ((name, table),) = _only_embedding(model).items()
    model.set_submodule(name, LowBitEmbedding(table, scheme))


def low_bit_layers(model: nn.Module) -> dict[str, LowBitLinear]:
    """Return the low-bit linear layers by name; empty for a model that does not round its weights."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowBitLinear)}


def low_bit_embedding(model: nn.Module) -> dict[str, LowBitEmbedding]:
    """Return the low-bit embedding by name; empty for a model that does not round its embedding."""
    return {name: table for name, table in model.named_modules() if isinstance(table, LowBitEmbedding)}


def needs_input_scales(scheme: QuantizationScheme) -> bool:
    """Return whether the scheme has a global scale of activations, which is measured once."""
    args = scheme.input_activations
    return args is not None and args.dynamic == DynamicType.LOCAL


@torch.no_grad()
def measure_input_scales(
    model: PreTrainedModel, names: Iterable[str], look_at_text: Callable[[], None]
) -> dict[str, Tensor]:
    """Measure the global scale of the activations that enter each named layer, by the largest of them.

    Args:
        model: the model in high precision, on its device; it is not changed.
        names: names of plain linear layers.
        look_at_text: function that runs the model over text.

    Returns:
        The global scales, [1] float32 on the CPU, by name.

    Raises:
        InputError: a layer saw no activations, or activations that are not finite.
    """
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen = given[0].abs().amax().float()
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return look

    wanted = tuple(names)
    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in wanted]
    try:
        look_at_text()
    finally:
        for hook in hooks:
            hook.remove()
    bad = [name for name in wanted if name not in largest or not largest[name].isfinite()]
    if bad:
        raise _refusal(model, f"no finite inputs of {_some(bad)}", "layers that see every token")
    return {name: generate_gparam(-largest[name], largest[name]).cpu() for name in wanted}


def _scales(module: nn.Module, args: QuantizationArgs, weight_OI: Tensor, shared: Tensor | None) -> WeightScales:
    if args.strategy == QuantizationStrategy.CHANNEL:
        ends = weight_OI.amin(-1, keepdim=True), weight_OI.amax(-1, keepdim=True)
        return WeightScales(calculate_qparams(*ends, args)[0])
    return WeightScales(compute_dynamic_scales_and_zp(weight_OI, args, module, shared)[0], shared)


def _only_embedding(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    """Return the model's only embedding by its name; vLLM finds it by its class, so there must be no other one."""
    tables = {name: table for name, table in model.named_modules() if isinstance(table, nn.Embedding)}
    if len(tables) != 1 or any(type(table) is not nn.Embedding for table in tables.values()):
        kinds = [f"{name} of type {type(table).__name__}" for name, table in tables.items()]
        found = _some(kinds) or "none"
        raise _refusal(model, f"embeddings: {found}", f"one plain embedding; else leave {SETTING}.embedding out")
    return tables


def _weights_of(scheme: QuantizationScheme) -> QuantizationArgs:
    assert scheme.weights is not None
    return scheme.weights


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _require_linear(model: PreTrainedModel, layers: Mapping[str, nn.Linear], has_others: bool) -> None:
    others = [name for name, layer in layers.items() if type(layer) is not nn.Linear]
    if others:
        kinds = sorted({type(layers[name]).__name__ for name in others})
        raise _refusal(model, f"{', '.join(kinds)} in {_some(others)}", "plain linear layers")
    # a mixture's experts are one tensor, which cannot be quantised here; a convolution's weight is small and left as is
    wide = [
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 2
    ]
    if wide:
        raise _refusal(
            model,
            f"weights of more than two dimensions: {_some(wide)}",
            "linear layers; not a mixture's experts",
        )
    if not has_others:
        raise _refusal(model, "no linear layer beside the head", "linear layers, as in models like Llama")


def _require_groups(model: PreTrainedModel, inputs: Mapping[str, int], settings: QuantizeSettings) -> None:
    size = {"int4": settings.int4_group_size, "mxfp4": 32, "nvfp4": 16}.get(settings.format)
    if size is None:
        return
    odd = {name: num for name, num in inputs.items() if num % size}
    if not odd:
        return
    nums = sorted(set(odd.values()))
    fits = [f for f in (128, 64, 32) if settings.format == "int4" and not any(num % f for num in nums)]
    fix = f"set {SETTING}.group_size to {' or '.join(map(str, fits))}" if fits else "take int8 or fp8"
    raise InputError(
        "the inputs of a layer do not divide into groups",
        where=f"{SETTING}: {model.name_or_path or model.config.model_type}",
        found=f"{' and '.join(map(str, nums))} inputs in {_some(sorted(odd))}",
        expected=f"a multiple of {size}, the group of {settings.format}",
        fix=f"{fix}, or name those layers in {SETTING}.ignore",
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _refusal(model: PreTrainedModel, found: str, expected: str) -> InputError:
    return InputError(
        "this student cannot be quantised",
        where=f"{SETTING}: {model.name_or_path or model.config.model_type}",
        found=found,
        expected=expected,
    )
