"""`results.json`: what the eval stage measured, model by model and arm against arm.

loss        mean of minus the logprob of the real next token, nats/token, over all labels of the held-out text
interval    95 %, from resampling held-out sequences; over several seeds, Student's t of the seeds' differences
difference  loss of `first` minus loss of `second`, on the same text: positive means that `second` is better
ece         expected calibration error (Guo et al., 2017, arXiv 1706.04599): tokens are put into 15 bins of equal width
            by the probability of the model's top-1 token; the mean over tokens of how far, in a bin, that probability
            is on average from the share of tokens at which that token is the real next one. Few tokens raise it
"""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record
from capgap.schemas.run_cache import RecordingName

RESULTS_NAME = "results.json"
TEACHER = "teacher"

Quantity = Literal["loss", "kl", "cached_kl", "cached_teacher_ce", "cached_chunk_kl"]
"""What differs between two arms: the loss; `AgainstTeacher.kl`; `kl`, `teacher_ce` or `chunk_kl` of `AgainstCache`."""


class Interval(Record):
    """A 95 % interval."""

    low: float
    """Lower end."""

    high: float
    """Upper end."""


class AgainstTeacher(Record):
    """How near a student's distributions come to the teacher's full ones, as means over labelled positions."""

    kl: float
    """KL(teacher || student) over the whole real vocabulary at temperature 1, nats/token."""

    top1: float
    """Top-1 agreement: share of positions at which the top-1 token of both is the same."""

    top5: float
    """Top-5 agreement: share of the teacher's top-5 tokens that are among the student's top-5 tokens."""

    acceptance: float
    """Sum over ids of the smaller probability: how often speculative decoding accepts the student's draft."""

    kl_interval: Interval | None = None
    """Over the choice of held-out sequences, like the next three."""

    top1_interval: Interval | None = None
    """The interval of `top1`."""

    top5_interval: Interval | None = None
    """The interval of `top5`."""

    acceptance_interval: Interval | None = None
    """The interval of `acceptance`."""


class AgainstCache(Record):
    """How near a student comes to what the cache holds of held-out sequences, as means over their labels.

    Teacher and student are compared at the cache's temperature.
    """

    loss: float
    """The student's, on these sequences, at temperature 1; nats/token."""

    kl: float | None
    """For `topk`, KL(teacher || student) with all ids that were not kept as one: a lower bound of the whole,
    nats/token. None for `sampled`, because samples give the teacher's entropy with a bias."""

    teacher_ce: float | None
    """For `sampled`, the student's cross-entropy with the teacher's samples, nats/token: on average over samples it is
    KL(teacher || student) plus the teacher's entropy, so that two students differ in it as in their KL."""

    top1: float | None
    """Top-1 agreement: share of positions at which the student's top-1 token is the teacher's, or the one sampled most
    often. None where the teacher has other tokens."""

    interval: Interval
    """The interval of `kl`, `teacher_ce` or `chunk_kl`, over the choice of sequences."""

    top1_interval: Interval | None
    """Likewise."""

    chunk_kl: float | None = None
    """For `chunks`, the binarised KL(teacher || student) of chunks of text at temperature 1, summed over those that are
    kept and divided by the labels, nats/token. KL by token does not exist there."""


class Drafted(Record):
    """A student's drafts for the teacher in vLLM, both sampling at temperature 1, with rejection sampling.

    Measured on what the teacher writes, where `AgainstTeacher.acceptance` is of held-out text.
    """

    num_speculative_tokens: int
    """Drafted before the teacher looks."""

    num_drafts: int
    """How often the teacher looked."""

    num_accepted_by_place: tuple[int, ...]
    """Accepted tokens at each place of a draft; the first one's share is what the sum over ids of the smaller
    probability foretells, a later place counts only where all before it were accepted."""

    engine: str
    """vLLM and its version."""

    @property
    def acceptance(self) -> float:
        """Share of first drafted tokens that were accepted."""
        return self.num_accepted_by_place[0] / self.num_drafts

    @property
    def tokens_per_look(self) -> float:
        """Tokens that one pass of the teacher yields: the accepted ones and its own."""
        return 1 + sum(self.num_accepted_by_place) / self.num_drafts


class ReliabilityBin(Record):
    """The tokens at which a model's top-1 token has a probability of one of 15 ranges."""

    num_tokens: int
    """How many."""

    confidence: float
    """Mean of that probability."""

    right: float
    """Share of them at which the top-1 token is the real next one."""


