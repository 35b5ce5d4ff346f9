"""The page's table and chart of rounds: each round's text, and how much nearer to the teacher its training brought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from capgap.pipeline.pages.charts import Chart, legend
from capgap.pipeline.pages.svg import draw
from capgap.pipeline.report.charts import arm_look
from capgap.pipeline.report.round_staleness import staleness
from capgap.pipeline.report.summary import RoundLine
from capgap.pipeline.stage.context import FINAL, Instance, StageContext, StageInput
from capgap.pipeline.stage.rounds import cache_of, rounds_of, text_of, writer_of
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.train.model_card import heldout_figures
from capgap.schemas.run_file import RunFile

HEADINGS = (
    "arm",
    "seed",
    "round",
    "writer",
    "answers",
    "tokens an answer",
    "cut off",
    "repeated",
    "entropy, nats/token",
    "KL to the teacher on own text",
    "right",
    "teacher tokens so far",
    "KL after - before",
    "student / writer, 5 to 95 %",
    "effective samples",
)

NOTE = (
    "Each line shows the text of one round and the student that was trained on it. Entropy: the mean of minus the "
    "writer's logprob of its tokens. Repeated: the share of an answer's runs of four tokens that occur earlier in the "
    "same answer. KL to the teacher on own text: the mean of the writer's logprob minus the teacher's, nats/token; for "
    "a text that the teacher wrote it is 0 but for rounding. Right: the share of held-out answers that equal their "
    "reference. Teacher tokens: the tokens that the teacher wrote or scored for this arm so far. KL after - before: by "
    "how much the round's training changed the student's KL to the teacher on the text's held-out answers; a negative "
    "number means that the student came nearer. Student / writer: the ratio of the trained student's probability of a "
    "token to that of the student that wrote it, on held-out answers. Effective samples: how many samples of the "
    "trained student's own these answers are worth, as a share, (sum of ratios)^2 / (N sum of squares). The last line "
    "of an arm shows what the final student writes."
)


def round_lines(context: StageContext) -> tuple[RoundLine, ...]:
    """Collect the facts of every round of every arm and seed; empty where the run has no rounds."""
    run = context.run
    if run.rounds is None:
        return ()
    by_instance = {made.manifest.instance: made for made in context.inputs.values()}
    lines = []
    for seed in run.seeds:
        for arm in run.arms:
            lines += _lines_of(run, arm, seed, by_instance)
    return tuple(lines)


def round_rows(lines: tuple[RoundLine, ...]) -> list[tuple[str, ...]]:
    """Format the rounds as rows of the table, one text for each of `HEADINGS`."""
    return [
        (
            line.arm,
            str(line.seed),
            str(line.round) if line.is_trained else "after",
            line.writer,
            f"{line.num_answers:,}",
            f"{line.mean_tokens:.1f}",
            _percent(line.cut_off),
            _percent(line.repetition),
            f"{line.entropy:.3f}",
            "-" if line.writer_kl is None else f"{line.writer_kl:.4f}",
            "-" if line.right is None else _percent(line.right),
            f"{line.teacher_tokens:,}",
            "-" if line.learnt is None else f"{line.learnt:+.4f}",
            "-" if not line.staleness else f"{line.staleness['ratio_p5']:.2f} to {line.staleness['ratio_p95']:.2f}",
            "-" if not line.staleness else _percent(line.staleness["ratio_effective"]),
        )
        for line in lines
    ]


def round_charts(lines: tuple[RoundLine, ...], arms: tuple[str, ...]) -> tuple[Chart, ...]:
    """Draw the quality of each student by round and by teacher tokens.

    Quality is the share of right answers where the prompts have references, and the KL to the teacher elsewhere.
    """
    graded = any(line.right is not None for line in lines)
    values = {
        (line.arm, line.seed, line.round): 100 * line.right if graded and line.right is not None else line.writer_kl
        for line in lines
        if line.writer == "student"
    }
    shown = [line for line in lines if values.get((line.arm, line.seed, line.round)) is not None]
    if not shown:
        return ()
    quality = "right held-out answers, %" if graded else "KL to the teacher on own text, nats/token"

    def paint(figure: Figure) -> None:
        by_round, by_tokens = figure.subplots(1, 2, sharey=True)
        labelled: set[str] = set()
        for arm, seed in dict.fromkeys((line.arm, line.seed) for line in shown):
            own = [line for line in shown if (line.arm, line.seed) == (arm, seed)]
            heights = [values[(line.arm, line.seed, line.round)] for line in own]
            label = None if arm in labelled else arm
            labelled.add(arm)
            look: dict[str, Any] = {"markersize": 3, "linewidth": 1.2, **arm_look(arm, arms)}
            by_round.plot([line.round for line in own], heights, label=label, **look)
            # without this round's tokens: its text was written by a student that had not learned from them yet
            by_tokens.plot([line.teacher_tokens_before for line in own], heights, **look)
        by_round.set_xlabel("rounds learnt from")
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_round.set_ylabel(quality)
        by_tokens.set_xlabel("teacher tokens")
        by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))
        legend(figure, by_round)

    return (
        Chart(
            name="rounds",
            title="Students by round",
            caption="Quality of what each student writes, by the rounds that it learned from and by the tokens that "
            "the teacher wrote or scored for it. Seeds of an arm share its colour.",
            svg=draw("rounds", f"{quality} by round and by teacher tokens", 3.5, paint),
            headings=("arm", "seed", "rounds learnt from", "teacher tokens", quality),
            rows=tuple(
                (
                    line.arm,
                    str(line.seed),
                    str(line.round),
                    f"{line.teacher_tokens_before:,}",
                    f"{values[(line.arm, line.seed, line.round)]:.4g}",
                )
                for line in shown
            ),
        ),
    )


def _lines_of(run: RunFile, arm: str, seed: int, made: Mapping[str, StageInput]) -> list[RoundLine]:
    lines: list[RoundLine] = []
    spent = 0
    for number in range(rounds_of(run).num + 1):
        is_trained = number < rounds_of(run).num
        text = text_of(run, arm, seed, number) if is_trained else Instance("generate", arm, seed, FINAL)
        if text.name not in made:
            continue
        totals = made[text.name].manifest.totals
        begin = "" if "answers" in totals else "heldout_"
        cache = made[cache_of(text).name].manifest.totals if is_trained else {}
        before, spent = spent, spent + _teacher_tokens(run, arm, text, totals, cache)
        answers, right = _number(totals[f"{begin}answers"]), totals.get("heldout_right")
        graded = totals.get("heldout_graded")
        kl, training = cache.get("writer_kl"), made.get(Instance("train", arm, seed, number).name)
        lines.append(
            RoundLine(
                arm=arm,
                seed=seed,
                round=number,
                is_trained=is_trained,
                writer=writer_of(text),
                num_answers=int(answers),
                mean_tokens=_number(totals[f"{begin}answer_tokens"]) / answers,
                cut_off=_number(totals[f"{begin}cut_off"]) / answers,
                repetition=_number(totals[f"{begin}repetition"]),
                entropy=-_number(totals[f"{begin}mean_logprob"]),
                writer_kl=kl if isinstance(kl, float) else None,
                right=None if not graded else _number(right) / _number(graded),
                teacher_tokens_before=before,
                teacher_tokens=spent,
                learnt=_learnt(training),
                staleness=None if training is None else staleness(training.path),
            )
        )
    return lines


def _teacher_tokens(run: RunFile, arm: str, text: Instance, totals: Mapping[str, Any], cache: Mapping[str, Any]) -> int:
    """Return the number of tokens that the teacher wrote in this round, or scored for an arm that uses its targets."""
    written = _number(totals.get("answer_tokens", 0)) if writer_of(text) == "teacher" else 0
    scored = _number(cache.get("num_tokens", 0)) if run.train_settings(arm).largest_alpha > 0 else 0
    return int(written + scored)


def _learnt(training: StageInput | None) -> float | None:
    """Return the distance to the teacher after a training minus the distance before it, nats/token; None if unknown."""
    if training is None:
        return None
    last = heldout_figures(training.path / METRICS_NAME)
    for name in ("heldout_kl", "heldout_teacher_ce"):
        first = training.manifest.totals.get(f"first_{name}")
        if isinstance(first, float) and name in last:
            return last[name] - first
    return None


def _number(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
