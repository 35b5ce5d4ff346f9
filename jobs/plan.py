"""`capgap plan`: estimates what a run will take, before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from capgap.jobs.arguments import Parser, number, parse_run, run_file_parser
from capgap.jobs.logs import log, log_format
from capgap.schemas.amounts import bytes_text
from capgap.schemas.errors import SettingError
from capgap.schemas.plan import Figure, RunPlan

if TYPE_CHECKING:
    from capgap.pipeline.plan import Stated


def plan_command(argv: Sequence[str]) -> int:
    """Run `capgap plan`: print a table, or JSON. No stage is run; `--calibrate` first measures the rates of stages."""
    from capgap.pipeline.plan import make_plan

    run, flags, _ = parse_run(plan_parser(), argv)
    online_rate, text_bytes_per_token = (
        positive(flags, name) for name in ("online_teacher_tokens_per_s", "text_bytes_per_token")
    )
    stated = replace(stated_speed(flags), online_teacher_tokens_per_s=online_rate)
    if flags["calibrate"]:
        from capgap.pipeline.plan.calibrate import calibrate

        calibrate(run, stated, text_bytes_per_token=text_bytes_per_token)
    plan = make_plan(run, stated, text_bytes_per_token=text_bytes_per_token)
    if flags["json"]:
        print(plan.model_dump_json(indent=2))
    elif log_format() == "json":
        log("plan", f"plan of {run.name}", **plan.model_dump(mode="json"))
    else:
        _show(plan)
    return 0


def plan_parser() -> Parser:
    """Return the parser of `capgap plan`."""
    parser = run_file_parser("capgap plan", "Estimate what a run will take, before anything is made.")
    parser.add_argument("--json", action="store_true", help="Print the plan as one JSON object.")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="Measure unknown rates for about a minute, and keep them as calibration.json in the run's folder.",
    )
    parser.add_argument(
        "--online-teacher-tokens-per-s",
        type=number,
        default=None,
        help="Rate of a teacher that scores beside a student in training. Left out, the cache's rate.",
    )
    parser.add_argument(
        "--text-bytes-per-token",
        type=number,
        default=None,
        help="Bytes of text per token. Left out, it is measured on the text.",
    )
    add_speed_flags(parser)
    return parser


def add_speed_flags(parser: Parser) -> None:
    """Add the flags by which the user states how fast a stage is; `stated_speed` reads them."""
    for flag, help_text in (
        ("--teacher-tokens-per-s", "Rate at which one engine scores, if no earlier run has measured it."),
        (
            "--train-tokens-per-s",
            "Rate of one student's training on all its devices, if no earlier run measured it.",
        ),
        ("--device-peak-tflops", "Peak of one device, in 10^12 operations per second; with --mfu."),
        ("--mfu", "Share of that peak that is used; with --device-peak-tflops."),
    ):
        parser.add_argument(flag, type=number, default=None, help=help_text)
    parser.add_argument(
        "--like", type=str, action="append", default=None, help="A finished run whose rates are used; may be repeated."
    )


def stated_speed(flags: dict[str, Any]) -> Stated:
    """Return the speeds that the flags state.

    Raises:
        SettingError: a rate is not a number above 0, or only one of `--device-peak-tflops` and `--mfu` is given.
        InputError: a folder of `--like` has no rates.
    """
    from capgap.pipeline.plan.rates import Stated, require_rates

    require_rates(flags["like"] or ())
    peak, mfu = positive(flags, "device_peak_tflops"), positive(flags, "mfu")
    if (peak is None) != (mfu is None):
        raise SettingError(
            "--device-peak-tflops and --mfu belong together",
            found="--mfu alone" if peak is None else "--device-peak-tflops alone",
            expected="both",
        )
    if mfu is not None and mfu > 1:
        raise SettingError("not a share", where="--mfu", found=mfu, expected="a number above 0, at most 1")
    return Stated(
        teacher_tokens_per_s=positive(flags, "teacher_tokens_per_s"),
        train_tokens_per_s=positive(flags, "train_tokens_per_s"),
        device_peak_tflops=peak,
        mfu=mfu,
        like=tuple(flags["like"] or ()),
    )


def positive(flags: dict[str, Any], name: str) -> float | None:
    """Return the value of a flag, None if it is not given.

    Raises:
        SettingError: the value is not a finite number above 0.
    """
    value: float | None = flags[name]
    if value is not None and not 0 < value < float("inf"):
        raise SettingError("not a rate", where=f"--{name.replace('_', '-')}", found=value, expected="a number above 0")
    return value


def _show(plan: RunPlan) -> None:
    from rich.table import Table

    from capgap.jobs.tables import print_wide

    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "tokens", "disk", "scratch", "tokens/s", "device hours"):
        table.add_column(title, justify="left" if title in ("stage", "state") else "right")
    for stage in plan.stages:
        table.add_row(
            stage.instance,
            stage.state,
            count_text(stage.tokens),
            size_text(stage.disk_bytes),
            size_text(stage.scratch_bytes),
            "-" if stage.tokens_per_s.value is None else f"{stage.tokens_per_s.value:,.0f}",
            "?" if stage.device_hours.value is None else f"{stage.device_hours.value:,.2f}",
        )
    print_wide(table)
    for line in _lines(plan):
        print(line)


def _lines(plan: RunPlan) -> list[str]:
    needed, free = plan.needed_bytes, plan.free_bytes
    lines = [
        f"teacher: {_parameters(plan.teacher_parameters)}; student: {_parameters(plan.student_parameters)}",
        f"disk: {size_text(needed)} needed ({needed.source}), {bytes_text(free)} free"
        + ("" if needed.value is None or needed.value <= free else ": NOT ENOUGH"),
        f"device hours: {'?' if plan.device_hours.value is None else f'{plan.device_hours.value:,.2f}'} "
        f"({plan.device_hours.source})",
    ]
    for name, figures in (
        ("tokens", [(s.instance, s.tokens) for s in plan.stages]),
        ("disk", [(s.instance, s.disk_bytes) for s in plan.stages if s.disk_bytes.value != 0]),
        ("hours", [(s.instance, s.device_hours) for s in plan.stages if s.device_hours.value != 0]),
    ):
        by_source: dict[str, list[str]] = {}
        for instance, figure in figures:
            by_source.setdefault(figure.source, []).append(instance)
        lines += [
            f"  {name} of {', '.join(instances)}: {source}"
            for source, instances in by_source.items()
            if source != "none"
        ]
    lines.append(f"students of the cache in this run: {plan.num_students}")
    lines.append("a cache costs less than running the teacher beside each student:")
    for even in plan.break_even:
        least = "from an unknown number on" if even.num_students is None else f"from {even.num_students} students on"
        lines.append(f"  counted in {even.accounting}: {least} ({even.source})")
    lines.append("published laws, which disagree with each other; `capgap plan` only repeats them:")
    for law in plan.laws:
        lines += [f"  {law.sentence}", f"    {law.source}; measured on: {law.validity}"]
    if not plan.laws:
        lines.append("  they need the student's size and the number of its training tokens")
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def count_text(figure: Figure) -> str:
    """Return a count as text, `?` if it is not known."""
    return "?" if figure.value is None else f"{figure.value:,.0f}"


def size_text(figure: Figure) -> str:
    """Return a number of bytes as text with a unit, `?` if it is not known."""
    if figure.value is None:
        return "?"
    return bytes_text(figure.value) if figure.value else "-"


def _parameters(figure: Figure) -> str:
    return f"{'?' if figure.value is None else f'{figure.value / 1e6:,.2f}M parameters'} ({figure.source})"
