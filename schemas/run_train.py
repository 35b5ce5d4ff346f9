"""Settings of the train stage: what a student learns from, and by which loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_optimization import OptimizationSettings

SUPPORTED_TAILS: dict[tuple[RecordingName, str], tuple[str, ...]] = {
    ("topk", "forward_kl"): ("ghost", "drop", "renorm", "label"),
    ("topk", "reverse_kl"): ("ghost",),
    ("topk", "jsd"): ("ghost", "renorm", "label"),
    ("sampled", "forward_kl"): ("drop", "renorm"),
}
"""The values of `tail` that the loss supports for each recording and divergence, the default first. A pair that is not
listed has no unbiased loss. A test compares this table with the kernel's."""


USUAL_CLIP = 0.2
"""Default of `ratio_clip`: the largest distance of a probability ratio from 1."""


class FurtherCache(Record):
    """A cache that a student learns from in addition to the run's own."""

    path: Annotated[str | None, PATH] = Field(None, json_schema_extra=OPERATIONAL)
    """Folder or URL of a finished cache of any corpus and teacher, with the student's tokenizer. The cache found there
    decides the result, not its address. Left out, the run's own cache, to mix its two recordings."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Weight of this cache: its share of the steps is its weight over the sum of all weights and `own_weight`."""

    recording: RecordingName | None = None
    """Which recording of the cache to learn from; needed if it has both."""


