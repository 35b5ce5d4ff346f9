"""Facts on quantised students: their size on disk, and how much of the loss from rounding their training wins back."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from capgap.pipeline.report.summary import LowBit, WonBack
from capgap.pipeline.stage.context import Instance, StageContext
from capgap.schemas.results import EvalResults, ModelResult
from capgap.schemas.run_file import RunFile


def low_bit(context: StageContext, results: EvalResults) -> LowBit | None:
    """Return the facts on quantised students; None where the students are not quantised."""
    run, settings = context.run, context.run.student.quantize
    students = [model for model in results.models if model.arm is not None]
    if settings is None or not students:
        return None
    ends = [name for name in ("head", "embedding") if getattr(settings, name)]
    rounded = _rounded(run)
    return LowBit(
        format=settings.format,
        layers=" and ".join(["linear layers", *ends]),
        bits_per_weight=settings.bits_per_weight,
        num_bytes=_num_bytes(context, students[0]),
        num_bytes_in_16_bits=2 * students[0].num_parameters,
        baseline=rounded,
        won_back=() if rounded is None else tuple(_won_back(results, rounded)),
    )


def low_bit_lines(found: LowBit | None) -> tuple[str, ...]:
    """Return the lines on quantised students below the final table; none where `found` is None."""
    if found is None:
        return ()
    size = (
        f"students in {found.format}: {found.bits_per_weight:g} bits a weight in {found.layers}; the weights that are "
        f"served take {found.num_bytes / 1e6:,.1f} MB, and {found.num_bytes_in_16_bits / 1e6:,.1f} MB in 16 bits"
    )
    if not found.won_back:
        return (size,)
    shares = (f"{one.arm} {_percent(one.loss)} of the loss, {_percent(one.kl)} of the KL" for one in found.won_back)
    return size, f"won back of the gap between {found.baseline}, only rounded, and the teacher: {'; '.join(shares)}"


def _rounded(run: RunFile) -> str | None:
    """Return the arm that is quantised and then trained on no tokens; None where there is none."""
    return next((arm for arm in run.arms if run.train_settings(arm).max_tokens == 0), None)


def _num_bytes(context: StageContext, student: ModelResult) -> int:
    assert student.arm is not None
    made = context.input(Instance("train", student.arm, student.seed).name).manifest
    return sum(f.num_bytes for f in made.files if f.path.startswith("model/") and f.path.endswith(".safetensors"))


def _won_back(results: EvalResults, rounded: str) -> Iterator[WonBack]:
    before, teacher = {one.seed: one for one in results.of_arm(rounded)}, results.teacher
    for arm in results.arms:
        pairs = [(before[one.seed], one) for one in results.of_arm(arm) if one.seed in before]
        if arm == rounded or not pairs or teacher is None:
            continue
        losses = [(a.loss - b.loss, a.loss - teacher.loss) for a, b in pairs]
        near = [(a.against_teacher, b.against_teacher) for a, b in pairs]
        kls = [(a.kl - b.kl, a.kl) for a, b in near if a is not None and b is not None]
        yield WonBack(arm=arm, loss=_share(losses), kl=_share(kls))


def _share(parts: list[tuple[float, float]]) -> float | None:
    """Return the mean over seeds of the closed part of a gap over the gap; None where a seed has no gap."""
    return fmean(part / gap for part, gap in parts) if parts and all(gap > 0 for _, gap in parts) else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
