"""The records of `report.json`, which hold everything that the page shows."""

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
    """A number of the final table, with its deviation over seeds."""

    mean: float
    """Mean over the seeds."""

    sd: float | None
    """Sample standard deviation over the seeds, with n - 1 as the divisor; None for a single seed."""


class Row(Record):
    """A row of the final table: the teacher, or one arm."""

    name: str
    """`teacher`, or the arm."""

    num_seeds: int
    """Number of models whose mean the row shows."""

    num_parameters: int
    """Number of parameters of one model."""

    loss: Measure
    """Held-out loss, nats/token."""

    bits_per_byte: Measure
    """Held-out loss in bits per byte of text."""

    kl: Measure | None
    """KL(teacher || student), nats/token; None for the teacher, and where the teacher was not measured."""

    top1: Measure | None
    """Share of positions at which the student's most probable token is the teacher's; None where `kl` is None."""

    acceptance: Measure | None
    """Expected share of draft tokens that speculative decoding accepts; None where `kl` is None."""

    ece: Measure | None
    """Expected calibration error; None where it was not measured."""


class SeedGain(Record):
    """The gain of an arm on its baseline at one seed."""

    seed: int
    """The seed of both arms."""

    difference: float
    """Loss of the baseline minus loss of the arm, nats/token."""

    interval: Interval
    """95 % interval over the choice of held-out sequences."""


class Gain(Record):
    """The gain of a distilled arm on an arm of cross-entropy alone, paired by seed and by sequence."""

    arm: str
    """Name of the distilled arm."""

    baseline: str
    """Name of the arm of cross-entropy alone (alpha 0)."""

    difference: float
    """Loss of the baseline minus loss of the arm, mean over seeds, nats/token: positive where distillation helped."""

    interval: Interval
    """95 % interval of the difference, over seeds where there are several, else over held-out sequences."""

    seeds: tuple[SeedGain, ...]
    """The gain at each seed."""


class Score(Record):
    """The score of a model, or of all seeds of an arm, on one benchmark."""

    mean: float
    """Mean over the seeds."""

    error: float | None
    """Standard deviation over the seeds. For a single model it is lm-eval's standard error over examples, or None where
    lm-eval gives none."""


class BenchmarkLine(Record):
    """One line of the table of benchmarks: the scores of all models on one task."""

    task: str
    """Name of the task in the run file, or lm-eval's own name where the run file names a tag of several tasks."""

    metric: str
    """The metric, as lm-eval names it."""

    num_fewshot: int | None
    """Solved examples before each question; None for a mean, and for a group whose tasks differ."""

    chance: float | None
    """Expected score of random guessing; None where it is not known."""

    scores: dict[str, Score]
    """Scores by model: the teacher where it was measured, then the arms."""


class Benchmarks(Record):
    """The table of benchmarks."""

    lines: tuple[BenchmarkLine, ...]
    """The tasks in the order of the run file, then the means of presets."""

    notes: tuple[str, ...]
    """Sentences on how the tasks were measured, and whether on all of their examples."""


class Table(Record):
    """The final table."""

    rows: tuple[Row, ...]
    """The teacher where it was measured, then the arms."""

    lines: tuple[str, ...]
    """Lines with further facts, shown below the table."""

    verdicts: tuple[str, ...]
    """One sentence for each gain, or the reason why there is none."""

    benchmarks: Benchmarks | None = None
    """The table of benchmarks; None where the run file asks for none."""


class CacheSummary(Record):
    """The cache and its size."""

    facts: CacheFacts
    """Facts from the cache's manifest."""

    num_bytes: dict[RecordingName, int]
    """Bytes of each recording's shard files."""

    num_tokens: int
    """Number of targets in each recording."""

    num_shards: int
    """Number of shard files of each recording."""

    def bytes_per_token(self, recording: RecordingName) -> float:
        """Return the bytes on disk for each target of a recording, tokens and masks included."""
        return self.num_bytes[recording] / self.num_tokens


class Series(Record):
    """The values that a training logged under one name."""

    tokens: tuple[int, ...]
    """Number of training targets seen before each value was logged."""

    values: tuple[float, ...]
    """The logged values, one for each of `tokens`."""


class WonBack(Record):
    """The share of the gap between a rounded student and the teacher that the training of an arm closes."""

    arm: str
    """Name of the arm."""

    loss: float | None
    """Share of the gap in loss that is closed, mean over seeds; None where there is no gap."""

    kl: float | None
    """Share of the rounded student's KL to the teacher that is removed, mean over seeds; None where it is unknown."""


class LowBit(Record):
    """Size and quality of students with quantised weights."""

    format: str
    """Name of the format in the run file."""

    layers: str
    """The quantised layers, in words."""

    bits_per_weight: float
    """Bits of each quantised weight, with its share of the scale of its group."""

    num_bytes: int
    """Bytes of the weights in the folder `model` of one student."""

    num_bytes_in_16_bits: int
    """Bytes that the parameters of one student would take in 16 bits each."""

    baseline: str | None
    """The arm that is rounded and trained on nothing (`max_tokens: 0`); None where there is none."""

    won_back: tuple[WonBack, ...]
    """The share that each arm wins back; empty without a baseline, or where the teacher was not measured."""


