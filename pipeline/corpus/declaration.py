"""What the rest of the pipeline knows of the corpus stage."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import once
from capgap.pipeline.stage.sources import model_files
from capgap.schemas.run_file import RunFile


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    # imported here: a command that only reads manifests does not need the Parquet reader
    from capgap.pipeline.corpus.files import local_files

    extend = run.corpus.extend_vocabulary
    further = () if extend is None or extend.sources is None else extend.sources
    files = dict.fromkeys([*local_files(run.corpus.paths), *(local_files(further) if further else ())])
    return [*files, *model_files(run.corpus.tokenizer)]


STAGE = Stage(
    name="corpus",
    help="turn text into packed sequences of tokens",
    code="capgap.pipeline.corpus.stage",
    section="corpus",
    instances=lambda run: once("corpus", "corpus", run),
    inputs=lambda run, instance: [],
    settings=lambda run, instance: {"corpus": run.corpus.decisive()},
    sources=_sources,
    is_sliced=True,
    preflight="capgap.pipeline.models.preflight:require_text",
)
