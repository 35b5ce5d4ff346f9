"""`report.json`: everything that the page shows, as records."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.report.frontier import RunFrontier
from capgap.schemas.base import Record
from capgap.schemas.facts import CacheFacts
from capgap.schemas.fidelity import Fidelity
from capgap.schemas.judge_results import JudgeResults
from capgap.schemas.results import EvalResults, Interval
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_rounds import Writer

REPORT_NAME = "report.json"


class Measure(Record):
    """A number of the final table."""

    mean: float
    """Over the seeds."""

    sd: float | None
    """Standard deviation over the seeds, with their number less one below the line; None for a single seed."""


class Row(Record):
    """The teacher, or one arm."""

    name: str
    """`teacher`, or the arm."""

    num_seeds: int
    """Students behind the means."""

    num_parameters: int
    """Parameters of one model."""

    loss: Measure
    """Nats per held-out token."""

    bits_per_byte: Measure
    """The same per byte of text."""

    kl: Measure | None
    """KL(teacher || student), nats/token; None for the teacher, like the next two."""

    top1: Measure | None
    """Share of positions with the teacher's most probable token."""

    acceptance: Measure | None
    """Expected share of drafts that speculative decoding accepts."""

    ece: Measure | None
    """Expected calibration error; None where it was not measured."""


class SeedGain(Record):
    """One seed of a gain."""

    seed: int
    """The seed of both arms."""

    difference: float
    """Loss of the baseline minus loss of the arm."""

    interval: Interval
    """Over the choice of held-out sequences."""


class Gain(Record):
    """What an arm gains on an arm of cross-entropy alone, paired by seed and by sequence."""

    arm: str
    """The arm."""

    baseline: str
    """The arm of alpha 0."""

    difference: float
    """Loss of the baseline minus loss of the arm, mean over seeds: positive is good."""

    interval: Interval
    """Over seeds where there are several, else over held-out sequences."""

    seeds: tuple[SeedGain, ...]
    """By seed."""


class Score(Record):
    """A model, or the seeds of an arm, on one benchmark."""

    mean: float
    """Over the seeds."""

    error: float | None
    """Standard deviation over the seeds; of a single model the standard error over examples, where lm-eval has one."""


class BenchmarkLine(Record):
    """One benchmark."""

    task: str
    """As the run file names it, or as lm-eval does where that is a tag."""

    metric: str
    """The metric, as lm-eval names it."""

    num_fewshot: int | None
    """Solved examples before each question; None for a mean, and for a group whose tasks differ."""

    chance: float | None
    """What guessing gives; None where it is not known."""

    scores: dict[str, Score]
    """By model: the teacher where it was measured, then the arms."""


class Benchmarks(Record):
    """The table of benchmarks."""

    lines: tuple[BenchmarkLine, ...]
    """In the order of the run file; means of presets last."""

    notes: tuple[str, ...]
    """What they were measured with, and whether in full."""


class Table(Record):
    """The final table."""

    rows: tuple[Row, ...]
    """The teacher, then the arms."""

    lines: tuple[str, ...]
    """Facts below the table."""

    verdicts: tuple[str, ...]
    """One sentence for each gain."""

    benchmarks: Benchmarks | None = None
    """None where the run file asks for none."""


class CacheSummary(Record):
    """The cache and its cost."""

    facts: CacheFacts
    """As the cache stage handed them on."""

    num_bytes: dict[RecordingName, int]
    """Bytes of each recording's shard files."""

    num_tokens: int
    """Targets in each of them."""

    num_shards: int
    """Shard files of each."""

    def bytes_per_token(self, recording: RecordingName) -> float:
        """What a kept distribution costs on disk, tokens and masks included."""
        return self.num_bytes[recording] / self.num_tokens


class Series(Record):
    """What a training logged under one name."""

    tokens: tuple[int, ...]
    """Training targets seen so far."""

    values: tuple[float, ...]
    """One for each."""


class WonBack(Record):
    """What an arm wins back of the gap between a rounded student and the teacher."""

    arm: str
    """The arm."""

    loss: float | None
    """Share of the gap in loss, mean over seeds; None where there is no gap."""

    kl: float | None
    """Share of the KL to the teacher, likewise."""


class LowBit(Record):
    """Students of few bits."""

    format: str
    """As the run file names it."""

    layers: str
    """What is quantised, in words."""

    bits_per_weight: float
    """Of what is quantised, with the scales of its groups."""

    num_bytes: int
    """The weights of one student's folder `model`."""

    num_bytes_in_16_bits: int
    """What its parameters would take so."""

    baseline: str | None
    """The arm that is rounded and trained on nothing (`max_tokens: 0`); None where there is none."""

    won_back: tuple[WonBack, ...]
    """By arm; empty without a baseline, or where the teacher was not measured."""


