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
    """Their probability together, mean over rows. Of draws the share that fell on the ids drawn most often, which is
    a little more than they hold."""

    truncation_kl: float | None
    """Of these ids alone, made to sum to 1, from the teacher: KL = -log of their mass; nats, mean over rows. What a
    student would learn without a tail. None for draws, which are unbiased as they are."""


class AtTemperature(Record):
    """A recording at one of the temperatures at which students can train."""

    temperature: float
    """Which."""

    kept: tuple[KeptMass, ...]
    """By rising number of ids."""

    tail: Spread | None
    """Probability of all ids that were not kept; None for draws."""

    least_entropy: float
    """Nats, mean over rows: of `topk` with all ids that were not kept as one; of samples that of their frequencies.
    Both are at most the teacher's."""

    most_entropy: float | None
    """Of `topk` with the tail spread evenly over all other ids: at least the teacher's. None for draws."""


class SamplingError(Record):
    """Squared distance of drawn frequencies from the teacher's probabilities, sum over ids, mean over rows."""

    num_samples: int
    """n."""

    independent: float
    """(1 - sum p^2) / n: of independent draws. From the cache alone with frequencies in the place of p: too low, by at
    most the systematic error over n."""

    systematic: float | None
    """Of n equally spaced points on the cumulative distribution, with one uniform offset: sum f (1 - f) / n^2, f being
    the fraction of n p above a whole number. From the cache alone a bound, at its own n only: each id that is expected
    at least once adds at most 1/4, and all others together as many as are drawn of them."""


class Bytes(Record):
    """What a target takes."""

    stored: float
    """On disk, compressed, tokens and masks included: bytes a token over the whole recording."""

    parts: dict[str, float]
    """Before compression, by part: `text` (tokens, document starts, mask), `ids`, `weights`, `tail`, `label`."""


class Support(Record):
    """Whether a training can have these settings with this recording, by the trainer's own checks."""

    settings: dict[str, str | float]
    """Of `train`."""

    supported: bool
    """Whether it can."""

    why: str | None
    """Why not, in the trainer's words."""


class RecordingFidelity(Record):
    """One recording."""

    recording: RecordingName
    """Which."""

    num_ids: int
    """Ids kept a token, or draws."""

    profile: Profile | None
    """Of `topk`."""

    num_rows: int
    """Labelled positions behind the figures."""

    distinct_ids: float
    """Ids a row, mean."""

    by_temperature: tuple[AtTemperature, ...]
    """The figures at each temperature, rising."""

    label_loss: float
    """Mean of minus the teacher's logprob of the real next token at the temperature of the recording, nats."""

    label_kept: float
    """Share of rows whose real next token is among the kept ids."""

    ece: float
    """Expected calibration error of the target's top-1 token against the real next token, 15 bins of equal width
    (Guo et al., 2017, arXiv 1706.04599), at the temperature of the recording. For draws the confidence is the
    largest frequency, which is a little too high."""

    sampling_errors: tuple[SamplingError, ...]
    """Of a `sampled` recording, by rising n."""

    num_bytes: Bytes
    """A token."""

    supports: tuple[Support, ...]
    """Of every divergence with every tail, every temperature, every way of weighing tokens."""


class LiveFigures(Record):
    """The teacher itself on some of the rows: exact where the cache alone gives bounds."""

    temperature: float
    """Of these figures: the cache's."""

    num_rows: int
    """Rows that it was asked about."""

    entropy: float
    """Nats, mean over rows."""

    label_loss: float
    """Nats, mean over rows, at that temperature."""

    ece: float
    """As above."""

    kept: tuple[KeptMass, ...]
    """Of the full distributions, also for numbers of ids that were not kept."""

    sampling_errors: tuple[SamplingError, ...]
    """Exact for both ways of drawing."""


class Fidelity(Record):
    """What `capgap fidelity` says of a cache."""

    location: str
    """Folder or URL."""

    tokenizer: TokenizerFacts
    """Of corpus and teacher."""

    context: ContextRule
    """What the teacher saw before a token."""

    temperature: float
    """Of the recordings."""

    num_sequences: int
    """In the cache, without held-out ones."""

    num_sampled: int
    """Of these, read for the figures."""

    recordings: tuple[RecordingFidelity, ...]
    """By name."""

    live: LiveFigures | None
    """None without the teacher."""
