"""Files outside the run: which a stage reads, what they were, and whether they are still the same."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import SourceEntry
from capgap.schemas.run_file import RunFile

_MODEL_SUFFIXES = {".safetensors", ".json", ".bin", ".model", ".txt", ".jinja"}


def source_paths(run: RunFile, instance: Instance) -> list[Path]:
    """The files outside the run that the instance reads; none for a Hugging Face id and for builtin text.

    Raises:
        InputError: a source of the corpus, or the file of questions, does not exist.
    """
    match instance.stage:
        case "corpus":
            # imported here: reading Parquet needs more than the state of a run does
            from capgap.pipeline.corpus.files import list_files

            extend = run.corpus.extend_vocabulary
            further = () if extend is None or extend.sources is None else extend.sources
            files = dict.fromkeys([*list_files(run.corpus.sources), *(list_files(further) if further else ())])
            return [*files, *_model_files(run.corpus.tokenizer)]
        case "teacher":
            return _model_files(run.teacher.path)
        case "student":
            return _model_files(run.student.path)
        case "benchmark" if run.benchmarks is not None and run.benchmarks.include_path is not None:
            # imported here, as above
            from capgap.pipeline.benchmark.own_tasks import task_files

            return task_files(Path(run.benchmarks.include_path))
        case "answers":
            return _questions_file(run)
        case "tune" if run.tune is not None:
            from capgap.pipeline.tune.data import chat_files

            template = Path(run.tune.chat_template or "")
            chats = chat_files(run.tune) if run.tune.sources else []
            return [*chats, *([template] if template.is_file() else []), *_model_files(run.tune.path)]
        case _:
            return []


def changed_source(run: RunFile, instance: Instance, recorded: tuple[SourceEntry, ...]) -> str:
    """The first file that is new, gone or another than it was, in words; empty where none is.

    Sources that are gone altogether are no change: a finished corpus may outlive the text that it was made from.
    """
    try:
        now = {str(path): path for path in source_paths(run, instance)}
    except InputError:
        return ""
    then = {entry.path: entry for entry in recorded}
    if not now:
        return ""
    for path in sorted(now.keys() ^ then.keys()):
        return f"source {path} is {'new' if path in now else 'gone'}"
    for path, entry in then.items():
        found = now[path].stat()
        if found.st_size == entry.num_bytes and found.st_mtime_ns == entry.modified_ns:
            continue
        if found.st_size != entry.num_bytes or sha256_of(now[path]) != entry.sha256:
            return f"source {path} changed"
    return ""


def _model_files(path: str | None) -> list[Path]:
    folder = Path(path) if path else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _MODEL_SUFFIXES)


def _questions_file(run: RunFile) -> list[Path]:
    """Capgap's own are none: a digest of them is among the settings."""
    if run.judge is None or run.judge.questions is None:
        return []
    path = Path(run.judge.questions)
    if not path.is_file():
        raise InputError("no such file", where=f"judge.questions: {path}", expected="questions as JSONL")
    return [path]