class TrainSettings(OptimizationSettings):
    """How a student learns from a cache, or from several."""

    alpha: float = Field(1.0, ge=0, le=1)
    """Weight of the KL to the teacher. Cross-entropy with the text has weight 1 - alpha; 0 is cross-entropy alone. With
    an aligned cache, tokens without a target of the teacher count by their cross-entropy with weight 1."""

    later_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With `rounds` only: peak learning rate of the rounds after round 0, often lower because their students are
    trained already. Left out, `learning_rate`."""

    max_tokens: int | None = Field(None, ge=0)
    """Stop after this many targets, even within an epoch. 0 trains nothing: such an arm is the untrained, pruned or
    quantised student, measured beside the others as a baseline."""

    recording: RecordingName | None = None
    """Which recording of the cache to learn from; needed if the cache has both."""

    temperature: float | None = Field(None, gt=0)
    """Temperature at which teacher and student are compared: `cache.temperature`, or, with `topk`, one of
    `cache.extra_temperatures`. Left out, `cache.temperature`. With an aligned cache, any value T (100 by default): the
    likelihood of a chunk is raised to the power 1 / T."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "policy_gradient"] = "forward_kl"
    """Divergence of the loss, weighted by `alpha`: `forward_kl`, KL(teacher || student); `reverse_kl`,
    KL(student || teacher); `jsd`, the generalised Jensen-Shannon divergence; or, with `rounds`, `policy_gradient`,
    reverse KL estimated from the one token that a student sampled. Its advantage is the teacher's logprob minus the
    student's, its weight the ratio of the student's probability to the writer's, clipped; text that the teacher wrote
    is then learnt by `forward_kl`. A `sampled` cache supports `forward_kl` and `policy_gradient`, an aligned cache
    `forward_kl` and `reverse_kl`."""

    ratio_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With `policy_gradient` only: largest distance from 1 of the ratio of the student's probability to the writer's. A
    token beyond it no longer adds to the gradient (PPO: arXiv 1707.06347). Left out, 0.2."""

    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """With `jsd` only: weight of KL(teacher || mixture), and the teacher's share of the mixture. Left out, 0.5."""

    tail: Literal["drop", "renorm", "ghost", "label"] | None = None
    """How the loss treats the teacher's probability outside the stored tokens. `drop` ignores it. `renorm` scales the
    stored tokens' probabilities up to 1. `ghost` compares it with the student's as one more token. `label` adds it to
    the real next token. Left out, `ghost` for a `topk` cache, and `drop` for a `sampled` cache, which has no tail."""

    final_alpha: float | None = Field(None, ge=0, le=1)
    """Value of `alpha` at the last step; it begins at `alpha`. Left out, `alpha` is constant."""

    alpha_schedule: Literal["linear", "cosine"] | None = None
    """With `final_alpha` only: how `alpha` changes: by equal steps (`linear`), or slowly at both ends (`cosine`). Left
    out, `linear`."""

    token_weights: Literal["equal", "entropy"] = "equal"
    """Weight of each token in the mean loss. `equal`: all the same. `entropy`: the teacher's entropy there in nats, so
    that tokens of which the teacher is uncertain count more (arXiv 2602.01395, 2605.01732); it needs a `topk` cache.
    Tokens outside the loss mask never count."""

    router_loss_weight: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of a mixture-of-experts student (arXiv 2101.03961), which is added to the loss.
    It replaces the student's own `router_aux_loss_coef`."""

    projected_weight: float = Field(0.0, ge=0)
    """With an aligned cache only: weight of the KL of its projected targets (`align.projected_top_k`), which is added
    to the loss. It compares the top-k tokens that both tokenizers have, at temperature 1. With `alpha: 0`, which means
    cross-entropy alone, it has no effect."""

    @model_validator(mode="after")
    def _check_alpha_schedule(self) -> Self:
        if self.alpha_schedule is not None and self.final_alpha is None:
            raise ValueError(f"alpha_schedule: found {self.alpha_schedule} alone, expected it with final_alpha")
        return self

    @property
    def alpha_shape(self) -> Literal["linear", "cosine"]:
        """The schedule of alpha: `alpha_schedule`, with its default."""
        return self.alpha_schedule or "linear"

    @property
    def needs_targets(self) -> bool:
        """Whether the loss of any step uses the cache's targets."""
        return self.targets == "cache" and self.largest_alpha > 0

    @property
    def counted_projected_weight(self) -> float:
        """The weight of projected targets; 0 if the loss uses no targets of the cache."""
        return self.projected_weight if self.needs_targets else 0.0

    @property
    def largest_alpha(self) -> float:
        """The largest alpha of all steps; 0 for an arm of no steps, which uses no teacher."""
        return 0.0 if self.max_tokens == 0 else max(self.alpha, self.final_alpha or 0.0)

    caches: dict[str, FurtherCache] = Field(default_factory=dict)
    """Further caches to learn from, by a name of your choice, for example `code: {path: s3://bucket/code/cache,
    weight: 2}`. Each step uses one cache; all caches are read at one temperature. The run's own cache is read
    `num_epochs` times, the others as often as their weights need."""

    own_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Weight of the run's own cache, beside the weights of `caches`."""

    row_len: int | None = Field(None, ge=8)
    """Targets in a row of a batch. A row holds as many whole sequences as fit, each with its own positions and without
    attention to the others, and padding that does not count. Needed if caches differ in `seq_len`. Left out, each row
    holds one sequence."""

    @model_validator(mode="after")
    def _check_caches(self) -> Self:
        for name in self.caches:
            if not name or "/" in name or name != name.strip():
                raise ValueError(f"caches: found the name {name!r}, expected a word")
        if not self.caches and self.own_weight != 1:
            raise ValueError(f"own_weight: found {self.own_weight:g} without caches, expected it beside others")
        return self

    targets: Literal["cache", "online"] = "cache"
    """Where the teacher's distributions come from. `cache`: the cache. `online`: the run's teacher, which is then on
    the device beside the student and gives its whole distribution for each token of the same sequences. That is a
    baseline without any loss from storing, for models that fit on the device together."""

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.targets == "online" and self.tail is not None:
            raise ValueError(f"tail: found {self.tail} with targets online, expected none; there is no tail")
        return self

    @model_validator(mode="after")
    def _check_beta(self) -> Self:
        if self.jsd_beta is not None and self.divergence != "jsd":
            raise ValueError(f"jsd_beta: found {self.jsd_beta} with divergence {self.divergence}, expected it with jsd")
        return self

    @model_validator(mode="after")
    def _check_policy_gradient(self) -> Self:
        if self.divergence != "policy_gradient":
            if self.ratio_clip is not None:
                raise ValueError(
                    f"ratio_clip: found {self.ratio_clip:g} with divergence {self.divergence}, expected it with "
                    "policy_gradient"
                )
            return self
        needed: dict[str, Any] = {"tail": None, "targets": "cache", "decode": "host", "strategy": "ddp"}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: found {getattr(self, name)} with divergence policy_gradient, expected {value or 'none'}"
                )
        if self.temperature not in (None, 1):
            raise ValueError(f"temperature: found {self.temperature:g} with divergence policy_gradient, expected 1")
        return self

    @property
    def clip(self) -> float:
        """The clip of `policy_gradient`: `ratio_clip`, with its default."""
        return USUAL_CLIP if self.ratio_clip is None else self.ratio_clip

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is needed for the training: with online targets, unless alpha is always 0."""
        return self.targets == "online" and self.largest_alpha > 0

    @property
    def beta(self) -> float:
        """The beta of `jsd`: `jsd_beta`, with its default."""
        return 0.5 if self.jsd_beta is None else self.jsd_beta

    def meant(self) -> dict[str, Any]:
        """Return the beta of `jsd`, the clip of `policy_gradient` and the schedule of alpha, with their defaults."""
        values: dict[str, Any] = super().meant()
        if self.divergence == "jsd":
            values["jsd_beta"] = self.beta
        if self.divergence == "policy_gradient":
            values["ratio_clip"] = self.clip
        if self.final_alpha is not None:
            values["alpha_schedule"] = self.alpha_shape
        return values
