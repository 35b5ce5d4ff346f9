"""What can be checked of an evaluation before a run makes anything."""

from __future__ import annotations

from capgap.schemas.run_file import RunFile


def require_measurable(run: RunFile) -> None:
    """Refuse `eval.speculative` where vLLM is not installed.

    Raises:
        MachineError: vLLM is not installed.
    """
    if run.eval.speculative is not None:
        # imported here, because it imports torch
        from capgap.pipeline.eval.drafts import require_drafting

        require_drafting()
