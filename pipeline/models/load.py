"""Hugging Face models: the path of a stage's model, its facts, loading and saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import empty_model, load_config, max_positions
from capgap.pipeline.models.contents import contents_of, first_line
from capgap.pipeline.models.hub import require_reached
from capgap.pipeline.models.recorded import require_as_recorded
from capgap.pipeline.models.tokenizers import refuse_code, tokenizer_facts
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.device import multiplies, warn_of_slow_products
from capgap.pipeline.stage.heartbeat import begin_phase
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store.files import whole_folder
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.facts import ModelFacts, ServedFacts, teacher_facts

MODEL_FOLDER = "model"
HIGH_PRECISION_FOLDER = "high_precision"
"""Folder next to a low-bit `model`, with the high-precision weights that it was made from."""

# transformers' progress bars count files, which is noise between capgap's own bars
disable_progress_bar()


def model_path(made: StageInput, to_train: bool = False) -> str:
    """Return the folder or id of the model that a stage made or was given, after checking its digests.

    A process checks them once; `models/recorded.py` says what that costs.

    Args:
        made: the teacher, student or train stage.
        to_train: also check the digests of the high-precision weights next to a low-bit model.

    Raises:
        CorruptError: a file of the model does not have the digest of the manifest.
        InputError: the stage's folder is behind a URL, or only a server has the model.
    """
    facts = teacher_facts(made.manifest.facts)
    if isinstance(facts, ServedFacts):
        raise InputError(
            "the teacher is served elsewhere, and its model is not here",
            where=made.location,
            found=f"only a server's name for the teacher, {facts.served}",
            expected="a model",
            fix="name the model itself as teacher.path, or leave out the stages that need it",
        )
    is_given = facts.path != MODEL_FOLDER
    folder = Path(facts.path) if is_given else made.path / MODEL_FOLDER
    if not is_given or folder.is_dir():
        require_as_recorded(made, folder, is_given)
    if to_train and (beside := made.path / HIGH_PRECISION_FOLDER).is_dir():
        require_as_recorded(made, beside, False)
    return facts.path if is_given else str(folder)


def served_path(made: StageInput) -> str:
    """Return what `model_path` returns, or an empty text for a teacher of which only a server's name is known."""
    return "" if isinstance(teacher_facts(made.manifest.facts), ServedFacts) else model_path(made)


def model_at(path: str) -> str:
    """Return the folder or id of a model that is given as a stage's folder, a model's folder or an id.

    Raises:
        CorruptError: the stage's manifest cannot be read, or as `model_path`.
    """
    made = read_manifest(Path(path)) if Path(path).is_dir() else None
    return path if made is None else model_path(StageInput(Path(path), made))


