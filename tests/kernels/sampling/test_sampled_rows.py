from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.kernels.sampling import reference, sampled_rows


def _counts(samples_Nn: torch.Tensor, vocab_size: int) -> torch.Tensor:
    counts_NV = torch.zeros(len(samples_Nn), vocab_size, dtype=torch.float64)
    return counts_NV.scatter_add_(1, samples_Nn.long(), torch.ones(samples_Nn.shape, dtype=torch.float64))


def _logits(num_rows: int, vocab_size: int, scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=100)
@given(
    num_rows=st.sampled_from([0, 1, 9]),
    vocab_size=st.sampled_from([1, 2, 31, 32, 33, 500, 1025]),
    num_samples=st.sampled_from([1, 2, 50, 64]),
    scale=st.sampled_from([0.1, 3.0, 50.0]),
    temperature=st.sampled_from([1.0, 2.0]),
    padding=st.sampled_from([0, 1, 40]),
    seed=st.integers(0, 2**20),
    edge=st.sampled_from([None, 0.0, 1 - 2**-24]),
)
def test_each_draw_is_the_id_at_its_point_of_the_cumulative_distribution(
    num_rows: int,
    vocab_size: int,
    num_samples: int,
    scale: float,
    temperature: float,
    padding: int,
    seed: int,
    edge: float | None,
) -> None:
    logits_NV = _logits(num_rows, vocab_size + padding, scale, seed)
    offsets_N = torch.rand(num_rows, generator=torch.Generator().manual_seed(seed))
    if edge is not None:
        offsets_N.fill_(edge)
    labels_N = torch.arange(num_rows) % vocab_size
    fast = sampled_rows(logits_NV, labels_N, offsets_N, num_samples, temperature, vocab_size)
    true = reference.sampled_rows(logits_NV, labels_N, offsets_N, num_samples, temperature, vocab_size)

    probs_NV = torch.softmax(logits_NV[:, :vocab_size].double() / temperature, -1)
    ends_NV = probs_NV.cumsum(-1)
    points_Nn = (torch.arange(num_samples) + offsets_N.double()[:, None]) / num_samples
    ids_Nn = fast.samples_Nn.long()
    # float32 probabilities up to 1 whose block sums are taken in float32: 32 roundings of 6e-8
    assert (points_Nn <= ends_NV.gather(1, ids_Nn) + 2e-6).all()
    assert (points_Nn >= (ends_NV - probs_NV).gather(1, ids_Nn) - 2e-6).all()
    assert (ids_Nn.diff(dim=-1) >= 0).all()
    assert fast.samples_Nn.dtype == torch.int32

    # the same points in float64: an id differs only where a point falls within rounding of an end
    nearest_Nn = (points_Nn[:, :, None] - ends_NV[:, None, :]).abs().amin(-1)
    clear_Nn = nearest_Nn > 2e-6
    assert torch.equal(fast.samples_Nn[clear_Nn], true.samples_Nn[clear_Nn])
    # logprobs reach 500, where half a unit in the last place of float32 is 1.5e-5; two roundings
    close = {"atol": 4e-5, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(fast.label_logprobs_N, true.label_logprobs_N, **close)
    torch.testing.assert_close(fast.top_logprobs_N, true.top_logprobs_N, **close)


@pytest.mark.parametrize("scorer", [sampled_rows, reference.sampled_rows], ids=["fast", "reference"])
def test_counts_average_to_n_p_over_the_offset(scorer) -> None:
    num_samples, num_offsets, vocab_size = 10, 512, 77
    logits_NV = _logits(1, vocab_size, 2.0).expand(num_offsets, -1)
    grid_N = (torch.arange(num_offsets) + 0.5) / num_offsets
    samples_Nn = scorer(logits_NV, torch.zeros(num_offsets, dtype=torch.long), grid_N, num_samples).samples_Nn
    mean_V = _counts(samples_Nn, vocab_size).mean(0) / num_samples
    # all offsets' points together are a grid of 5120: an interval holds its share to one point, rounding aside
    difference_V = (mean_V - torch.softmax(logits_NV[0].double(), -1)).abs()
    assert difference_V.max() <= 1.01 / (num_samples * num_offsets)


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_a_count_is_the_floor_or_the_ceiling_of_n_p(scale: float) -> None:
    num_rows, num_samples, vocab_size = 64, 50, 300
    logits_NV = _logits(num_rows, vocab_size, scale)
    offsets_N = torch.rand(num_rows, generator=torch.Generator().manual_seed(1))
    samples_Nn = sampled_rows(logits_NV, torch.zeros(num_rows, dtype=torch.long), offsets_N, num_samples).samples_Nn
    counts_NV = _counts(samples_Nn, vocab_size)
    expected_NV = num_samples * torch.softmax(logits_NV.double(), -1)
    # an expectation within float32 rounding of a whole number may fall to either side of it
    assert (counts_NV >= (expected_NV - 1e-4).floor()).all()
    assert (counts_NV <= (expected_NV + 1e-4).ceil()).all()
    assert (counts_NV.sum(-1) == num_samples).all()


@settings(max_examples=60)
@given(
    vocab_size=st.sampled_from([5, 32, 64, 97, 700]),
    num_alive=st.integers(1, 5),
    offset=st.sampled_from([0.0, 0.5, 1 - 2**-24]),
    seed=st.integers(0, 2**20),
)
def test_an_id_of_probability_zero_is_never_drawn(vocab_size: int, num_alive: int, offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    alive = torch.randperm(vocab_size, generator=generator)[:num_alive]
    logits_NV = torch.full((4, vocab_size), -torch.inf)
    logits_NV[:, alive] = torch.randn(4, num_alive, generator=generator) * 5
    samples_Nn = sampled_rows(logits_NV, torch.zeros(4, dtype=torch.long), torch.full((4,), offset), 50).samples_Nn
    assert set(samples_Nn.flatten().tolist()) <= set(alive.tolist())


def test_ends_of_a_large_vocabulary_do_not_drift() -> None:
    logits_NV = _logits(4, 128256, 0.5)
    samples_Nn = sampled_rows(logits_NV, torch.zeros(4, dtype=torch.long), torch.full((4,), 0.5), 5000).samples_Nn
    probs_NV = torch.softmax(logits_NV.double(), -1)
    ends_NV = probs_NV.cumsum(-1)
    points_n = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    above_Nn = points_n - ends_NV.gather(1, samples_Nn.long())
    below_Nn = (ends_NV - probs_NV).gather(1, samples_Nn.long()) - points_n
    # 4008 block sums of 2.5e-4, each off by about 1e-11 either way: 6e-10 together. Ends in float32 are off by 5e-8
    assert max(above_Nn.max(), below_Nn.max()) < 5e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last_alive", [0, 30, 31, 32, 97])
def test_the_last_point_stays_below_the_end_of_the_last_id_that_has_mass(last_alive: int, dtype: torch.dtype) -> None:
    # many small probabilities make the sums in float32 and float64 differ; everything after `last_alive` is dead
    logits_NV = _logits(500, 130, 0.5)
    logits_NV[:, last_alive + 1 :] = -torch.inf
    offsets_N = torch.ones(500, dtype=dtype)
    offsets_N = torch.nextafter(offsets_N, torch.zeros_like(offsets_N))
    samples_Nn = sampled_rows(logits_NV, torch.zeros(500, dtype=torch.long), offsets_N, 50).samples_Nn
    assert samples_Nn.max() <= last_alive


def test_ids_past_the_vocabulary_are_never_drawn() -> None:
    logits_NV = torch.zeros(20, 100)
    logits_NV[:, 61:] = 50
    offsets_N = torch.rand(20, generator=torch.Generator().manual_seed(0))
    rows = sampled_rows(logits_NV, torch.zeros(20, dtype=torch.long), offsets_N, 61, vocab_size=61)
    # 61 points on 61 equal ids: each once, whatever the offset, but for one that rounding moves over an end
    assert rows.samples_Nn.max() == 60
    assert (_counts(rows.samples_Nn, 61) <= 2).all()


def test_draws_do_not_depend_on_the_batch() -> None:
    logits_NV = _logits(700, 3000, 3.0)
    labels_N = torch.zeros(700, dtype=torch.long)
    offsets_N = torch.rand(700, generator=torch.Generator().manual_seed(2))
    whole = sampled_rows(logits_NV, labels_N, offsets_N, 50)
    for rows in (slice(0, 1), slice(3, 400), slice(349, 351), slice(699, 700)):
        part = sampled_rows(logits_NV[rows], labels_N[rows], offsets_N[rows], 50)
        assert torch.equal(part.samples_Nn, whole.samples_Nn[rows])
        assert torch.equal(part.top_logprobs_N, whole.top_logprobs_N[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_top_logprob_is_the_labels_bit_for_bit_where_the_label_is_the_top_1_token(dtype: torch.dtype) -> None:
    logits_NV = _logits(100, 333, 4.0).to(dtype)
    rows = sampled_rows(logits_NV, logits_NV.argmax(-1), torch.full((100,), 0.5), 3, temperature=0.7)
    assert torch.equal(rows.label_logprobs_N, rows.top_logprobs_N)


def test_a_label_outside_the_vocabulary_has_probability_zero() -> None:
    labels_N = torch.tensor([-100, 50])
    rows = sampled_rows(torch.zeros(2, 60), labels_N, torch.zeros(2), 5, vocab_size=50)
    assert rows.label_logprobs_N.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"offsets_N": torch.zeros(3)}, r"offsets_N: got \[3\] torch.float32, expected \[2\]"),
        ({"offsets_N": torch.zeros(2, dtype=torch.long)}, r"offsets_N: got \[2\] torch.int64"),
        ({"num_samples": 0}, "num_samples: got 0, expected at least 1"),
        ({"vocab_size": 0}, "vocab_size: got 0, expected 1 to 5"),
        ({"temperature": float("inf")}, "temperature: got inf"),
    ],
)
@pytest.mark.parametrize("scorer", [sampled_rows, reference.sampled_rows], ids=["fast", "reference"])
def test_what_does_not_fit_is_refused_with_what_was_got(scorer, changed: dict, message: str) -> None:
    arguments = {
        "logits_NV": torch.zeros(2, 5),
        "labels_N": torch.zeros(2, dtype=torch.long),
        "offsets_N": torch.zeros(2),
        "num_samples": 2,
    }
    with pytest.raises(ValueError, match=message):
        scorer(**(arguments | changed))


