"""Prunes the teacher: scores its parts, cuts the model, and measures the loss before and after."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.pipeline.eval.heldout import first_sequences
from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.load import fast_dtype, load_model, model_path
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.trainable import require_plain
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.student.calibrate import calibrate, loss_without_each_layer
from capgap.pipeline.student.calibration_text import CalibrationText
from capgap.pipeline.student.cut import cut, pruned_config
from capgap.pipeline.student.kept import Scores, choose, random_scores
from capgap.pipeline.student.pruning_report import Nearness, write_report
from capgap.pipeline.student.shapes import Shape, shape_of, target_shape
from capgap.pipeline.train.fits import free_bytes
from capgap.schemas.errors import MachineError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.run_prune import PruneSettings

_NUM_HELDOUT = 64


def require_prunable(settings: PruneSettings, teacher: StageInput) -> None:
    """Refuse a shape to which the teacher cannot be pruned; only its configuration is read.

    Raises:
        InputError: The teacher's architecture cannot be pruned, or not to this shape, or the teacher is quantised.
        SettingError: The shape is larger than the teacher, or its heads do not fit into the teacher's groups.
    """
    path = model_path(teacher)
    config = load_config(path)
    require_plain(config, path)
    target = target_shape(shape_of(config, path), settings)
    pruned_config(config, target, list(range(target.num_layers)))


def prune(context: StageContext, settings: PruneSettings) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the pruned teacher, on the CPU, and totals for the manifest; write `prune.json` to the stage's folder.

    Raises:
        InputError: The teacher's architecture cannot be pruned, or its activations are not finite.
        SettingError: The shape is larger than the teacher, or its heads do not fit into the teacher's groups.
        MachineError: The teacher does not fit on the device.
    """
    teacher_input, corpus = context.input("teacher"), context.input("corpus")
    path = model_path(teacher_input)
    facts = CorpusFacts.model_validate(corpus.manifest.facts)
    config = load_config(path)
    shape = shape_of(config, path)
    target = target_shape(shape, settings)
    require_room(config, path, context.device)
    teacher = load_model(path, context.device, "fast")
    text = CalibrationText(RunText(corpus), settings.num_sequences, settings.batch_sequences)
    assert context.instance.seed is not None
    scores, energy_NH = _scores(teacher, shape, settings, text, context.instance.seed)
    kept = choose(scores, target, settings.layer_importance)
    student = cut(teacher, target, kept, energy_NH)
    heldout = first_sequences(corpus.path, corpus.manifest.shard_sets["heldout"], _NUM_HELDOUT)
    nearness = Nearness(heldout, facts.tokenizer.vocab_size, facts.context)
    # The teacher is measured after it was cut, because measuring changes its head to compute in float32.
    before = nearness.teacher_loss(teacher)
    del teacher
    # The student is copied for the same reason.
    after, kl = nearness.student_loss(copy.deepcopy(student).to(context.device))
    figures = {
        "num_calibration_sequences": text.num_sequences,
        "heldout_loss_of_teacher": round(before, 6),
        "heldout_loss_of_student": round(after, 6),
        "kl_of_student": round(kl, 6),
        "num_heldout_sequences": len(heldout),
        "num_kl_sequences": nearness.num_compared,
    }
    write_report(context.folder, kept, scores, figures)
    return student.to(config.dtype or student.dtype), figures


def require_room(config: Any, path: str, device: str) -> None:
    """Raise MachineError if the teacher's weights alone, in the dtype in which it runs, exceed the free memory.

    Activations are not estimated; `student.prune.batch_sequences` bounds them.
    """
    dtype = fast_dtype(config, device) or torch.float32
    needed = sum(p.numel() for p in empty_model(config).parameters()) * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise MachineError(
            "the teacher does not fit on the device that is to prune it",
            where=f"student.prune: {path}",
            found=f"{free / 1e9:.1f} GB free on {device}",
            expected=f"{needed / 1e9:.1f} GB for weights in {dtype}, and more for activations",
            fix="prune on a larger device (device: cpu needs no GPU)",
        )


def _scores(
    teacher: PreTrainedModel, shape: Shape, settings: PruneSettings, text: CalibrationText, seed: int
) -> tuple[Scores, torch.Tensor]:
    """Return the scores that the settings ask for, and the energy of channels.

    The calibration also runs for random scores, because the energy of channels is needed with any scores.
    """
    by_loss = settings.layer_importance == "loss"
    passes = 1 + (shape.num_layers + 1 if by_loss else 0)
    with progress("student: prune", text.num_sequences * passes, "sequences") as meter:
        seen = calibrate(teacher, shape, text.batches(), text.vocab_size, settings.importance == "taylor", meter)
        risen_M = loss_without_each_layer(teacher, text.batches, text.vocab_size, meter) if by_loss else None
    chance = random_scores(shape, seed)
    scores = chance if settings.importance == "random" else seen.scores
    layers_M = seen.scores.layers_M if risen_M is None else risen_M
    if settings.layer_importance == "random":
        layers_M = chance.layers_M
    return replace(scores, layers_M=layers_M), seen.energy_NH
