from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.kernels.sampling import reference, sampled_and_topk_rows, sampled_rows, topk_rows

POWERS = (0.25, 2.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, float, int | None]:
    num_rows, num_columns = draw(st.sampled_from([0, 1, 7])), draw(st.sampled_from([1, 2, 31, 33, 257]))
    vocab_size = draw(st.sampled_from([None, max(1, num_columns - 3)]))
    top_k = draw(st.sampled_from([1, max(1, num_columns // 2), num_columns if vocab_size is None else vocab_size]))
    top_k = min(top_k, num_columns if vocab_size is None else vocab_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([0.1, 3.0, 80.0]))
    logits_NV = torch.randn(num_rows, num_columns, generator=generator) * scale
    labels_N = torch.randint(0, num_columns if vocab_size is None else vocab_size, (num_rows,), generator=generator)
    return logits_NV, labels_N, top_k, draw(st.sampled_from([1.0, 2.0])), vocab_size


@settings(max_examples=80)
@given(cases())
def test_the_fast_scorer_agrees_with_float64(case: tuple[torch.Tensor, torch.Tensor, int, float, int | None]) -> None:
    logits_NV, labels_N, top_k, temperature, vocab_size = case
    fast = topk_rows(logits_NV, labels_N, top_k, temperature, vocab_size, POWERS)
    true = reference.topk_rows(logits_NV, labels_N, top_k, temperature, vocab_size, POWERS)
    # logprobs reach 500, where half a unit in the last place of float32 is 1.5e-5; two roundings
    close = {"atol": 4e-5, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(fast.logprobs_NK, true.logprobs_NK, **close)
    torch.testing.assert_close(fast.label_logprobs_N, true.label_logprobs_N, **close)
    # an error of 4e-5 in a logprob is a relative error of 4e-5 in a probability
    torch.testing.assert_close(fast.tail_N, true.tail_N, atol=1e-37, rtol=1e-4, check_dtype=False)
    # raised to a power, logprobs and their errors grow by it
    log_tails = {"atol": 4e-5 * max(POWERS), "rtol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(fast.log_tails_NT, true.log_tails_NT, **log_tails)
    # ids may differ among equals only: each id has the logprob that stands beside it
    logprobs_NV = torch.log_softmax(logits_NV[:, :vocab_size].double() / temperature, -1)
    at_ids_NK = logprobs_NV.gather(1, fast.ids_NK.long())
    torch.testing.assert_close(fast.logprobs_NK, at_ids_NK, **close)
    assert all(len(set(row)) == top_k for row in fast.ids_NK.tolist())
    assert (fast.logprobs_NK.diff(dim=-1) <= 0).all()


def test_a_tail_of_a_billionth_keeps_its_digits() -> None:
    probs_NV = torch.full((1, 1000), 1e-12, dtype=torch.float64)
    probs_NV[0, 10:20] = (1 - 990e-12) / 10
    tail = topk_rows(probs_NV.log().float(), torch.zeros(1, dtype=torch.long), 10).tail_N
    # logits of -27.6 are rounded to 1e-6; 1 - sum would be off by float32's 6e-8, sixty times the tail
    assert tail.item() == pytest.approx(990e-12, rel=3e-6)


def test_keeping_the_whole_vocabulary_leaves_a_tail_of_exactly_zero() -> None:
    logits_NV = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    assert (topk_rows(logits_NV, torch.zeros(5, dtype=torch.long), 33).tail_N == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_label_has_the_logprob_of_its_entry_bit_for_bit(dtype: torch.dtype) -> None:
    logits_NV = torch.randn(400, 301, generator=torch.Generator().manual_seed(0)).mul(5).to(dtype)
    labels_N = torch.arange(400) % 301
    rows = topk_rows(logits_NV, labels_N, 100, temperature=1.7)
    kept_NK = rows.ids_NK == labels_N[:, None]
    assert 50 < kept_NK.any(-1).sum() < 350
    entries_N = rows.logprobs_NK.where(kept_NK, -torch.inf).amax(-1)
    kept_N = kept_NK.any(-1)
    assert torch.equal(entries_N[kept_N], rows.label_logprobs_N[kept_N])


def test_columns_past_the_vocabulary_are_as_if_they_were_not_there() -> None:
    logits_NV = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    labels_N = torch.arange(9)
    alone = topk_rows(logits_NV[:, :50].contiguous(), labels_N, 5)
    logits_NV[:, 50:] = 1000
    padded = topk_rows(logits_NV, labels_N, 5, vocab_size=50)
    assert torch.equal(alone.ids_NK, padded.ids_NK)
    assert torch.equal(alone.logprobs_NK, padded.logprobs_NK)
    assert torch.equal(alone.tail_N, padded.tail_N)


def test_a_label_outside_the_vocabulary_has_probability_zero() -> None:
    labels_N = torch.tensor([-100, 50, 3])
    label_logprobs_N = topk_rows(torch.zeros(3, 60), labels_N, 5, vocab_size=50).label_logprobs_N
    assert label_logprobs_N[:2].tolist() == [-torch.inf, -torch.inf]
    assert label_logprobs_N[2].item() == pytest.approx(-3.912023, abs=1e-6)  # log 1/50, one rounding of float32


def test_the_callers_logits_are_left_alone() -> None:
    logits_NV = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    before_NV = logits_NV.clone()
    topk_rows(logits_NV, torch.zeros(3, dtype=torch.long), 4)
    assert torch.equal(logits_NV, before_NV)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits_NV": torch.zeros(4)}, r"logits_NV: got \[4\]"),
        ({"logits_NV": torch.zeros(2, 5, dtype=torch.int32)}, r"logits_NV: got \[2, 5\] torch.int32"),
        ({"labels_N": torch.zeros(3, dtype=torch.long)}, r"labels_N: got \[3\]"),
        ({"labels_N": torch.zeros(2)}, r"labels_N: got \[2\] torch.float32"),
        ({"top_k": 6}, "top_k: got 6, expected 1 to 5"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 4, "vocab_size": 3}, "top_k: got 4, expected 1 to 3"),
        ({"vocab_size": 6}, "vocab_size: got 6, expected 1 to 5"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
    ],
)
@pytest.mark.parametrize("scorer", [topk_rows, reference.topk_rows], ids=["fast", "reference"])
def test_what_does_not_fit_is_refused_with_what_was_got(scorer, changed: dict, message: str) -> None:
    arguments = {"logits_NV": torch.zeros(2, 5), "labels_N": torch.zeros(2, dtype=torch.long), "top_k": 2}
    with pytest.raises(ValueError, match=message):
        scorer(**(arguments | changed))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_kept_powers_and_the_further_tail_are_the_softmax_at_that_temperature(temperature: float) -> None:
    logits_NV = torch.randn(20, 400, generator=torch.Generator().manual_seed(1)) * 3
    rows = topk_rows(logits_NV, torch.zeros(20, dtype=torch.long), 12, 1.5, powers=[7.0, 1.5 / temperature])
    true_NV = (logits_NV.double() / temperature).softmax(-1)
    parts_NK1 = torch.cat([rows.logprobs_NK * 1.5 / temperature, rows.log_tails_NT[:, 1:]], dim=1)
    found_NK1 = parts_NK1.double().softmax(-1)
    kept_NK = true_NV.gather(1, rows.ids_NK.long())
    # logprobs of up to 20 nats in float32, times 3
    torch.testing.assert_close(found_NK1[:, :-1], kept_NK, rtol=2e-5, atol=0)
    tail_N = true_NV.scatter(1, rows.ids_NK.long(), 0).sum(1)
    torch.testing.assert_close(found_NK1[:, -1], tail_N, rtol=2e-5, atol=0)


def test_a_power_that_is_none_is_refused() -> None:
    for scorer in (topk_rows, reference.topk_rows):
        for power in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="powers: got"):
                scorer(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), 2, powers=[power])


@pytest.mark.parametrize("vocab_size", [None, 290])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_both_from_one_softmax_are_each_as_alone(vocab_size: int | None, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    # rows of several parts: a CPU goes through 2^20 logits at a time
    logits_NV = torch.randn(8000, 300, generator=generator) * 4
    labels_N, offsets_N = torch.arange(8000) % 290, torch.rand(8000, generator=generator)
    drawn, kept = sampled_and_topk_rows(logits_NV, labels_N, offsets_N, 50, 9, temperature, vocab_size, POWERS)
    for found, alone in (
        (drawn, sampled_rows(logits_NV, labels_N, offsets_N, 50, temperature, vocab_size)),
        (kept, topk_rows(logits_NV, labels_N, 9, temperature, vocab_size, POWERS)),
    ):
        for name, tensor in vars(alone).items():
            assert torch.equal(getattr(found, name), tensor), name


@pytest.mark.parametrize("top_k", [1, 2, 17, 64, 300])
@pytest.mark.parametrize("vocab_size", [1000, 4096, 4099, 50257])
def test_ids_found_in_two_steps_are_those_of_one(vocab_size: int, top_k: int) -> None:
    logits_NV = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(1))
    logits_NV[0] = logits_NV[0].round()  # hundreds of equals
    logits_NV[1, 30:] = -torch.inf
    logits_NV[2, :-3] -= 50  # the most probable stand behind the last whole column
    rows = topk_rows(logits_NV, torch.zeros(6, dtype=torch.long), top_k)
    true = reference.topk_rows(logits_NV, torch.zeros(6, dtype=torch.long), top_k)
    # float32 against float64 logprobs of up to 60 nats
    torch.testing.assert_close(rows.logprobs_NK, true.logprobs_NK, atol=1e-5, rtol=1e-6, check_dtype=False)
    assert torch.equal(logits_NV.gather(1, rows.ids_NK.long()), logits_NV.topk(top_k).values)
    assert all(len(set(row)) == top_k for row in rows.ids_NK.tolist())
