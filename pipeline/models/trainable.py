"""The model that a training goes on from, and the folders that it leaves.

model/            what is served and measured; of a student of few bits, as compressed-tensors packs it
high_precision/   of such a student alone: the weights that were trained, from which a training goes on
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
    """Whether the weights of a model of this configuration lie in few bits."""
    return getattr(config, "quantization_config", None) is not None


def require_plain(config: Any, where: str) -> None:
    """Raise InputError for a given model that is quantised already: numbers of few bits cannot be trained."""
    if not is_quantised(config):
        return
    beside = _beside(str(config.name_or_path))
    raise InputError(
        "the model is quantised already",
        where=where,
        found=f"quantization_config in config.json: {_method(config)}",
        expected="weights of 16 bits or more, which a training can move",
        fix=f"give {beside}, the weights that it was made of" if beside else "give the model that it was made of",
    )


def require_trainable(path: str, where: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model; InputError where it is quantised and its own weights do not lie beside it."""
    config = load_config(path, trust_remote_code)
    if is_quantised(config) and _beside(path) is None:
        require_plain(config, where)
    return config


def load_to_train(path: str, dtype: torch.dtype | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model on the CPU whose weights can be trained; one of few bits computes with them and trains those beside them.

    Args:
        path: folder or id of the model that is served.
        dtype: of its weights; the one they were saved in where it is left out.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: it is quantised, and the weights that it was made of do not lie beside it; or as `load_model`.
        MachineError: compressed-tensors is not installed, or as `load_model`.
    """
    config = require_trainable(path, path, trust_remote_code)
    if not is_quantised(config):
        return load_model(path, "cpu", dtype, trust_remote_code, to_compute=False)
    require_compressed_tensors(path)
    from capgap.pipeline.models.low_bit_files import as_compressed

    model = load_model(str(_beside(path)), "cpu", dtype, trust_remote_code, to_compute=False)
    as_compressed(model, config, Path(path))
    # by which it is loaded again
    model.name_or_path = path
    return model


def empty_to_train(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """As `load_to_train`, without memory for its weights."""
    config = require_trainable(path, path, trust_remote_code)
    if not is_quantised(config):
        return empty_model(config, trust_remote_code)
    require_compressed_tensors(path)
    from capgap.pipeline.models.low_bit_files import as_compressed

    model = empty_model(load_config(str(_beside(path)), trust_remote_code), trust_remote_code)
    as_compressed(model, config)
    return model


def save_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, low_bit: bool) -> None:
    """Write the folder `model` of a stage, and of a student of few bits `high_precision` beside it.

    Args:
        model: as it was trained.
        tokenizer: of it.
        folder: of the stage.
        low_bit: whether the model computes with few bits.
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
