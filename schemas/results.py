"""`results.json`: the results of the eval stage for each model, and the differences between arms.

loss        mean of minus the logprob of the real next token, nats/token, over all labels of the held-out text
interval    95 %, from resampling held-out sequences; over several seeds, Student's t of the seeds' differences
difference  loss of `first` minus loss of `second`, on the same text: positive means that `second` is better
ece         expected calibration error (Guo et al., 2017, arXiv 1706.04599): tokens are put into 15 bins of equal width
            by the probability of the model's top-1 token. ECE is the mean over tokens of the distance, within a bin,
            between the mean of that probability and the share of tokens where the top-1 token is the real next one.
            It is biased upwards if there are few tokens
"""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record
from capgap.schemas.run_cache import RecordingName

RESULTS_NAME = "results.json"
TEACHER = "teacher"

Quantity = Literal["loss", "kl", "cached_kl", "cached_teacher_ce", "cached_chunk_kl"]
"""The quantity that is compared: loss, `AgainstTeacher.kl`, or `kl`, `teacher_ce` or `chunk_kl` of `AgainstCache`."""


class Interval(Record):
    """A 95 % interval."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""


class AgainstTeacher(Record):
    """Distance of a student from the teacher's full distributions, as means over labelled positions."""

    kl: float
    """KL(teacher || student) over the whole real vocabulary at temperature 1, nats/token."""

    top1: float
    """Top-1 agreement: share of positions at which the top-1 token of both is the same."""

    top5: float
    """Top-5 agreement: share of the teacher's top-5 tokens that are among the student's top-5 tokens."""

    acceptance: float
    """Sum over ids of the smaller probability of both: the rate at which speculative decoding accepts the student's
    draft tokens."""

    kl_interval: Interval | None = None
    """The interval of `kl`, like the next three from resampling held-out sequences."""

    top1_interval: Interval | None = None
    """The interval of `top1`."""

    top5_interval: Interval | None = None
    """The interval of `top5`."""

    acceptance_interval: Interval | None = None
    """The interval of `acceptance`."""


class AgainstCache(Record):
    """Distance of a student from the targets that the cache holds of held-out sequences, as means over their labels.

    Teacher and student are compared at the cache's temperature.
    """

    loss: float
    """Loss of the student on these sequences, at temperature 1, in nats/token."""

    kl: float | None
    """For `topk`, KL(teacher || student) with the tail as one token, in nats/token: a lower bound of the KL over the
    whole vocabulary. None for `sampled`, because samples give a biased estimate of the teacher's entropy."""

    teacher_ce: float | None
    """For `sampled`, the student's cross-entropy with the teacher's samples, in nats/token. Its mean over samples is
    KL(teacher || student) plus the teacher's entropy, so that its difference between two students is that of their KL.
    """

    top1: float | None
    """Top-1 agreement: share of positions at which the student's top-1 token is the teacher's, or the token sampled
    most often. None if the teacher has another tokenizer."""

    interval: Interval
    """The interval of `kl`, `teacher_ce` or `chunk_kl`, from resampling sequences."""

    top1_interval: Interval | None
    """The interval of `top1`, from resampling sequences; None if `top1` is None."""

    chunk_kl: float | None = None
    """For `chunks`, the KL(teacher || student) between two outcomes, the chunk and anything else, at temperature 1,
    summed over the kept chunks and divided by the number of labels, in nats/token. A KL per token does not exist if
    teacher and student have different tokenizers."""


class Drafted(Record):
    """Acceptance of a student's draft tokens by the teacher in vLLM, with rejection sampling at temperature 1.

    It is measured on text that the teacher writes; `AgainstTeacher.acceptance` is measured on held-out text.
    """

    num_speculative_tokens: int
    """Number of tokens that the student drafts before each pass of the teacher."""

    num_drafts: int
    """Number of passes of the teacher."""

    num_accepted_by_place: tuple[int, ...]
    """Number of accepted tokens at each place of a draft. Divided by `num_drafts`, that of the first place estimates
    `AgainstTeacher.acceptance`; a later place is accepted only if all before it are."""

    engine: str
    """vLLM and its version."""

    @property
    def acceptance(self) -> float:
        """Share of first draft tokens that were accepted."""
        return self.num_accepted_by_place[0] / self.num_drafts

    @property
    def tokens_per_look(self) -> float:
        """Mean number of tokens from one pass of the teacher: the accepted ones and one of its own."""
        return 1 + sum(self.num_accepted_by_place) / self.num_drafts


class ReliabilityBin(Record):
    """One of 15 bins of tokens, by the probability of the model's top-1 token."""

    num_tokens: int
    """Number of tokens in the bin."""

    confidence: float
    """Mean probability of the top-1 token."""

    right: float
    """Share of the tokens at which the top-1 token is the real next one."""


