"""Folders of stages that were never run, finished as if they had been."""

from __future__ import annotations

from capgap.pipeline.stage.folder import begin, content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.workflow.state import StageState, states
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile


def finish_folder(run: RunFile, name: str, text: str = "result", file: str = "result.txt") -> Manifest:
    """Finish an instance's folder with one file of the given text, as `carry_out` would."""
    state: StageState = states(run)[name]
    state.folder.mkdir(parents=True, exist_ok=True)
    begin(state.folder, state.order)
    (state.folder / file).write_text(text)
    files = content_files(state.folder)
    manifest = Manifest(
        **state.order.model_dump(),
        content=content_of(files),
        files=files,
        versions={},
        started="2026-01-01T00:00:00+00:00",
        wall_s=0.0,
        command=(),
    )
    return finish(state.folder, manifest)
