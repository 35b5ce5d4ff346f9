"""What can be known of an evaluation before anything of a run is made."""

from __future__ import annotations

from capgap.schemas.run_file import RunFile


def require_measurable(run: RunFile) -> None:
    """Refuse drafts where what measures them is not installed.

    Raises:
        MachineError: vLLM is not installed, or not one that can be asked.
    """
    if run.eval.speculative is not None:
        # imported here: it brings torch
        from capgap.pipeline.eval.drafts import require_drafting

        require_drafting()
