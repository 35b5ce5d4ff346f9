"""Quantises a student by rounding alone; its training begins with the result."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from capgap.pipeline.models.checks import named
from capgap.pipeline.models.configs import empty_model, load_config
from capgap.pipeline.models.load import model_path
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.trainable import require_compressed_tensors, require_plain
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.pipeline.student.calibrate import hidden_states
from capgap.pipeline.student.calibration_text import CalibrationText
from capgap.pipeline.student.cut import pruned_config
from capgap.pipeline.student.shapes import llama_config, shape_of, target_shape, teacher_config
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_quantize import QuantizeSettings

SETTING = "student.quantize"
_ANY_VOCAB_SIZE = 8  # whether a layer supports a format depends only on its number of inputs


def require_quantisable(run: RunFile, inputs: Mapping[str, StageInput] | None = None) -> None:
    """Refuse a student that is quantised already or whose layers do not support the format; no weights are read.

    Args:
        run: The run file.
        inputs: The inputs of the student stage, if they are made already. A reused teacher is known only from them.

    Raises:
        InputError, SettingError: `layers_to_quantise` refuses the model, or the student at `student.path` is quantised
            already.
        MachineError: The package compressed-tensors is not installed.
    """
    student = run.student
    if student.path is not None:
        with named(f"student.path: {student.path}"):
            require_plain(load_config(student.path, student.trust_remote_code), student.path)
    if student.quantize is None:
        return
    require_compressed_tensors(SETTING)
    from capgap.pipeline.models.low_bit import layers_to_quantise

    model = _empty_student(run, inputs)
    if model is not None:
        layers_to_quantise(model, student.quantize)


def quantise(context: StageContext, model: PreTrainedModel, settings: QuantizeSettings) -> None:
    """Make the student compute with few bits; its stored weights keep their precision.

    Args:
        context: The context of the student stage.
        model: The student, on the CPU. It is changed in place.
        settings: The settings of the format.

    Raises:
        InputError, SettingError: The layers do not support the format, or the input of a layer is not finite.
        MachineError: The package compressed-tensors is not installed.
    """
    require_compressed_tensors(SETTING)
    from capgap.pipeline.models.low_bit import (
        layers_to_quantise,
        make_low_bit,
        make_low_bit_embedding,
        measure_input_scales,
        scheme_of,
    )

    names = layers_to_quantise(model, settings)
    scales = None
    if settings.needs_text:
        text = CalibrationText(RunText.among(context.inputs), settings.num_sequences, settings.batch_sequences)
        model.to(context.device)

        def look_at_text() -> None:
            for batch in text.batches():
                hidden_BLH = hidden_states(model, batch.to(context.device))
                if settings.head:
                    for hidden_LH in hidden_BLH:  # logits of one sequence at a time
                        model.get_output_embeddings()(hidden_LH)

        scales = measure_input_scales(model, names, look_at_text)
        model.to("cpu")
    make_low_bit(model, names, scheme_of(settings), scales)
    if settings.embedding:
        make_low_bit_embedding(model, scheme_of(settings, weights_alone=True))


def _empty_student(run: RunFile, inputs: Mapping[str, StageInput] | None) -> PreTrainedModel | None:
    """Return the student on the meta device, or None if it is pruned from a teacher that is not known yet."""
    student = run.student
    if student.model is not None:
        return empty_model(llama_config(student.model, _ANY_VOCAB_SIZE))
    if student.path is not None:
        return empty_model(load_config(student.path, student.trust_remote_code), student.trust_remote_code)
    assert student.prune is not None
    if inputs is not None and "teacher" in inputs:
        config = load_config(model_path(inputs["teacher"]))
    elif run.makes("teacher"):
        config = teacher_config(run.teacher, _ANY_VOCAB_SIZE)
    else:
        return None
    target = target_shape(shape_of(config, str(config.name_or_path)), student.prune)
    return empty_model(pruned_config(config, target, list(range(target.num_layers))))
