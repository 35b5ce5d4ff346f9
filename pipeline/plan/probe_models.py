"""The models that are probed: the run's own where they lie on this machine, else models of the same shape with random
weights.

A rate does not depend on the weights as long as every token takes the same path through the model. A mixture of experts
is probed as if its router chose experts at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import model_at
from capgap.pipeline.models.trainable import is_quantised
from capgap.pipeline.student.cut import pruned_config
from capgap.pipeline.student.shapes import llama_config, shape_of, target_shape, teacher_config
from capgap.schemas.errors import InputError
from capgap.schemas.run_file import RunFile


def teacher_folder(run: RunFile, made: str | None, scratch: Path, vocab_size: int) -> str:
    """Return the folder of the teacher, or of a model of its shape, which is then written to `scratch`.

    Args:
        run: The run file.
        made: Folder of a finished teacher stage; None where there is none.
        scratch: Where a model with random weights is written if the teacher is not on this machine.
        vocab_size: Size of the tokenizer's vocabulary.

    Raises:
        InputError: Its configuration cannot be read, or it is quantised and its weights are not on this machine.
    """
    if made is not None:
        return model_at(made)
    if run.teacher.path is not None and run.teacher.optimization is None:
        try:
            path = Path(run.teacher.path)
            return str(path) if path.is_dir() else snapshot_download(run.teacher.path, local_files_only=True)
        except LocalEntryNotFoundError:
            pass
    config = teacher_to_probe(run, None, vocab_size)
    random_model(config, "cpu", _dtype_of(config), run.teacher.trust_remote_code).save_pretrained(scratch)
    return str(scratch)


def teacher_to_probe(run: RunFile, made: str | None, vocab_size: int) -> Any:
    """Return the teacher's configuration.

    Args:
        run: The run file.
        made: Folder of a finished teacher stage; None where there is none.
        vocab_size: Size of the tokenizer's vocabulary.

    Raises:
        InputError: It cannot be read.
    """
    config = teacher_config(run.teacher, vocab_size) if made is None else load_config(model_at(made))
    return _long_enough(config, run)


def student_to_probe(run: RunFile, teacher_made: str | None, vocab_size: int) -> Any:
    """Return the student's configuration.

    Args:
        run: The run file.
        teacher_made: Folder of a finished teacher stage; None where there is none.
        vocab_size: Size of the tokenizer's vocabulary.

    Raises:
        InputError: It cannot be read, or the student is quantised, which random models here are not.
        SettingError: The teacher cannot be pruned to the shape asked for.
    """
    student = run.student
    if student.quantize is not None:
        raise InputError("a student of few bits is not probed", where="student.quantize", found=student.quantize.format)
    if student.path is not None:
        return load_config(student.path, student.trust_remote_code)
    if student.prune is not None:
        config = teacher_to_probe(run, teacher_made, vocab_size)
        target = target_shape(shape_of(config, "teacher"), student.prune)
        return pruned_config(config, target, list(range(target.num_layers)))
    assert student.model is not None
    return _long_enough(llama_config(student.model, vocab_size), run)


def random_model(
    config: Any, device: str, dtype: torch.dtype | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return a model of that configuration with random weights, float32 if `dtype` is None.

    Raises:
        InputError: The configuration is that of a quantised model.
    """
    if is_quantised(config):
        raise InputError("a quantised model is only probed with its own weights", where=config.name_or_path)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code
        )
    return model


def _long_enough(config: Any, run: RunFile) -> Any:
    """Give a model made from a shape enough positions for the run's sequences; a given teacher keeps its own."""
    if run.teacher.path is None and getattr(config, "max_position_embeddings", run.corpus.seq_len) < run.corpus.seq_len:
        config.max_position_embeddings = run.corpus.seq_len
    return config


def _dtype_of(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32
