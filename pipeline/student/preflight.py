"""Checks a run's student before any stage of the run begins."""

from __future__ import annotations

from capgap.pipeline.models.preflight import require_student as require_given_student
from capgap.schemas.run_file import RunFile


def require_student(run: RunFile) -> None:
    """Refuse a given student that does not fit or is quantised already, and a format that its layers do not support."""
    require_given_student(run)
    if run.student.path is not None or run.student.quantize is not None:
        # imported here because it imports torch
        from capgap.pipeline.student.quantise import require_quantisable

        require_quantisable(run)
