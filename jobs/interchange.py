"""`capgap import` and `capgap export`: make a cache of another program's captures, and write a cache as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capgap.jobs.arguments import Parser, one_of, parse, parse_settings
from capgap.jobs.logs import log
from capgap.pipeline.stage.events import set_stage
from capgap.schemas.interchange import ImportSettings


def import_command(argv: Sequence[str]) -> int:
    """Run `capgap import`: make a corpus and a cache of another program's captures."""
    settings, flags, _ = parse_settings(import_parser(), argv, ImportSettings)
    set_stage("import")
    from capgap.pipeline.interchange.importing import import_captures

    made = import_captures(settings, flags["force"])
    folders = {"corpus": made.corpus, "teacher": made.teacher, "cache": made.cache}
    paths = {name: str(at.location) for name, at in folders.items() if at is not None}
    lines = "\n".join(f"  {name}: {path}" for name, path in paths.items())
    log("imported", f"to train from it, write into a run file:\nreuse:\n{lines}", **paths)
    return 0


def import_parser() -> Parser:
    """Return the parser of `capgap import`."""
    parser = Parser(
        prog="capgap import",
        description="Make a corpus and a cache of captures in Parquet; docs/interchange.md says what they must hold.",
        record=ImportSettings,
        sections=("import",),
    )
    parser.add_argument("sources", nargs="+", type=str, help="Parquet files, folders or globs.")
    parser.add_argument("--heldout", nargs="+", type=str, default=(), help="Files, folders or globs of held-out text.")
    parser.add_argument("--force", action="store_true", help="Make the folders again, replacing what they hold.")
    return parser


def export_command(argv: Sequence[str]) -> int:
    """Run `capgap export`: write a cache as Parquet."""
    flags = parse(export_parser(), list(argv))
    from capgap.pipeline.interchange.export import export_cache

    made = export_cache(flags["cache"], Path(flags["to"]), tuple(flags["recording"] or ()))
    log(
        "exported",
        f"export: {made.num_files} files, {made.num_bytes:,} bytes, in {made.folder}"
        + (f"; {made.num_kept_files} of them were finished before" if made.num_kept_files else ""),
        folder=str(made.folder),
        num_files=made.num_files,
        num_kept_files=made.num_kept_files,
        num_bytes=made.num_bytes,
    )
    return 0


def export_parser() -> Parser:
    """Return the parser of `capgap export`."""
    parser = Parser(
        prog="capgap export",
        description="Write a finished cache as Parquet, one file per shard; docs/interchange.md lists the columns.",
    )
    parser.add_argument("cache", type=str, help="Folder or URL of a finished cache.")
    parser.add_argument("--to", type=str, required=True, help="Folder for the files. Finished files are kept.")
    parser.add_argument(
        "--recording",
        type=one_of("sampled", "topk"),
        nargs="+",
        default=None,
        help="Recordings of the cache to write. Left out, all.",
    )
    return parser