def load_model(
    path: str,
    device: str,
    dtype: torch.dtype | Literal["fast"] | None = None,
    trust_remote_code: bool = False,
    *,
    to_compute: bool = True,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode from safetensors files; pickled files are never opened.

    Args:
        path: the model's folder or id.
        device: `cpu` or `cuda:0`.
        dtype: dtype of the weights; None is the saved dtype. `fast` is the saved dtype too, or float32 where the device
            is slow in the saved one: the weights are the same, and sums are rounded less.
        trust_remote_code: whether to run code that comes with the model; if not, a model that needs it is refused.
        to_compute: whether the model will compute on this device in this dtype, so that a slow dtype gives a warning.

    Raises:
        InputError: the model does not exist, is no causal language model, or its weights are not complete.
        MachineError: a package that reads quantised weights is not installed, or the network fails.
    """
    begin_phase(f"loads {path}")
    config = load_config(path, trust_remote_code)
    require_complete(path, trust_remote_code, config)
    if dtype == "fast":
        dtype = fast_dtype(config, device)
    is_packed = _unpacked_at_once(config)
    try:
        with (
            contents_of("the model cannot be loaded", path, "weights, configuration and generation_config.json"),
            _unpacked_in_silence() if is_packed else nullcontext(),
        ):
            model = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype or "auto", trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except ImportError as error:
        raise MachineError(
            "a package that reads the weights is not installed",
            where=path,
            found=first_line(error),
            fix="install it beside capgap and run the same command again",
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        refuse_code(error, path)
        require_reached(path, error)
        raise InputError(
            "the model cannot be loaded", where=path, found=first_line(error), expected="weights as safetensors"
        ) from None
    if is_packed:
        # the library unpacks 4-bit numbers to bfloat16, whatever the dtype of the other weights is
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                layer.weight.data = layer.weight.data.to(model.dtype)
        if device == "cpu":
            for part in (model.get_decoder(), model.get_output_embeddings()):
                _without_compilation(part)
    if to_compute:
        fix = "set the dtype to float32 where there is such a setting, or save the model in float32"
        warn_of_slow_products(path, device, str(model.dtype).removeprefix("torch."), fix)
    return model.to(device).eval()


def fast_dtype(config: Any, device: str) -> torch.dtype | None:
    """Return the dtype in which a model was saved, or float32 where the device is slow in it; None if it is unknown."""
    saved: torch.dtype | None = config.get_text_config().dtype or config.dtype
    if saved is None or multiplies(device, str(saved).removeprefix("torch.")):
        return saved
    return torch.float32


def _unpacked_at_once(config: Any) -> bool:
    """Return whether compressed-tensors packed the weights, and make their loading unpack them in this case.

    By default the library unpacks them only in the first forward pass, and code that reads the model before then finds
    no weights.
    """
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return False
    config.quantization_config = settings | {"dequantize": True}
    return True


@contextmanager
def _unpacked_in_silence() -> Iterator[None]:
    """Within this context, unpack weights without progress bars, torch.compile and the initialisation of packed layers.

    The library would compile its rounding to FP4, which takes half a minute and needs a C++ compiler. transformers
    would initialise an embedding's weight before it is unpacked, and fail; no initialisation is needed, as the files
    hold every weight.
    """
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.utils import patch_attr

    initialise = PreTrainedModel._initialize_weights

    def initialise_unpacked(model: PreTrainedModel, module: nn.Module, *others: Any) -> None:
        if not hasattr(module, "weight_packed"):
            initialise(model, module, *others)

    silent = patch_attr(model_compressor, "tqdm", lambda modules, **about: modules)
    unpacked = patch_attr(PreTrainedModel, "_initialize_weights", initialise_unpacked)
    with silent, unpacked, torch.compiler.set_stance("force_eager"):
        yield


def _without_compilation(part: nn.Module) -> None:
    """Turn torch.compile off in the forward passes of a module, in which the library rounds activations."""
    stances: list[Any] = []
    part.register_forward_pre_hook(lambda *_: stances.append(torch.compiler.set_stance("force_eager")))
    part.register_forward_hook(lambda *_: stances.pop().__exit__(None, None, None), always_call=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights as safetensors, configuration and tokenizer into a folder that transformers and vLLM can open."""
    with whole_folder(folder) as whole:
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)


def model_facts(
    model_or_config: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: str = MODEL_FOLDER,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """Return the facts of a model for later stages; for a configuration, sizes are counted on a model without weights.

    Args:
        model_or_config: the model, or its configuration.
        tokenizer: tokenizer of the model.
        path: path of the model for the facts.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        InputError: the model has no embedding or no head, or as `empty_model`.
    """
    given = isinstance(model_or_config, PreTrainedModel)
    model = model_or_config if given else empty_model(model_or_config, trust_remote_code)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(getattr(end, "weight", None) is None for end in ends):
        raise InputError(
            "this model cannot be used",
            where=model.name_or_path or model.config.model_type,
            found="no embedding or no head" if None in ends else "an embedding or a head without a weight",
            expected="one matrix each for embedding and head",
        )
    embedding, head = (end.weight for end in ends)
    total = sum(parameter.numel() for parameter in model.parameters())
    outside = embedding.numel() if head is embedding else embedding.numel() + head.numel()
    return ModelFacts(
        tokenizer=tokenizer_facts(tokenizer),
        num_parameters=total,
        num_non_embedding_parameters=total - outside,
        padded_vocab_size=embedding.shape[0],
        max_positions=max_positions(model.config),
        path=path,
    )