@pytest.mark.parametrize(("scale", "at_least"), [(0.3, 1.5), (4.0, 5.0)], ids=["flat", "sharp"])
def test_counts_vary_less_than_those_of_independent_samples(scale: float, at_least: float) -> None:
    num_rows, num_samples, vocab_size = 2000, 50, 60
    logits_NV = _logits(1, vocab_size, scale).expand(num_rows, -1).contiguous()
    offsets_N = torch.rand(num_rows, generator=torch.Generator().manual_seed(4))
    samples_Nn = sampled_rows(logits_NV, torch.zeros(num_rows, dtype=torch.long), offsets_N, num_samples).samples_Nn
    shares_NV = _counts(samples_Nn, vocab_size) / num_samples
    probs_V = torch.softmax(logits_NV[0].double(), -1)
    error = (shares_NV - probs_V).square().sum(-1).mean()
    # independent samples: each share has variance p (1 - p) / n
    independent = (probs_V * (1 - probs_V)).sum() / num_samples
    assert independent / error > at_least
    # exactly f (1 - f) / n^2, with f what n p has after the point; 2000 offsets leave 2 % of chance
    fraction_V = (num_samples * probs_V).frac()
    assert float(error) == pytest.approx(float((fraction_V * (1 - fraction_V)).sum() / num_samples**2), rel=0.1)


