"""What can be known of a run's student before anything of it is made."""

from __future__ import annotations

from capgap.pipeline.models.preflight import require_student as require_given_student
from capgap.schemas.run_file import RunFile


def require_student(run: RunFile) -> None:
    """Refuse a given student that does not fit, one that is quantised already, and a format that it cannot take."""
    require_given_student(run)
    if run.student.path is not None or run.student.quantize is not None:
        # imported here: it brings torch
        from capgap.pipeline.student.quantise import require_quantisable

        require_quantisable(run)
