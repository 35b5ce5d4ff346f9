from __future__ import annotations

import numpy as np
import pytest
import torch

from capgap.pipeline.eval.calibration import NUM_BINS, CalibrationError
from capgap.pipeline.eval.intervals import resample_weights
from capgap.pipeline.eval.measure import score

VOCAB_SIZE = 128


def _rows(confidence: float, num_rows: int) -> torch.Tensor:
    """Id 0 has that probability, ids 1 to 3 share the rest."""
    row = torch.full((4,), (1 - confidence) / 3)
    row[0] = confidence
    return row.log().repeat(num_rows, 1)


def _error(*groups: tuple[float, int, int]) -> float:
    """Of sequences with one confidence each, so many rows, and so many of them right."""
    calibration = CalibrationError(len(groups))
    for sequence, (confidence, num_rows, num_right) in enumerate(groups):
        labels_N = torch.tensor([0] * num_right + [1] * (num_rows - num_right))
        calibration.add(sequence, _rows(confidence, num_rows), labels_N)
    labels_S = np.array([num_rows for _, num_rows, _ in groups])
    return calibration.error(labels_S, resample_weights(len(groups), 100))[0]


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ([(0.8, 10, 8)], 0.0),
        ([(0.8, 10, 5)], 0.3),
        ([(0.8, 10, 10)], 0.2),
        # of one bin, errors of opposite sign make up for one another; of two they do not
        ([(0.82, 10, 10), (0.82, 10, 6)], 0.02),
        ([(0.9, 10, 10), (0.5, 10, 4)], 0.1),
        # by rows, not by bins
        ([(0.9, 30, 30), (0.5, 10, 0)], 0.2),
        # 1/3 closes the fifth bin and 0.34 lies in the sixth: were they one, they would make up for one another
        ([(1 / 3 - 1e-6, 10, 4), (0.34, 10, 2)], (0.4 - 1 / 3 + 0.14) / 2),
    ],
)
def test_planted_confidences_have_the_error_of_the_definition(groups, error: float) -> None:
    # probabilities are float32
    assert _error(*groups) == pytest.approx(error, abs=2e-6)


def test_bins_have_equal_width() -> None:
    calibration = CalibrationError(1)
    for bin_number in range(4, NUM_BINS):  # four ids cannot all be less likely than a quarter
        calibration.add(0, _rows((bin_number + 0.5) / NUM_BINS, 1), torch.tensor([0]))
    expected_B = [-(1 - (number + 0.5) / NUM_BINS) if number >= 4 else 0 for number in range(NUM_BINS)]
    np.testing.assert_allclose(calibration.excess_SB[0], expected_B, atol=1e-6)
    bins = calibration.reliability()
    assert [(one.num_tokens, one.right) for one in bins] == [(1, pytest.approx(1.0))] * (NUM_BINS - 4)
    assert [one.confidence for one in bins] == pytest.approx([(n + 0.5) / NUM_BINS for n in range(4, NUM_BINS)])


def test_the_interval_of_a_miscalibrated_model_holds_its_error() -> None:
    """Sequences at random of the same miscalibrated model."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        calibration = CalibrationError(60)
        for sequence in range(60):
            labels_N = torch.from_numpy((rng.random(20) > 0.6).astype(np.int64))  # right at 60 %
            calibration.add(sequence, _rows(0.9, 20), labels_N)
        _, interval = calibration.error(np.full(60, 20), resample_weights(60, 200))
        held += interval.low <= 0.3 <= interval.high
    assert held >= 34  # 95 % nominal: fewer than 34 of 40 come with a probability of 1 in 1000


def test_a_model_is_scored_like_a_direct_computation(make_model, make_sequences) -> None:
    model, sequences = make_model(), make_sequences()
    calibration = CalibrationError(len(sequences))
    score(model, sequences, name="m", vocab_size=VOCAB_SIZE, batch_sequences=4, calibration=calibration)
    mask_BL = sequences.mask_BL1[:, 1:]
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    with torch.inference_mode():
        p_NV = model(input_ids=tokens[:, :-1]).logits[torch.from_numpy(mask_BL)].double().softmax(-1).numpy()
    right_N = p_NV.argmax(1) == sequences.tokens_BL1[:, 1:][mask_BL]
    confidence_N = p_NV.max(1)
    expected = 0.0
    for low in np.arange(NUM_BINS) / NUM_BINS:
        inside = (confidence_N > low) & (confidence_N <= low + 1 / NUM_BINS)
        if inside.any():
            expected += inside.mean() * abs(right_N[inside].mean() - confidence_N[inside].mean())
    found, _ = calibration.error(mask_BL.sum(1), resample_weights(len(sequences), 100))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found > 0.1, "random weights are right by chance alone"
