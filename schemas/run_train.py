"""Settings of the train stage: what a student learns from, and by which loss."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_optimization import OptimizationSettings

SUPPORTED_TAILS: dict[tuple[RecordingName, str], tuple[str, ...]] = {
    ("topk", "forward_kl"): ("ghost", "drop", "renorm", "label"),
    ("topk", "reverse_kl"): ("ghost",),
    ("topk", "jsd"): ("ghost", "renorm", "label"),
    ("sampled", "forward_kl"): ("drop", "renorm"),
}
"""By recording and divergence, which `tail` the loss can have; the first is what it has where the setting is left out.
A pair that is missing has no unbiased loss. A test holds this table against that of the kernel."""


USUAL_CLIP = 0.2
"""How far from 1 a ratio of probabilities may be, where no `ratio_clip` is asked for."""


class FurtherCache(Record):
    """A cache that a student learns from beside the run's own."""

    path: str | None = Field(None, json_schema_extra=OPERATIONAL)
    """Folder or URL of a finished cache, of any corpus and teacher with the student's tokenizer; what decides is what
    lies there. Left out, it is the run's own cache, to mix its recordings."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the steps, beside the other caches' weights and `own_weight`."""

    recording: RecordingName | None = None
    """Which of its recordings to learn from; needed where it has both."""


