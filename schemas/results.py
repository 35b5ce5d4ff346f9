"""`results.json`: what the eval stage measured, model by model and arm against arm.

loss        mean of minus the logprob of the real next token, nats per token, over all labels of the held-out text
interval    95 %, from resampling held-out sequences; over several seeds, Student's t of the seeds' differences
difference  loss of `first` minus loss of `second`, on the same text: positive means that `second` is better
"""

from __future__ import annotations

from capgap.schemas.base import Record

RESULTS_NAME = "results.json"
TEACHER = "teacher"


class Interval(Record):
    """A 95 % interval."""

    low: float
    """Lower end."""

    high: float
    """Upper end."""


class AgainstTeacher(Record):
    """How near a student's distributions come to the teacher's full ones, as means over labelled positions."""

    kl: float
    """KL(teacher || student) over the whole real vocabulary at temperature 1, nats per token."""

    top1: float
    """Share of positions at which both hold the same id for the likeliest."""

    top5: float
    """Share of the teacher's five likeliest ids that are among the student's five likeliest."""

    acceptance: float
    """Sum over ids of the smaller probability: how often speculative decoding accepts the student's draft."""


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
    """Nats per token."""

    loss_interval: Interval
    """Over the choice of held-out sequences."""

    bits_per_byte: float
    """Loss per UTF-8 byte of text; independent of the tokenizer."""

    perplexity: float
    """exp(loss)."""

    against_teacher: AgainstTeacher | None
    """None for the teacher itself."""


class PairedDifference(Record):
    """Two arms of one seed, sequence by sequence on the same text."""

    first: str
    """An arm."""

    second: str
    """Another arm."""

    seed: int
    """Of both: the same initial weights and data order."""

    difference: float
    """Loss of `first` minus loss of `second`."""

    interval: Interval
    """Over the choice of held-out sequences; says nothing about other seeds."""


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


class EvalResults(Record):
    """Everything in `results.json`."""

    num_sequences: int
    """Held-out sequences behind the losses."""

    num_labels: int
    """Labels in them."""

    num_full_sequences: int
    """Of these, sequences compared with the teacher's full distribution."""

    num_full_labels: int
    """Labels in those."""

    num_bootstrap: int
    """Resamples behind each interval."""

    models: tuple[ModelResult, ...]
    """The teacher first, then arm after arm in the order of the run file, by seed."""

    paired: tuple[PairedDifference, ...]
    """Every two arms at every seed that both have."""

    over_seeds: tuple[SeedsDifference, ...]
    """Every two arms that share at least two seeds."""

    @property
    def teacher(self) -> ModelResult:
        """The teacher's row."""
        return self.models[0]

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(dict.fromkeys(model.arm for model in self.models if model.arm is not None))

    def of_arm(self, arm: str) -> tuple[ModelResult, ...]:
        """The arm's models, by seed."""
        return tuple(model for model in self.models if model.arm == arm)
