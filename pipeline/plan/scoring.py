"""The passes over text that score how important a teacher's parts are before it is pruned."""

from __future__ import annotations

from capgap.pipeline.plan.rates import Stated, earlier_wall_s
from capgap.pipeline.plan.work import RunWork
from capgap.pipeline.student.shapes import shape_of, teacher_config
from capgap.schemas.errors import CapgapError
from capgap.schemas.plan import Figure
from capgap.schemas.run_file import RunFile

# A forward pass takes 2 operations per parameter and token, and so does a backward pass without weight gradients.
_FORWARD, _BACKWARD = 2, 2


def scoring_of(work: RunWork) -> tuple[Figure, float | None]:
    """Return the tokens of the scoring passes of one student stage, and their operations.

    They are zero and None for a student that is not pruned. The evaluation of the pruned model on 64 held-out sequences
    is not counted.
    """
    settings, text = work.run.student.prune, work.split_tokens["student"]
    if settings is None:
        return Figure(value=0, source="no teacher is scored"), None
    if text.value is None:
        return text, None
    seq_len = work.run.corpus.seq_len
    once = min(settings.num_sequences, text.value // seq_len) * seq_len
    passes = 1
    if settings.layer_importance == "loss":
        try:
            # only the number of layers is needed, which does not depend on the vocabulary
            passes += 1 + shape_of(teacher_config(work.run.teacher, work.vocab_size or 1), "teacher").num_layers
        except CapgapError as error:
            return Figure(value=None, source=f"cannot be counted: {error}"), None
    tokens = Figure(value=once * passes, source=f"{passes} passes over {settings.num_sequences} sequences at most")
    if work.teacher.total is None:
        return tokens, None
    each = _FORWARD * passes + (_BACKWARD if settings.importance == "taylor" else 0)
    return tokens, each * work.teacher.total * once


def scoring_hours(run: RunFile, operations: float | None, stated: Stated) -> Figure:
    """Return the device hours of one student stage.

    They are those of an earlier stage with the same teacher and student settings, else computed from a stated peak.
    """
    earlier = earlier_wall_s("student", run, stated.like)
    if earlier is not None:
        return earlier.model_copy(update={"value": (earlier.value or 0) / 3600})
    if operations is None:
        return Figure(value=None, source="model or text cannot be counted")
    if stated.device_peak_tflops is None or stated.mfu is None:
        return Figure(value=None, source="give --like RUN, or --device-peak-tflops and --mfu")
    per_s = stated.device_peak_tflops * 1e12 * stated.mfu
    source = f"{operations:.3g} operations at {stated.mfu:g} of {stated.device_peak_tflops:g} TFLOP/s"
    return Figure(value=operations / per_s / 3600, source=source)