class TrainingCurve(Record):
    """Held-out loss in the course of a training."""

    name: str
    """Instance that was trained."""

    arm: str | None
    """None for the teacher."""

    seed: int | None
    """None for the teacher."""

    tokens: tuple[int, ...]
    """Training targets seen so far."""

    losses: tuple[float, ...]
    """Nats/token on the training's own validation sequences."""

    measures: dict[str, Series]
    """What else it logged, by the names of metrics.csv, thinned out."""


class RoundLine(Record):
    """One round of an arm and seed: its text, and what was learnt from it."""

    arm: str
    """The arm."""

    seed: int
    """The seed."""

    round: int
    """Counted from 0: rounds that the writer had learnt from, where it is the student."""

    is_trained: bool
    """Whether the text was learnt from; the final student's is measured alone."""

    writer: Writer
    """Who wrote the text."""

    num_answers: int
    """Answers in it; of the final student's text, held-out ones."""

    mean_tokens: float
    """Tokens an answer."""

    cut_off: float
    """Share of answers that had not ended."""

    repetition: float
    """Mean share of an answer's runs of four tokens that stood in it before."""

    entropy: float
    """Mean of minus the writer's logprob of what it sampled, nats/token."""

    writer_kl: float | None
    """KL(writer || teacher) on the text, nats/token; None where sampling was not at temperature 1 and from all ids."""

    right: float | None
    """Share of held-out answers that equal their reference; None without references."""

    teacher_tokens_before: int
    """Tokens that the teacher had written or scored for this arm and seed before this round."""

    teacher_tokens: int
    """With those of this round."""

    learnt: float | None
    """Distance to the teacher on the text's held-out answers after the round's training minus before, nats/token: KL
    for `topk`, for `sampled` the cross-entropy with the teacher's samples, which differs by as much."""

    staleness: dict[str, float] | None = None
    """Of text that a student wrote: the ratios of the trained student's probability to the writer's, on its held-out
    answers, by their columns in metrics.csv."""


class StageLine(Record):
    """One finished stage."""

    instance: str
    """Stage, arm and seed."""

    identity: str
    """The identity in its manifest."""

    content: str
    """Digest of its files' digests."""

    wall_s: float
    """Seconds of all its processes together."""

    num_tokens: int | None
    """Tokens that it packed, scored, trained on or measured; None where it did none of these."""

    steps_tokens_per_s: float | None
    """Throughput of a training, median over its logged steps: without the start, and right where it was resumed."""

    num_devices: int
    """Devices that held its model, as the run file now has it; 0 for a stage without one."""

    versions: dict[str, str]
    """Versions of the packages that matter."""

    @property
    def tokens_per_s(self) -> float | None:
        """Over all of its processes, their starts included."""
        return None if self.num_tokens is None or not self.wall_s else self.num_tokens / self.wall_s

    @property
    def device_s(self) -> float:
        """Seconds of devices."""
        return self.wall_s * self.num_devices


class Report(Record):
    """Everything in `report.json`."""

    name: str
    """The run's name."""

    machine: str
    """Where the shards were made, or where the run was measured; empty where that is not known."""

    finished: str
    """When the measurement was made, in UTC."""

    command: tuple[str, ...]
    """With which the run was started."""

    teacher_parameters: int | None
    """All of the teacher's; None where they are not known."""

    table: Table
    """The final table."""

    gains: tuple[Gain, ...]
    """Every distilled arm against every arm of cross-entropy alone."""

    results: EvalResults
    """As measured."""

    frontier: RunFrontier
    """Compute against quality."""

    judge: JudgeResults | None
    """The judge's ratings and comparisons; None where the run has no judge."""

    cache: CacheSummary
    """The cache behind the students."""

    fidelity: Fidelity | None
    """What it keeps of the teacher, on a small sample; None where its shards were not at hand."""

    curves: tuple[TrainingCurve, ...]
    """The teacher's, if it was trained here, and the students'."""

    low_bit: LowBit | None = None
    """None where the students are not quantised."""

    rounds: tuple[RoundLine, ...] = ()
    """Round by round; empty for a run without rounds."""

    stages: tuple[StageLine, ...]
    """In the order of the run."""

    settings: dict[str, Any]
    """The run file's settings that decide the result."""
