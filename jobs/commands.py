"""The commands `run` and `verify`, and the command of each stage: their flags, and the functions that run them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capgap.jobs.arguments import Parser, number, one_of, parse, parse_run, run_file_parser
from capgap.jobs.logs import log, log_format
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.events import set_stage
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.graph import downstream, instances, select
from capgap.pipeline.workflow.remake import LastCommand, is_named, require_named
from capgap.pipeline.workflow.state import RunStates, State
from capgap.schemas.errors import SettingError
from capgap.schemas.run_file import RunFile


def run_command(argv: Sequence[str]) -> int:
    """Run `capgap run`: make the stages of a run file current, then show the report's table."""
    started = time.monotonic()
    run, flags, given = parse_run(run_parser(), argv)
    command = LastCommand.of(given, ("capgap", "run", *argv))
    if flags["only"] and flags["from_stage"]:
        raise SettingError(
            "--only and --from exclude each other",
            found=f"--only {','.join(flags['only'])} --from {flags['from_stage']}",
            expected="one of them",
        )
    if flags["only"]:
        chosen = select(run, *(_names(flags["only"]) or [""]))
    elif flags["from_stage"]:
        chosen = downstream(run, flags["from_stage"])
    else:
        chosen = instances(run)
    made = _walk(run, chosen, flags, command)
    _show_table(run)
    wall_s = round(time.monotonic() - started, 1)
    if made:
        text = f"made {len(made)} of {len(chosen)} stages in {wall_s:.1f} s: {', '.join(made)}"
    else:
        text = f"nothing to do: {len(chosen)} of {len(chosen)} stages are current ({wall_s:.1f} s)"
    log("run_done", text, made=made, num_stages=len(chosen), wall_s=wall_s)
    if (look := where_to_look(run)) is not None:
        log("next", look[1], path=str(look[0]))
    return 0


def run_parser() -> Parser:
    """Return the parser of `capgap run`."""
    parser = run_file_parser("capgap run", "Make every stage of a run file current.")
    parser.add_argument(
        "--only",
        metavar="STAGE",
        action="append",
        default=[],
        help="Make only this stage, e.g. train or train/distilled/seed-0. For several, use commas or repeat the flag.",
    )
    parser.add_argument("--from", metavar="STAGE", dest="from_stage", help="Make this stage and all that depend on it.")
    _add_walk_flags(parser)
    return parser


def remade(flags: dict[str, Any]) -> frozenset[str]:
    """Return the names that `--remake` gives, or one empty text if it is given without a name."""
    return frozenset(_names(flags["remake"]) or ([""] if flags["remake"] else []))


def _names(given: Sequence[str]) -> list[str]:
    return [name.strip() for one in given for name in one.split(",") if name.strip()]


def _is_remade(instance: Instance, flags: dict[str, Any]) -> bool:
    """Return whether `--force` or `--remake` asks to make the command's only instance again.

    Raises:
        SettingError: `--remake` names another instance.
    """
    names = remade(flags)
    require_named(names, [instance])
    return flags["force"] or is_named(instance, names)


def stage_command(stage: str) -> Callable[[Sequence[str]], int]:
    """Return the command of a stage, such as `capgap cache`. A single instance is made in this process."""

    def command(argv: Sequence[str]) -> int:
        run, flags, given = parse_run(stage_parser(stage), argv)
        chosen = select(run, flags["instance"])
        if chosen[0].stage != stage:
            raise SettingError(
                "not an instance of this stage", where="--instance", found=chosen[0].name, expected=stage
            )
        if len(chosen) == 1:
            set_stage(chosen[0].name)
        if flags.get("slice") is not None:
            _make_slice(run, chosen[0], flags)
        elif len(chosen) > 1:
            _walk(run, chosen, flags, LastCommand.of(given, ("capgap", stage, *argv)))
        else:
            from capgap.pipeline.workflow.together import carry_out_on_devices

            carry_out_on_devices(run, chosen[0], remake=_is_remade(chosen[0], flags), wait=not flags["no_wait"])
        return 0

    return command


def stage_parser(stage: str) -> Parser:
    """Return the parser of a stage's own command."""
    declared = stage_named(stage)
    parser = run_file_parser(f"capgap {stage}", f"{declared.help.capitalize()}: one stage.", (declared.section,))
    parser.add_argument("--instance", default=stage, help="Make only this instance, e.g. train/distilled/seed-0.")
    _add_walk_flags(parser)
    if declared.is_sliced:
        parser.add_argument(
            "--slice",
            type=str,
            default=None,
            help="Share of the units to make: i/n for units i, i + n, i + 2n and so on (from 0), or any for free ones.",
        )
    return parser


def _make_slice(run: RunFile, instance: Instance, flags: dict[str, Any]) -> None:
    if _is_remade(instance, flags):
        flag = "--force" if flags["force"] else "--remake"
        raise SettingError(
            f"{flag} and --slice exclude each other: each slice would undo what the others made",
            where=flag,
            found=f"--slice {flags['slice']}",
            expected="one of them",
            fix=f"delete {Path(run.out) / instance.name} to start over",
        )
    from capgap.pipeline.stage.context import Slice
    from capgap.pipeline.workflow.slices import carry_out_slice

    carry_out_slice(run, instance, Slice.parse(flags["slice"]), wait=not flags["no_wait"])


