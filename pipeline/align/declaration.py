"""What the rest of the pipeline knows of the align stage."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import once
from capgap.pipeline.stage.sources import model_files
from capgap.schemas.run_file import RunFile

# the tokenizer may be given as a model's folder, whose weights do not decide the result
_WEIGHTS = {".safetensors", ".bin"}


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    assert run.align is not None
    return [file for file in model_files(run.align.tokenizer) if file.suffix not in _WEIGHTS]


STAGE = Stage(
    name="align",
    help="turn the cache into one for students of another tokenizer",
    code="capgap.pipeline.align.stage",
    section="align",
    instances=lambda run: once("align", "align", run),
    inputs=lambda run, instance: ["cache"],
    settings=lambda run, instance: {"align": {} if run.align is None else run.align.decisive()},
    sources=_sources,
    is_sliced=True,
    preflight="capgap.pipeline.align.preflight:require_tokenizer",
)
