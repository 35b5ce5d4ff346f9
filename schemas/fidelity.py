"""What a cache keeps of its teacher: the figures of `capgap fidelity`.

Rows are the labelled positions of a sample of sequences, spread evenly over the shards that are read. Logarithms are
natural. Nothing here needs the teacher, but for `LiveFigures`.
"""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.run_cache import Profile, RecordingName
from capgap.schemas.run_corpus import ContextRule


class Spread(Record):
    """A quantity over rows."""

    mean: float
    """Over all of them."""

    median: float
    """Within 2.5 %, like the next two."""

    p95: float
    """95 of 100 rows have no more."""

    p99: float
    """99 of 100 rows have no more."""


class KeptMass(Record):
    """What the top-k tokens of a row hold."""

    num_ids: int
    """So many of the top-k tokens, all that were kept where a row has fewer."""

    mass: float
    """Their probability together, mean over rows. For samples it is the share that fell on the ids sampled most often,
    which is a little more than they hold."""

    truncation_kl: float | None
    """KL of these ids alone, made to sum to 1, from the teacher: -log of their mass; nats, mean over rows. It is what a
    student would learn wrong without a tail. None for samples, which are unbiased as they are."""


class AtTemperature(Record):
    """A recording at one of the temperatures at which students can train."""

    temperature: float
    """Which."""

    kept: tuple[KeptMass, ...]
    """By rising number of ids."""

    tail: Spread | None
    """Probability of all ids that were not kept; None for samples."""

    least_entropy: float
    """Nats, mean over rows: for `topk` with all ids that were not kept as one; for samples that of their frequencies.
    Both are at most the teacher's."""

    most_entropy: float | None
    """For `topk`, with the tail spread evenly over all other ids: at least the teacher's. None for samples."""


class SamplingError(Record):
    """Squared distance of sampled frequencies from the teacher's probabilities, sum over ids, mean over rows."""

    num_samples: int
    """n."""

    independent: float
    """(1 - sum p^2) / n: the error of independent samples. From the cache alone it has frequencies in the
    place of p, and is too low by at most the systematic error over n."""

    systematic: float | None
    """The error of n equally spaced points on the cumulative distribution, with one uniform offset:
    sum f (1 - f) / n^2, f being the fraction of n p above a whole number. From the cache alone it is a bound, at its
    own n only: each id that is expected at least once adds at most 1/4, all others together as many as were sampled."""


class Bytes(Record):
    """What a target takes."""

    stored: float
    """On disk, compressed, tokens and masks included: bytes a token over the whole recording."""

    parts: dict[str, float]
    """Before compression, by part: `text` (tokens, document starts, mask), `ids`, `weights`, `tail`, `label`."""


class Support(Record):
    """Whether a training can have these settings with this recording, by the trainer's own checks."""

    settings: dict[str, str | float]
    """Settings of `train`."""

    supported: bool
    """Whether it can."""

    why: str | None
    """Why not, in the trainer's words."""


class RecordingFidelity(Record):
    """One recording."""

    recording: RecordingName
    """Which."""

    num_ids: int
    """Ids kept a token, or samples."""

    profile: Profile | None
    """The profile of `topk`."""

    num_rows: int
    """Labelled positions behind the figures."""

    distinct_ids: float
    """Ids a row, mean."""

    by_temperature: tuple[AtTemperature, ...]
    """The figures at each temperature, rising."""

    label_loss: float | None
    """Mean of minus the teacher's logprob of the real next token at the temperature of the recording, nats. None where
    one of them is unknown, as imported captures may have it."""

    label_kept: float
    """Share of rows whose real next token is among the kept ids."""

    ece: float
    """Expected calibration error of the target's top-1 token against the real next token, 15 bins of equal width
    (Guo et al., 2017, arXiv 1706.04599), at the temperature of the recording. For samples the confidence is the
    largest frequency, which is a little too high."""

    sampling_errors: tuple[SamplingError, ...]
    """The errors of a `sampled` recording, by rising n."""

    num_bytes: Bytes
    """A token."""

    supports: tuple[Support, ...]
    """What holds for every divergence with every tail, every temperature, every way of weighing tokens."""


class LiveFigures(Record):
    """The teacher itself on some of the rows: exact where the cache alone gives bounds."""

    temperature: float
    """The temperature of these figures: the cache's."""

    num_rows: int
    """Rows that it was asked about."""

    entropy: float
    """Nats, mean over rows."""

    label_loss: float
    """Nats, mean over rows, at that temperature."""

    ece: float
    """As above."""

    kept: tuple[KeptMass, ...]
    """What the full distributions hold, also for numbers of ids that were not kept."""

    sampling_errors: tuple[SamplingError, ...]
    """Exact for both ways of sampling."""


class Fidelity(Record):
    """What `capgap fidelity` says of a cache."""

    location: str
    """Folder or URL."""

    tokenizer: TokenizerFacts
    """The tokenizer of corpus and teacher."""

    context: ContextRule
    """What the teacher saw before a token."""

    temperature: float
    """The temperature of the recordings."""

    num_sequences: int
    """In the cache, without held-out ones."""

    num_sampled: int
    """How many of these were read for the figures."""

    recordings: tuple[RecordingFidelity, ...]
    """By name."""

    live: LiveFigures | None
    """None without the teacher."""