def verify_command(argv: Sequence[str]) -> int:
    """Run `capgap verify`: check all files of finished stages below the folders; with --rescore, score caches again."""
    flags = parse(verify_parser(), list(argv))
    fraction = flags["rescore"]
    if fraction is None and flags["teacher"] is not None:
        raise SettingError(
            "is for --rescore",
            where="--teacher",
            found=flags["teacher"],
            expected="--rescore FRACTION beside it",
            fix="give both, or neither",
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise SettingError("not a share", where="--rescore", found=fraction, expected="a number above 0, at most 1")
    from capgap.pipeline.verify.verify import verify

    for folder in flags["folders"]:
        for line in verify(Path(folder), flags["quarantine"]):
            log("verified", line)
    if fraction is not None:
        from capgap.pipeline.verify.rescore import rescore

        for folder in flags["folders"]:
            for line in rescore(
                Path(folder),
                fraction,
                teacher=flags["teacher"],
                device=flags["device"],
                wait=not flags["no_wait"],
                trust_remote_code=flags["trust_remote_code"],
                engine=flags["engine"],
                dtype=flags["dtype"],
            ):
                log("rescored", line)
    return 0


def verify_parser() -> Parser:
    """Return the parser of `capgap verify`."""
    parser = Parser("capgap verify", "Check finished stages against their manifests, and caches against their teacher.")
    parser.add_argument("folders", nargs="+", type=str, help="Folder of a run or of a stage.")
    parser.add_argument("--quarantine", action="store_true", help="List damaged shards, so that only they are remade.")
    parser.add_argument(
        "--rescore", type=number, default=None, help="Share of a cache's sequences to score again; at least eight."
    )
    parser.add_argument(
        "--teacher",
        type=str,
        default=None,
        help="Folder, id or server of the teacher, if it has moved since.",
    )
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", help="Where to score again.")
    engines, dtypes = one_of("vllm", "transformers"), one_of("float32", "bfloat16", "float16")
    parser.add_argument("--engine", type=engines, default=None, help="Engine that scores again; default the cache's.")
    parser.add_argument("--dtype", type=dtypes, default=None, help="Dtype of that engine; default the cache's.")
    parser.add_argument("--no-wait", action="store_true", help="Stop if a stage holds the device.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the teacher.")
    return parser


def _add_walk_flags(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="Make stages again even if they are current.")
    parser.add_argument(
        "--remake",
        metavar="STAGE",
        action="append",
        default=[],
        help="Make this stage again and replace its result. For several, use commas or repeat the flag.",
    )
    parser.add_argument("--no-wait", action="store_true", help="Stop if another stage holds the device.")


def _walk(run: RunFile, chosen: Sequence[Instance], flags: dict[str, Any], command: LastCommand) -> list[str]:
    from capgap.pipeline.plan.room import require_disk_space
    from capgap.pipeline.stage.ranks import ranks_in_environment
    from capgap.pipeline.workflow.driver import walk

    # every process that torchrun starts walks the stages, but only the first one prints
    ranks = ranks_in_environment()
    silent = ranks is not None and not ranks.is_first

    def checked(name: str, why: str) -> None:
        if not silent:
            log("stage_checked", f"{name}: {why}", instance=name, why=why)

    return walk(
        run,
        chosen,
        log=checked,
        remake=remade(flags),
        force=flags["force"],
        wait=not flags["no_wait"],
        command=command,
        require=require_disk_space,
    )


def where_to_look(run: RunFile) -> tuple[Path, str] | None:
    """Return the result that a user should look at next, and the last line of the run, which points to it.

    If the report is not current, the line says so. None if there is nothing to look at yet.
    """
    out = Path(run.out)
    page, trained, cache = out / "report" / "report.html", out / "train", out / "cache"
    if run.makes("eval") and page.is_file():
        report = RunStates(run).of("report")
        if report.state is not State.CURRENT:
            return page, f"look next: {page} shows earlier results ({report.why}); `capgap run` makes it again"
        return page, f"look next: {page}, in a browser; every figure is in {out / 'eval' / 'results.json'}"
    if run.makes("train") and trained.is_dir():
        return out, f"look next: tensorboard --logdir {out}; the students are below {trained}"
    if run.makes("cache") and cache.is_dir():
        return cache, f"look next: capgap fidelity {cache}, for what the cache keeps"
    return None


def _show_table(run: RunFile) -> None:
    if not run.makes("eval"):
        return
    report = RunStates(run).of("report")
    if report.state is State.CURRENT:
        if log_format() == "text":
            from capgap.jobs.tables import ResultConsole
            from capgap.pipeline.report.table import print_table

            print_table(report.folder, ResultConsole())
        log("report", f"report: {report.folder / 'report.html'}", page=str(report.folder / "report.html"))