class TrainSettings(OptimizationSettings):
    """How a student learns from a cache, or from several."""

    alpha: float = Field(1.0, ge=0, le=1)
    """Weight of the KL to the teacher; cross-entropy with the text has weight 1 - alpha. 0 is cross-entropy alone. In
    an aligned cache tokens of which the teacher says nothing have the whole of their cross-entropy."""

    later_learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With `rounds` only: the peak learning rate of the rounds after round 0, whose students have learnt already; that
    of round 0 where left out."""

    max_tokens: int | None = Field(None, ge=0)
    """Stop after this many targets, even within an epoch. 0 trains nothing: such an arm is the student as it was,
    pruned or quantised, and is measured beside the others."""

    recording: RecordingName | None = None
    """Which recording of the cache to learn from; needed where it has both."""

    temperature: float | None = Field(None, gt=0)
    """The temperature at which teacher and student are compared: `cache.temperature`, which is also the default, or for
    `topk` one of `cache.extra_temperatures`. Of an aligned cache any, 100 by default: likelihoods of chunks are raised
    to 1 over it."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "policy_gradient"] = "forward_kl"
    """What is called KL here: `forward_kl`, KL(teacher || student); `reverse_kl`; `jsd`, the generalised
    Jensen-Shannon divergence; or, with `rounds`, `policy_gradient`, the reverse KL from the one token that a student
    sampled: its advantage is the teacher's logprob minus the student's, its weight the student's probability over the
    writer's, clipped. Text that the teacher wrote is learnt by `forward_kl` then. A `sampled` cache supports
    `forward_kl` and `policy_gradient`, an aligned one `forward_kl` and `reverse_kl`."""

    ratio_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With `policy_gradient` only: how far from 1 the ratio of the student's probability to the writer's may be before
    a token counts no more (PPO: arXiv 1707.06347). 0.2 where left out."""

    jsd_beta: float | None = Field(None, gt=0, lt=1)
    """With `jsd` only: weight of KL(teacher || mixture), and the teacher's share of the mixture. 0.5 where left out."""

    tail: Literal["drop", "renorm", "ghost", "label"] | None = None
    """What becomes of the teacher's probability outside the kept ids: `drop` leaves it out, `renorm` scales the kept
    ids up to 1, `ghost` compares it with the student's as one more token, `label` adds it to the real next token. The
    default is `ghost` for a `topk` cache and `drop` for a `sampled` one, which has no tail."""

    final_alpha: float | None = Field(None, ge=0, le=1)
    """`alpha` of the last step; the first has `alpha`. Constant where left out."""

    alpha_schedule: Literal["linear", "cosine"] | None = None
    """With `final_alpha` only: how `alpha` gets there, in equal parts (`linear`) or slowly at both ends (`cosine`).
    `linear` where left out."""

    token_weights: Literal["equal", "entropy"] = "equal"
    """What a token counts in the mean: `equal`; or `entropy`, as many nats as the teacher is uncertain there, so that
    its hard tokens lead (teacher entropy as a measure of importance: arXiv 2602.01395, 2605.01732). Needs a `topk`
    cache. Tokens that the loss mask leaves out never count."""

    router_loss_weight: float = Field(0.0, ge=0)
    """Weight of a mixture of experts' load-balancing loss (arXiv 2101.03961), added to the loss; the student's own
    `router_aux_loss_coef` is not read."""

    projected_weight: float = Field(0.0, ge=0)
    """Of an aligned cache only: weight of the KL of its projected targets (`align.projected_top_k`), added to the loss.
    It is the KL of the top-k tokens at the tokens that both tokenizers have, at temperature 1. With `alpha` 0, which is
    cross-entropy alone, it does not count."""

    @model_validator(mode="after")
    def _check_alpha_schedule(self) -> Self:
        if self.alpha_schedule is not None and self.final_alpha is None:
            raise ValueError(f"alpha_schedule: found {self.alpha_schedule} alone, expected it with final_alpha")
        return self

    @property
    def alpha_shape(self) -> Literal["linear", "cosine"]:
        """How alpha moves."""
        return self.alpha_schedule or "linear"

    @property
    def needs_targets(self) -> bool:
        """Whether the cache's targets count in any step."""
        return self.targets == "cache" and self.largest_alpha > 0

    @property
    def counted_projected_weight(self) -> float:
        """The weight of projected targets, 0 where no targets count."""
        return self.projected_weight if self.needs_targets else 0.0

    @property
    def largest_alpha(self) -> float:
        """The largest alpha of all steps; 0 where none is taken, for such an arm learns from nobody."""
        return 0.0 if self.max_tokens == 0 else max(self.alpha, self.final_alpha or 0.0)

    caches: dict[str, FurtherCache] = Field(default_factory=dict)
    """Further caches by a name of yours, for example `code: {path: s3://bucket/code/cache, weight: 2}`. Each
    step is of one cache, all at one temperature. The run's own is read `num_epochs` times, the others as often
    as the mix takes."""

    own_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The share of the run's own cache beside `caches`."""

    row_len: int | None = Field(None, ge=8)
    """Targets in a row of a batch: as many whole sequences as fit stand in it one after the other, with positions of
    their own and no sight of one another, and padding without weight. Needed where caches differ in `seq_len`. A
    sequence a row where it is left out."""

    @model_validator(mode="after")
    def _check_caches(self) -> Self:
        for name in self.caches:
            if not name or "/" in name or name != name.strip():
                raise ValueError(f"caches: found the name {name!r}, expected a word")
        if not self.caches and self.own_weight != 1:
            raise ValueError(f"own_weight: found {self.own_weight:g} without caches, expected it beside others")
        return self

    targets: Literal["cache", "online"] = "cache"
    """Where the teacher's distributions come from: the `cache`; or, `online`, the teacher of the run, which then stands
    on the device beside the student and gives its whole distribution for each token of the same sequences: the
    undistorted baseline, for models that fit there together."""

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
        """The clip of `policy_gradient`."""
        return USUAL_CLIP if self.ratio_clip is None else self.ratio_clip

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself takes part; cross-entropy alone asks for nobody's distribution."""
        return self.targets == "online" and self.largest_alpha > 0

    @property
    def beta(self) -> float:
        """The beta of `jsd`."""
        return 0.5 if self.jsd_beta is None else self.jsd_beta

    def meant(self) -> dict[str, Any]:
        """The beta of `jsd`, the clip of `policy_gradient` and the way of alpha where they were left out."""
        values: dict[str, Any] = super().meant()
        if self.divergence == "jsd":
            values["jsd_beta"] = self.beta
        if self.divergence == "policy_gradient":
            values["ratio_clip"] = self.clip
        if self.final_alpha is not None:
            values["alpha_schedule"] = self.alpha_shape
        return values
