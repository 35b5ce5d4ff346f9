"""The results of `capgap fidelity`: how exactly a cache stores its teacher's distributions.

Rows are the labelled positions of a sample of sequences, spread evenly over the shards that are read. Logarithms are
natural. Only `LiveFigures` needs the teacher itself.
"""

from __future__ import annotations

from capgap.schemas.base import Record
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.run_cache import Profile, RecordingName
from capgap.schemas.run_corpus import ContextRule


class Spread(Record):
    """Mean and quantiles of a quantity over rows."""

    mean: float
    """Mean over all rows."""

    median: float
    """Median, exact within 2.5 % like the next two."""

    p95: float
    """The value that 95 of 100 rows do not exceed."""

    p99: float
    """The value that 99 of 100 rows do not exceed."""


class KeptMass(Record):
    """Probability of the most probable tokens of a row."""

    num_ids: int
    """Number of most probable tokens counted; in a row that stores fewer, all of them."""

    mass: float
    """Probability of these tokens together, mean over rows. For samples it is the share of the samples on the ids
    sampled most often, which is biased upwards a little."""

    truncation_kl: float | None
    """KL between these tokens' distribution, scaled up to 1, and the teacher's, which is -log of their mass: nats, mean
    over rows. It is the error of a target without a tail. None for samples, which are unbiased."""


class AtTemperature(Record):
    """The figures of a recording at one of the temperatures at which students can train."""

    temperature: float
    """The temperature."""

    kept: tuple[KeptMass, ...]
    """Probability of the most probable tokens, by ascending number of tokens."""

    tail: Spread | None
    """Probability of all ids that are not stored; None for samples."""

    least_entropy: float
    """Lower bound of the teacher's entropy, in nats, mean over rows: for `topk` with the tail as one token; for samples
    the entropy of their frequencies."""

    most_entropy: float | None
    """Upper bound of the teacher's entropy, in nats, mean over rows: for `topk` with the tail spread evenly over all
    other ids. None for samples."""


class SamplingError(Record):
    """Squared distance of sampled frequencies from the teacher's probabilities, sum over ids, mean over rows."""

    num_samples: int
    """Number n of samples per row."""

    independent: float
    """Error of n independent samples: (1 - sum p^2) / n. Computed from the cache alone, it has frequencies in place of
    p and is too low by at most the systematic error over n."""

    systematic: float | None
    """Error of n equally spaced points on the cumulative distribution with one uniform offset: sum f (1 - f) / n^2,
    where f is the fractional part of n p. From the cache alone it is an upper bound, at the cache's own n only: each id
    that is expected at least once adds at most 1/4, and all others together add the number of their samples."""


class Bytes(Record):
    """Size of a target."""

    stored: float
    """Bytes per token on disk, compressed, over the whole recording, including tokens and masks."""

    parts: dict[str, float]
    """Bytes per token before compression, by part: `text` (tokens, document starts, mask), `ids`, `weights`, `tail`,
    `label`."""


class Support(Record):
    """Whether a training supports these settings with this recording, by the trainer's own checks."""

    settings: dict[str, str | float]
    """Settings of `train`."""

    supported: bool
    """Whether the training supports them."""

    why: str | None
    """Why the training does not support them, in the trainer's words; None if it does."""


class RecordingFidelity(Record):
    """The figures of one recording."""

    recording: RecordingName
    """The recording."""

    num_ids: int
    """Number of ids stored per token (`topk`), or of samples per token (`sampled`)."""

    profile: Profile | None
    """The profile of `topk`; None for `sampled`."""

    num_rows: int
    """Number of labelled positions from which the figures are computed."""

    distinct_ids: float
    """Mean number of distinct ids in a row."""

    by_temperature: tuple[AtTemperature, ...]
    """The figures at each temperature, ascending."""

    label_loss: float | None
    """Mean of minus the teacher's logprob of the real next token at the recording's temperature, in nats. None if one
    of these logprobs is unknown, as may be in an import."""

    label_kept: float
    """Share of rows whose real next token is among the stored ids."""

    ece: float
    """Expected calibration error of the target's top-1 token against the real next token, with 15 bins of equal width
    (Guo et al., 2017, arXiv 1706.04599), at the temperature of the recording. For samples the confidence is the
    largest frequency, which is biased upwards a little."""

    sampling_errors: tuple[SamplingError, ...]
    """The errors of a `sampled` recording, by ascending n."""

    num_bytes: Bytes
    """Size of a target, in bytes per token."""

    supports: tuple[Support, ...]
    """Support for every combination of divergence and tail, for every temperature, and for every `token_weights`."""


class LiveFigures(Record):
    """Figures from the teacher itself on some of the rows, which are exact where the cache alone gives bounds."""

    temperature: float
    """The temperature of these figures: the cache's."""

    num_rows: int
    """Number of rows that the teacher scored."""

    entropy: float
    """Entropy of the teacher, in nats, mean over rows."""

    label_loss: float
    """Mean of minus the teacher's logprob of the real next token at `temperature`, in nats."""

    ece: float
    """Expected calibration error of the teacher's top-1 token, computed like `RecordingFidelity.ece`."""

    kept: tuple[KeptMass, ...]
    """Probability of the most probable tokens in the full distributions, also for more tokens than are stored."""

    sampling_errors: tuple[SamplingError, ...]
    """The exact errors of both ways of sampling."""


class Fidelity(Record):
    """The result of `capgap fidelity` for one cache."""

    location: str
    """Folder or URL of the cache."""

    tokenizer: TokenizerFacts
    """The tokenizer of corpus and teacher."""

    context: ContextRule
    """The context rule: what the teacher saw before a token."""

    temperature: float
    """The temperature of the recordings."""

    num_sequences: int
    """Number of sequences in the cache, without held-out ones."""

    num_sampled: int
    """Number of sequences that were read for the figures."""

    recordings: tuple[RecordingFidelity, ...]
    """The recordings by name."""

    live: LiveFigures | None
    """Figures from the teacher itself; None if it was not run."""