class TrainingCurve(Record):
    """The held-out loss during a training, with the other values that it logged."""

    name: str
    """Name of the instance that trained."""

    arm: str | None
    """The arm; None for the teacher."""

    seed: int | None
    """The seed; None for the teacher."""

    tokens: tuple[int, ...]
    """Number of training targets seen before each loss was measured."""

    losses: tuple[float, ...]
    """Losses on the training's own validation sequences, nats/token."""

    measures: dict[str, Series]
    """Other logged values by their columns in metrics.csv, thinned out in long trainings."""


class RoundLine(Record):
    """One round of an arm and seed: its text, and the training on that text."""

    arm: str
    """The arm."""

    seed: int
    """The seed."""

    round: int
    """Number of the round, from 0. A student that writes was trained in so many rounds."""

    is_trained: bool
    """Whether a student was trained on the text; the text of the final student is only measured."""

    writer: Writer
    """The model that wrote the text."""

    num_answers: int
    """Number of answers in the text; for the final student, of held-out answers."""

    mean_tokens: float
    """Mean number of tokens of an answer."""

    cut_off: float
    """Share of answers that were cut off before their end."""

    repetition: float
    """Mean share of an answer's runs of four tokens that occur earlier in the same answer."""

    entropy: float
    """Mean of minus the writer's logprob of the tokens that it sampled, nats/token."""

    writer_kl: float | None
    """KL(writer || teacher) on the text, nats/token; None where sampling was not at temperature 1 and from all ids."""

    right: float | None
    """Share of held-out answers that equal their reference; None without references."""

    teacher_tokens_before: int
    """Tokens that the teacher had written or scored for this arm and seed before this round."""

    teacher_tokens: int
    """Tokens that the teacher had written or scored for this arm and seed after this round."""

    learnt: float | None
    """Distance to the teacher on the text's held-out answers after the round's training minus before it, nats/token.
    The distance is the KL for a `topk` cache. For a `sampled` cache it is the cross-entropy with the teacher's samples,
    which changes by as much. None where it was not measured."""

    staleness: dict[str, float] | None = None
    """Ratios of the trained student's probability to the writer's on the text's held-out answers, by their columns in
    metrics.csv; None where no student wrote the text."""


class StageLine(Record):
    """One finished stage."""

    instance: str
    """Name of the instance: stage, arm and seed."""

    identity: str
    """The identity in its manifest."""

    content: str
    """The content in its manifest, a digest of its files' digests."""

    wall_s: float
    """Seconds that all processes of the stage took together."""

    num_tokens: int | None
    """Tokens that it packed, scored, trained on or measured; None where it did none of these."""

    steps_tokens_per_s: float | None
    """Median throughput of a training over its logged steps, tokens/s. Unlike `tokens_per_s` it leaves out starts, and
    is right where a training was resumed. None where the stage logged no steps."""

    num_devices: int
    """Number of devices that held its model by the present run file; 0 for a stage that uses no device."""

    versions: dict[str, str]
    """Versions of the packages that can change the result, by name."""

    @property
    def tokens_per_s(self) -> float | None:
        """Throughput over the time of all processes of the stage, starts included, tokens/s; None where unknown."""
        return None if self.num_tokens is None or not self.wall_s else self.num_tokens / self.wall_s

    @property
    def device_s(self) -> float:
        """Device time of the stage: its seconds times its number of devices."""
        return self.wall_s * self.num_devices


class Report(Record):
    """The content of `report.json`."""

    name: str
    """The run's name."""

    machine: str
    """Names of the machines on which the shards were scored, separated by commas; empty where they are not known."""

    finished: str
    """When the measurement was made, in UTC."""

    command: tuple[str, ...]
    """Command line that started the run; empty where it is not known."""

    teacher_parameters: int | None
    """Number of all parameters of the teacher; None where it is not known."""

    table: Table
    """The final table."""

    gains: tuple[Gain, ...]
    """Every distilled arm against every arm of cross-entropy alone."""

    results: EvalResults
    """Results of the eval stage."""

    frontier: RunFrontier
    """Compute and quality of all models."""

    judge: JudgeResults | None
    """The judge's ratings and comparisons; None where the run has no judge."""

    cache: CacheSummary
    """The cache that the students learned from."""

    fidelity: Fidelity | None
    """How much of the teacher's distributions the cache keeps, measured on a small sample; None where the shards could
    not be read or hold chunks."""

    curves: tuple[TrainingCurve, ...]
    """Curves of the students' trainings, and of the teacher's where it was trained in this run."""

    low_bit: LowBit | None = None
    """Facts on quantised students; None where the students are not quantised."""

    rounds: tuple[RoundLine, ...] = ()
    """One line for each round; empty for a run without rounds."""

    stages: tuple[StageLine, ...]
    """One line for each finished stage, in the order of the run."""

    settings: dict[str, Any]
    """The run file's settings that decide the result."""
