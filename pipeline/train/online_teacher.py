"""Loads the teacher of an online training onto the device, if teacher and student fit there together."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl.chunks import has_wide_products
from capgap.pipeline.models.load import load_model, model_path
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.train.fits import free_bytes, held_bytes
from capgap.pipeline.train.strategy import is_sharded
from capgap.schemas.errors import MachineError
from capgap.schemas.facts import CacheFacts, ModelFacts
from capgap.schemas.run_train import TrainSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the student's weights, their gradients and the optimizer's two moments
_COPIES_OF_A_STUDENT = 4


def online_teacher(
    context: StageContext, cache: CacheFacts, settings: TrainSettings, model: PreTrainedModel
) -> PreTrainedModel:
    """Load the run's teacher onto the device of the stage, in the dtype in which it made the cache.

    Args:
        context: The context of the train stage.
        cache: The facts about the cache.
        settings: The settings of the training.
        model: The student, which is loaded already, on the CPU.

    Raises:
        MachineError: The teacher does not fit on the device beside the student.
        InputError: The model does not exist.
    """
    teacher, student = context.input("teacher"), context.input(f"student/seed-{context.instance.seed}")
    dtype = _DTYPES.get(cache.dtypes[0], torch.float32)
    require_room(
        ModelFacts.model_validate(student.manifest.facts),
        torch.bfloat16 if settings.precision == "bf16-true" else torch.float32,
        ModelFacts.model_validate(teacher.manifest.facts),
        dtype,
        context.device,
        # Memory that the student's weights already hold counts as free, because they are part of what it needs.
        free_bytes(context.device) + held_bytes(model, context.device),
        context.ranks.world_size if is_sharded(settings, context.ranks) else 1,
    )
    return load_model(model_path(teacher), context.device, dtype, context.run.teacher.trust_remote_code)


def require_room(
    student: ModelFacts,
    student_dtype: torch.dtype,
    teacher: ModelFacts,
    teacher_dtype: torch.dtype,
    device: str,
    free: int,
    num_parts: int = 1,
) -> None:
    """Raise MachineError if a student in training and the teacher need more than `free` bytes.

    Counted are the student's weights, gradients and moments, and the teacher's weights, with its head once more in
    float32 where the device needs that copy. Activations are not counted.

    Args:
        student: The facts about the student.
        student_dtype: The dtype of the student's weights.
        teacher: The facts about the teacher.
        teacher_dtype: The dtype of the teacher's weights.
        device: The device of the training.
        free: Number of bytes that are free on the device.
        num_parts: Number of devices among which the student's parameters are divided.
    """
    for_student = _COPIES_OF_A_STUDENT * student.num_parameters * student_dtype.itemsize // num_parts
    # Embedding and head together, which may share one weight: an upper bound of the head's size.
    outside = teacher.num_parameters - teacher.num_non_embedding_parameters
    copied = 0 if has_wide_products(torch.device(device)) else outside * torch.float32.itemsize
    for_teacher = teacher.num_parameters * teacher_dtype.itemsize + copied
    if for_student + for_teacher > free:
        raise MachineError(
            "teacher and student do not fit on the device together",
            where="train.targets: online",
            found=f"{free / 1e9:.1f} GB free on {device}",
            expected=f"{for_student / 1e9:.1f} GB for the student in training and {for_teacher / 1e9:.1f} GB for the "
            "teacher, and more for activations",
            fix="learn from the cache (targets: cache), which needs no teacher on the device",
        )