class ModelResult(Record):
    """One model on the held-out text."""

    name: str
    """Instance that made the model: `teacher`, or `train/<arm>/seed-<seed>`."""

    arm: str | None
    """None for the teacher."""

    seed: int | None
    """None for the teacher."""

    num_parameters: int
    """All of them, tied ones once."""

    num_non_embedding_parameters: int
    """Without embedding and head."""

    loss: float
    """Nats/token."""

    loss_interval: Interval
    """Over the choice of held-out sequences."""

    bits_per_byte: float
    """Loss per UTF-8 byte of the text that is learnt, of conversations the answers; independent of the tokenizer."""

    perplexity: float
    """exp(loss)."""

    against_teacher: AgainstTeacher | None
    """None for the teacher itself, and where it was not at hand."""

    ece: float | None = None
    """Expected calibration error; None in results from before it was measured, like its interval."""

    ece_interval: Interval | None = None
    """Over the choice of held-out sequences."""

    reliability: tuple[ReliabilityBin, ...] = ()
    """The bins behind `ece` that hold any token, by rising probability."""

    against_cache: AgainstCache | None = None
    """None for the teacher itself, and where the cache holds no held-out sequences."""

    drafted: Drafted | None = None
    """None where speculative decoding was not measured."""


class Sample(Record):
    """What every model makes of one beginning of held-out text, always with its top-1 token; one text a model."""

    prompt: str
    """The beginning, as text."""

    truth: str
    """How the held-out text itself goes on."""

    continuations: dict[str, str]
    """By name of the model, the teacher first where it was at hand; a model that cannot write is left out."""


class PairedDifference(Record):
    """Two arms of one seed, sequence by sequence on the same text."""

    first: str
    """An arm."""

    second: str
    """Another arm."""

    seed: int
    """The seed of both: the same initial weights and data order."""

    difference: float
    """Loss, or other quantity, of `first` minus that of `second`."""

    interval: Interval
    """Over the choice of held-out sequences; says nothing about other seeds."""

    quantity: Quantity = "loss"
    """What differs."""


class SeedsDifference(Record):
    """Two arms over several seeds."""

    first: str
    """An arm."""

    second: str
    """Another arm."""

    seeds: tuple[int, ...]
    """Those at which both arms were trained; at least two."""

    difference: float
    """Mean over seeds of the paired differences."""

    interval: Interval
    """Student's t with one degree of freedom less than seeds."""

    quantity: Quantity = "loss"
    """What differs."""


class HeldoutCache(Record):
    """The held-out sequences of the cache, where it has them."""

    recording: RecordingName
    """Which of its recordings was read: `topk` where it has that."""

    temperature: float
    """The temperature at which the teacher was recorded."""

    num_sequences: int
    """Those that hold a label, at most `eval.num_sequences`."""

    num_labels: int
    """In them."""

    teacher_loss: float | None
    """The teacher's, on these sequences, as recorded, nats/token; None at other temperatures than 1, of other
    tokens, and where one of the logprobs is unknown, as imported captures may have it."""

    teacher_bits_per_byte: float | None = None
    """Of a teacher with other tokens, on the chunks of held-out text that are kept; None for any other."""


class EvalResults(Record):
    """Everything in `results.json`."""

    num_sequences: int
    """Held-out sequences behind the losses."""

    num_labels: int
    """Labels in them."""

    num_full_sequences: int
    """How many of these were compared with the teacher's full distribution; 0 where it was not at hand."""

    num_full_labels: int
    """Labels in those."""

    num_bootstrap: int
    """Resamples behind each interval."""

    models: tuple[ModelResult, ...]
    """The teacher first, if it was at hand, then arm after arm in the order of the run file, by seed."""

    paired: tuple[PairedDifference, ...]
    """Every two arms at every seed that both have."""

    over_seeds: tuple[SeedsDifference, ...]
    """Every two arms that share at least two seeds."""

    paired_nearness: tuple[PairedDifference, ...] = ()
    """As `paired`, of every quantity that was measured against the teacher."""

    nearness_over_seeds: tuple[SeedsDifference, ...] = ()
    """As `over_seeds`, of the same."""

    cached: HeldoutCache | None = None
    """What `against_cache` is measured on."""

    teacher_missing: str | None = None
    """Why the teacher itself was not measured, in words; None where it was."""

    samples: tuple[Sample, ...] = ()
    """Empty where `eval.num_samples` is 0, and in results from before there were any."""

    @property
    def teacher(self) -> ModelResult | None:
        """The teacher's row; None where it was not at hand."""
        return self.models[0] if self.models[0].arm is None else None

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(dict.fromkeys(model.arm for model in self.models if model.arm is not None))

    def of_arm(self, arm: str) -> tuple[ModelResult, ...]:
        """The arm's models, by seed."""
        return tuple(model for model in self.models if model.arm == arm)