@pytest.mark.parametrize("scale", [0.3, 4.0], ids=["flat", "sharp"])
def test_counts_over_random_offsets_pass_a_chi_square_test(scale: float) -> None:
    num_rows, num_samples, vocab_size = 4000, 50, 60
    logits_NV = _logits(1, vocab_size, scale, seed=3).expand(num_rows, -1).contiguous()
    offsets_N = torch.rand(num_rows, generator=torch.Generator().manual_seed(5))
    samples_Nn = sampled_rows(logits_NV, torch.zeros(num_rows, dtype=torch.long), offsets_N, num_samples).samples_Nn
    probs_V = torch.softmax(logits_NV[0].double(), -1)
    fraction_V = (num_samples * probs_V).frac()
    variance_V = fraction_V * (1 - fraction_V) / num_rows
    difference_V = _counts(samples_Nn, vocab_size).mean(0) - num_samples * probs_V
    # each id's mean count is its expectation up to its own standard error; five of them in 60 ids are chance of 3e-5
    assert (difference_V.abs() < 5 * variance_V.sqrt() + 1e-6).all()
    # one sample of each row, at random, is an independent sample from the row's distribution: Pearson's test
    which_N = torch.randint(num_samples, (num_rows, 1), generator=torch.Generator().manual_seed(6))
    found_V = torch.bincount(samples_Nn.gather(1, which_N)[:, 0], minlength=vocab_size)
    common_V = num_rows * probs_V > 5
    terms_V = (found_V - num_rows * probs_V).square() / (num_rows * probs_V)
    degrees = int(common_V.sum()) - 1
    # mean and deviation of chi-square are its degrees and the root of twice those
    assert abs(terms_V[common_V].sum() - degrees) < 5 * (2 * degrees) ** 0.5


def test_the_block_is_small_beside_the_vocabulary_and_covers_any_number_of_draws() -> None:
    logits_NV = _logits(20, 40, 2.0)
    offsets_N = torch.rand(20, generator=torch.Generator().manual_seed(2))
    for num_samples in (1, 7, 5000):
        fast = sampled_rows(logits_NV, torch.zeros(20, dtype=torch.long), offsets_N, num_samples)
        true = reference.sampled_rows(logits_NV, torch.zeros(20, dtype=torch.long), offsets_N, num_samples)
        # a point within float32 rounding of an id's end may fall to its neighbour
        assert (fast.samples_Nn != true.samples_Nn).sum() <= 1 + num_samples * 20 // 2000
