"""One interface and three engines: the same rows from all of them, whatever the teacher's head looks like.

Legend: L targets of a sequence, K ids kept, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from capgap.pipeline.cache.scoring import Request, Scored
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.schemas.errors import InputError, SettingError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")

SEQ_LEN = 48
VOCAB_SIZE = 300

# All compute in float32; products and attention sum in another order. Measured: 1.6e-5.
TOLERANCE_NATS = 1e-4

TEACHERS = {
    "padded head, grouped queries": {},
    "exact head, grouped queries": {"num_columns": VOCAB_SIZE},
    "tied padded head, a key for every query": {"tied": True, "num_kv_heads": 4},
    "tied exact head, one key for all queries": {"tied": True, "num_kv_heads": 1, "num_columns": VOCAB_SIZE},
}
WAYS = [(teacher, "worker") for teacher in TEACHERS] + [
    (teacher, "public") for teacher, settings in TEACHERS.items() if "num_columns" in settings
]
# each is a start of vLLM
QUICK = [("padded head, grouped queries", "worker"), ("tied exact head, one key for all queries", "worker")]
QUICK += [("exact head, grouped queries", "public")]
CASES = [pytest.param(way, id=f"{way[1]}, {way[0]}", marks=() if way in QUICK else pytest.mark.slow) for way in WAYS]


@pytest.fixture(scope="module")
def submission(requests_of) -> list[Request]:
    """Sequences of 48, 1 and 7 to 30 targets, of which two are equal."""
    requests = requests_of(24)
    cut = [Request(request.tokens_L1[: 8 + index]) for index, request in enumerate(requests_of(24))]
    return [*requests, Request(requests[0].tokens_L1[:2]), *cut, requests[3]]


@pytest.fixture(scope="module", params=CASES)
def engines(request, teacher_folder, recording) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    """One of vLLM that cuts sequences in two, and the reference, which knows every id's logprob."""
    teacher, capture = request.param
    folder = teacher_folder(**TEACHERS[teacher])
    settings = recording("topk", 16, chunk_rows=64)
    engine = VllmEngine(folder, settings, SEQ_LEN, "auto", 100, 0.5, "cpu", capture=capture)
    yield engine, TransformersEngine(folder, recording("topk", VOCAB_SIZE), "float32", 4096, "cpu")
    engine.close()


def _by_id(scored: Scored) -> np.ndarray:
    logprobs_LV = np.empty_like(scored.logprobs_LK)
    np.put_along_axis(logprobs_LV, scored.ids_LK.astype(np.int64), scored.logprobs_LK, 1)
    return logprobs_LV


@pytest.mark.parametrize("num_ids", [16, 1, VOCAB_SIZE])
def test_every_engine_gives_the_rows_of_the_reference(engines, submission, recording, num_ids: int) -> None:
    engine, reference = engines
    engine.record(recording("topk", num_ids, chunk_rows=64))
    swapped = 0
    for request, scored, wanted in zip(submission, engine.score(submission), reference.score(submission), strict=True):
        assert scored.ids_LK.shape == scored.logprobs_LK.shape == (len(request.tokens_L1) - 1, num_ids)
        assert scored.ids_LK.max() < VOCAB_SIZE
        logprobs_LV = _by_id(wanted)
        at_ids_LK = np.take_along_axis(logprobs_LV, scored.ids_LK.astype(np.int64), 1)
        assert np.abs(scored.logprobs_LK - at_ids_LK).max() < TOLERANCE_NATS
        assert np.abs(at_ids_LK - wanted.logprobs_LK[:, :num_ids]).max() < TOLERANCE_NATS, "not among the top-k tokens"
        assert np.abs(scored.label_logprobs_L - wanted.label_logprobs_L).max() < TOLERANCE_NATS
        tail_L = np.exp(wanted.logprobs_LK[:, num_ids:], dtype=np.float64).sum(1)
        assert np.abs(scored.tail_L - tail_L).max() < TOLERANCE_NATS
        swapped += int((np.sort(scored.ids_LK) != np.sort(wanted.ids_LK[:, :num_ids])).any(1).sum())
    # of 1600 rows, those whose K-th and next logprob are within rounding of each other; measured: none to one
    assert swapped <= 4


def test_a_label_has_the_logprob_of_its_entry_bit_for_bit(engines, submission, recording) -> None:
    engine, _ = engines
    engine.record(recording("topk", 40, chunk_rows=64))
    top_k = num_last = 0
    for request, scored in zip(submission, engine.score(submission), strict=True):
        kept_LK = scored.ids_LK == request.tokens_L1[1:, None]
        rows_L = kept_LK.any(1)
        assert (scored.logprobs_LK[kept_LK] == scored.label_logprobs_L[rows_L]).all()
        top_k, num_last = top_k + int(rows_L.sum()), num_last + int(rows_L[-1])
    assert top_k > 100
    assert 0 < num_last < len(submission), "last rows of both kinds: the label among those kept, and not"


def test_a_sequence_too_long_or_with_unknown_ids_is_refused_by_name_and_nothing_is_left_behind(
    engines, submission, recording
) -> None:
    vllm_engine, reference = engines
    vllm_engine.record(recording("topk", 16))
    good = submission[1]
    for engine in (vllm_engine, reference):
        for place, token in [(5, VOCAB_SIZE), (48, VOCAB_SIZE + 5), (0, -1)]:
            tokens_L1 = good.tokens_L1.copy()
            tokens_L1[place] = token
            bad = Request(tokens_L1)
            name = rf"sequence {bad.digest.hex()[:12]}, token {place}: .* found {token}, expected 0 to 299"
            with pytest.raises(InputError, match=name):
                engine.score([good, bad])
        long = Request(np.append(good.tokens_L1, good.tokens_L1[:1]))
        with pytest.raises(InputError, match=r"found 49 tokens before the last, expected at most 48"):
            engine.score([long])
        with pytest.raises(InputError, match="nothing to be scored; found 1 tokens"):
            engine.score([Request(good.tokens_L1[:1])])
    assert len(vllm_engine.score([good])) == 1


def test_more_ids_than_the_vocabulary_has_are_refused(engines, recording) -> None:
    engine, _ = engines
    with pytest.raises(SettingError, match=r"cache\.top_k: .* found 301, expected at most 300"):
        engine.record(recording("topk", VOCAB_SIZE + 1))


@pytest.mark.parametrize("capture", ["worker", "public", None], ids=["worker", "public", "transformers"])
def test_logits_that_are_not_finite_name_their_sequence(teacher_folder, requests_of, recording, capture) -> None:
    folder = teacher_folder(num_columns=VOCAB_SIZE, broken_id=299)
    fine = [Request(np.minimum(request.tokens_L1, 298)) for request in requests_of(6)]
    tokens_L1 = fine[2].tokens_L1.copy()
    tokens_L1[20] = 299
    broken = Request(tokens_L1)
    settings = recording("topk", 16)
    if capture is None:
        engine = TransformersEngine(folder, settings, "auto", 4096, "cpu")
    else:
        engine = VllmEngine(folder, settings, SEQ_LEN, "auto", 4096, 0.5, "cpu", capture=capture)
    with pytest.raises(InputError, match=rf"sequence {broken.digest.hex()[:12]}, token .* not finite"):
        engine.score([*fine, broken])
    # what the failed submission left unfinished is not taken for rows of the next one
    assert [len(scored.ids_LK) for scored in engine.score(fine)] == [SEQ_LEN] * 6
    engine.close()
