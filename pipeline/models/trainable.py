"""Load the model that a training starts from, and write the folders of the trained model.

model/            the model that is served and measured; for a low-bit student, packed by compressed-tensors
high_precision/   for a low-bit student only: the weights that were trained, from which a training continues
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.load import HIGH_PRECISION_FOLDER, MODEL_FOLDER, load_model, save_model
from capgap.pipeline.store.extras import adding
from capgap.pipeline.store.files import whole_folder
from capgap.schemas.errors import InputError, MachineError


def require_compressed_tensors(setting: str) -> None:
    """Raise MachineError where compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ModuleNotFoundError:
        raise MachineError(
            "a student of few bits needs a package that is not installed",
            where=setting,
            found="no compressed-tensors",
            fix=f"run {adding('quantize')}",
        ) from None


def is_quantised(config: Any) -> bool:
    """Return whether a configuration declares quantised weights."""
    return getattr(config, "quantization_config", None) is not None


def require_plain(config: Any, where: str) -> None:
    """Raise InputError for a given model that is quantised already, as low-bit numbers cannot be trained."""
    if not is_quantised(config):
        return
    beside = _beside(str(config.name_or_path))
    raise InputError(
        "the model is quantised already",
        where=where,
        found=f"quantization_config in config.json: {_method(config)}",
        expected="weights of 16 bits or more, which a training can change",
        fix=f"give {beside}, the weights that it was made of" if beside else "give the model that it was made of",
    )


def require_trainable(path: str, where: str, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration.

    Raises:
        InputError: the model is quantised, and no folder `high_precision` is next to it.
    """
    config = load_config(path, trust_remote_code)
    if is_quantised(config) and _beside(path) is None:
        require_plain(config, where)
    return config


def load_to_train(path: str, dtype: torch.dtype | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a model on the CPU whose weights can be trained.

    A low-bit model gets the weights of its folder `high_precision`, and computes with the low-bit numbers of these.

    Args:
        path: folder or id of the model that is served.
        dtype: dtype of the weights; None is the saved dtype.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        InputError: the model is quantised, and no folder `high_precision` is next to it; or as `load_model`.
        MachineError: compressed-tensors is not installed, or as `load_model`.
    """
    config = require_trainable(path, path, trust_remote_code)
    if not is_quantised(config):
        return load_model(path, "cpu", dtype, trust_remote_code, to_compute=False)
    require_compressed_tensors(path)
    from capgap.pipeline.models.low_bit_files import as_compressed

    model = load_model(str(_beside(path)), "cpu", dtype, trust_remote_code, to_compute=False)
    as_compressed(model, config, Path(path))
    # the path from which this model can be loaded again
    model.name_or_path = path
    return model


def empty_to_train(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Make the model of `load_to_train` on the device `meta`, without memory for its weights."""
    config = require_trainable(path, path, trust_remote_code)
    if not is_quantised(config):
        return empty_model(config, trust_remote_code)
    require_compressed_tensors(path)
    from capgap.pipeline.models.low_bit_files import as_compressed

    model = empty_model(load_config(str(_beside(path)), trust_remote_code), trust_remote_code)
    as_compressed(model, config)
    return model


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, low_bit: bool) -> None:
    """Write the folder `model` of a stage, and for a low-bit student also `high_precision`.

    Args:
        model: the trained model.
        tokenizer: the model's tokenizer.
        folder: folder of the stage.
        low_bit: whether the model computes with low-bit numbers.
    """
    if not low_bit:
        save_model(model, tokenizer, folder / MODEL_FOLDER)
        return
    from capgap.pipeline.models.low_bit_files import save_compressed

    save_model(model, tokenizer, folder / HIGH_PRECISION_FOLDER)
    with whole_folder(folder / MODEL_FOLDER) as whole:
        save_compressed(model, whole)
        tokenizer.save_pretrained(whole)


def _beside(path: str) -> Path | None:
    folder = Path(path).resolve().parent / HIGH_PRECISION_FOLDER
    return folder if Path(path).is_dir() and folder.is_dir() else None


def _method(config: Any) -> str:
    settings = config.quantization_config
    found = settings if isinstance(settings, dict) else settings.to_dict()
    return ", ".join(str(found[key]) for key in ("quant_method", "format") if found.get(key)) or "of no name"
