"""States in one sentence whether distillation helped, with no claim beyond what the interval allows."""

from __future__ import annotations

from collections.abc import Mapping

from capgap.pipeline.report.summary import Gain, SeedGain
from capgap.schemas.results import EvalResults, Interval, PairedDifference, SeedsDifference


def gains(results: EvalResults, alphas: Mapping[str, float]) -> tuple[Gain, ...]:
    """Compare every arm that is distilled with every arm that is trained with cross-entropy alone.

    Args:
        results: Results of the eval stage.
        alphas: Largest weight of the KL in any step, by arm; 0 means cross-entropy alone.
    """
    distilled = [arm for arm in results.arms if alphas[arm] > 0]
    baselines = [arm for arm in results.arms if alphas[arm] == 0]
    found = (_gain(results, arm, baseline) for arm in distilled for baseline in baselines)
    return tuple(gain for gain in found if gain is not None)


def verdict(gain: Gain, num_sequences: int) -> str:
    """Return the sentence on a gain that was measured on `num_sequences` held-out sequences."""
    size = f"{abs(gain.difference):.4f} nats/token"
    if gain.interval.low > 0:
        claim = f"{gain.arm} beats {gain.baseline} by {size}"
        interval = gain.interval
    elif gain.interval.high < 0:
        claim = f"{gain.arm} does not beat {gain.baseline}: its loss is higher by {size}"
        interval = _negated(gain.interval)
    else:
        ahead = gain.arm if gain.difference >= 0 else gain.baseline
        claim = f"{gain.arm} and {gain.baseline} cannot be told apart: {ahead} is ahead by {size}"
        interval = gain.interval if gain.difference >= 0 else _negated(gain.interval)
    return f"{claim} ({_basis(interval, num_sequences, len(gain.seeds))}){_by_seed(gain)}"


def no_verdict(results: EvalResults, alphas: Mapping[str, float]) -> str:
    """Return the sentence for a run in which no distilled arm can be compared with an arm of cross-entropy."""
    if all(alphas[arm] > 0 for arm in results.arms):
        return "no arm has alpha 0, so distillation is not compared with cross-entropy alone"
    return "no arm is distilled (alpha above 0), so there is nothing to compare"


def _gain(results: EvalResults, arm: str, baseline: str) -> Gain | None:
    pair = {arm, baseline}
    paired = [one for one in results.paired if {one.first, one.second} == pair]
    over_seeds = [one for one in results.over_seeds if {one.first, one.second} == pair]
    if not paired:
        return None
    difference, interval = _oriented(over_seeds[0] if over_seeds else paired[0], baseline)
    seeds = []
    for one in paired:
        seed_difference, seed_interval = _oriented(one, baseline)
        seeds.append(SeedGain(seed=one.seed, difference=seed_difference, interval=seed_interval))
    return Gain(arm=arm, baseline=baseline, difference=difference, interval=interval, seeds=tuple(seeds))


def _oriented(found: PairedDifference | SeedsDifference, baseline: str) -> tuple[float, Interval]:
    """Return the difference and its interval with the sign of the baseline's loss minus the arm's loss."""
    if found.first == baseline:
        return found.difference, found.interval
    return -found.difference, _negated(found.interval)


def _negated(interval: Interval) -> Interval:
    return Interval(low=-interval.high, high=-interval.low)


def _basis(interval: Interval, num_sequences: int, num_seeds: int) -> str:
    numbers = f"95 % interval {interval.low:.4f} to {interval.high:.4f}"
    if num_seeds == 1:
        return f"{numbers} over {num_sequences} held-out sequences, 1 seed"
    return f"{numbers} over {num_seeds} seeds, {num_sequences} held-out sequences each"


def _by_seed(gain: Gain) -> str:
    if len(gain.seeds) == 1:
        return ""
    num_wins = sum(one.difference > 0 for one in gain.seeds)
    each = ", ".join(f"seed {one.seed}: {one.difference:+.4f}" for one in gain.seeds)
    return f"; {gain.arm} has the lower loss at {num_wins} of {len(gain.seeds)} seeds ({each})"