class ModelResult(Record):
    """The results of one model on the held-out text."""

    name: str
    """Instance that made the model: `teacher`, or `train/<arm>/seed-<seed>`."""

    arm: str | None
    """Arm of the student; None for the teacher."""

    seed: int | None
    """Seed of the student; None for the teacher."""

    num_parameters: int
    """Number of all parameters; tied ones count once."""

    num_non_embedding_parameters: int
    """Number of parameters without embedding and head."""

    loss: float
    """Loss on the held-out text, in nats/token."""

    loss_interval: Interval
    """The interval of `loss`, from resampling held-out sequences."""

    bits_per_byte: float
    """Loss in bits per UTF-8 byte of the text that is learnt (in conversations the answers). It can be compared between
    tokenizers."""

    perplexity: float
    """exp(loss)."""

    against_teacher: AgainstTeacher | None
    """Comparison with the teacher's distributions; None for the teacher itself, and if no teacher was available."""

    ece: float | None = None
    """Expected calibration error; None if it was not measured."""

    ece_interval: Interval | None = None
    """The interval of `ece`, from resampling held-out sequences; None if `ece` is None."""

    reliability: tuple[ReliabilityBin, ...] = ()
    """The bins of `ece` that hold any token, by ascending probability."""

    against_cache: AgainstCache | None = None
    """Comparison with the cache; None for the teacher itself, and if the cache holds no held-out sequences."""

    drafted: Drafted | None = None
    """Results of speculative decoding; None if it was not measured."""


class Sample(Record):
    """The beginning of one held-out text, and how every model continues it with its top-1 tokens."""

    prompt: str
    """The beginning, as text."""

    truth: str
    """The real continuation in the held-out text."""

    continuations: dict[str, str]
    """The models' continuations by name of the model, the teacher's first if it was available. A model that cannot
    generate is left out."""


class PairedDifference(Record):
    """The difference between two arms of one seed, paired by sequence on the same text."""

    first: str
    """Name of one arm."""

    second: str
    """Name of the other arm."""

    seed: int
    """Seed of both arms, and so the same initial weights and data order."""

    difference: float
    """The quantity of `first` minus that of `second`."""

    interval: Interval
    """The interval from resampling held-out sequences. It says nothing about other seeds."""

    quantity: Quantity = "loss"
    """The quantity that is compared."""


class SeedsDifference(Record):
    """The difference between two arms over several seeds."""

    first: str
    """Name of one arm."""

    second: str
    """Name of the other arm."""

    seeds: tuple[int, ...]
    """The seeds at which both arms were trained; at least two."""

    difference: float
    """Mean over seeds of the paired differences."""

    interval: Interval
    """The interval by Student's t, with one degree of freedom less than seeds."""

    quantity: Quantity = "loss"
    """The quantity that is compared."""


class HeldoutCache(Record):
    """The held-out sequences of the cache."""

    recording: RecordingName
    """The recording that was read: `topk` if the cache has it."""

    temperature: float
    """Temperature at which the teacher was recorded."""

    num_sequences: int
    """Number of sequences that hold a label, at most `eval.num_sequences`."""

    num_labels: int
    """Number of labels in these sequences."""

    teacher_loss: float | None
    """Recorded loss of the teacher on these sequences, in nats/token. None at a temperature other than 1, if the
    teacher has another tokenizer, and if a logprob is unknown, as may be in an import."""

    teacher_bits_per_byte: float | None = None
    """Bits per byte of a teacher with another tokenizer, on kept chunks of held-out text; None for other teachers."""


class EvalResults(Record):
    """The content of `results.json`."""

    num_sequences: int
    """Number of held-out sequences on which losses are measured."""

    num_labels: int
    """Number of labels in these sequences."""

    num_full_sequences: int
    """Number of sequences compared with the teacher's full distribution; 0 if the teacher was not available."""

    num_full_labels: int
    """Number of labels in the sequences of `num_full_sequences`."""

    num_bootstrap: int
    """Number of bootstrap resamples for each interval."""

    models: tuple[ModelResult, ...]
    """The teacher first, if it was available, then the arms in the order of the run file, each by seed."""

    paired: tuple[PairedDifference, ...]
    """Differences in loss of every two arms, at every seed that both have."""

    over_seeds: tuple[SeedsDifference, ...]
    """Differences in loss of every two arms that share at least two seeds."""

    paired_nearness: tuple[PairedDifference, ...] = ()
    """Differences like `paired`, in each quantity that compares a student with the teacher or the cache."""

    nearness_over_seeds: tuple[SeedsDifference, ...] = ()
    """Differences like `over_seeds`, in each quantity that compares a student with the teacher or the cache."""

    cached: HeldoutCache | None = None
    """The held-out sequences on which `against_cache` is measured; None if the cache has none."""

    teacher_missing: str | None = None
    """Why the teacher itself was not measured, in words; None if it was."""

    samples: tuple[Sample, ...] = ()
    """Continuations of held-out text; empty if `eval.num_text_samples` is 0."""

    @property
    def teacher(self) -> ModelResult | None:
        """The teacher's results; None if it was not available."""
        return self.models[0] if self.models[0].arm is None else None

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(dict.fromkeys(model.arm for model in self.models if model.arm is not None))

    def of_arm(self, arm: str) -> tuple[ModelResult, ...]:
        """Return the models of this arm, by seed."""
        return tuple(model for model in self.models if model.arm == arm)
