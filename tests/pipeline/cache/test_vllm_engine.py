"""A real vLLM on the CPU against the reference engine. An engine takes seconds to start, so three serve all tests.

Legend: L targets of a sequence, K ids kept, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from capgap.pipeline.cache.convert import to_requests
from capgap.pipeline.cache.scoring import Request, Scored
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.pipeline.cache.vllm_worker import Capture
from capgap.schemas.errors import InputError, MachineError, SettingError

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")

SEQ_LEN = 48
VOCAB_SIZE = 300

# Both compute in float32; products and attention sum in another order. Measured: 1.6e-5.
TOLERANCE_NATS = 1e-4
# So a sample within 2e-6 of an id's end falls to its neighbour: measured in 0.1 to 0.2 % of rows with 50 samples.
DIFFERING_ROWS = 0.01


@pytest.fixture(scope="module")
def folder(teacher_folder) -> str:
    return teacher_folder()


@pytest.fixture(scope="module")
def submission(requests_of) -> list[Request]:
    """60 sequences, of which the last three have been there before."""
    requests = requests_of(57)
    return [*requests, requests[3], requests[3], requests[9]]


@pytest.fixture(scope="module")
def reference(folder, submission, recording):
    """The logprob of every id, by the reference engine, [L, V] of each sequence."""

    def at(temperature: float) -> list[np.ndarray]:
        engine = TransformersEngine(folder, recording("topk", VOCAB_SIZE, temperature), "float32", 4096, "cpu")
        return [_by_id(scored) for scored in engine.score(submission)]

    return at


def _by_id(scored: Scored) -> np.ndarray:
    logprobs_LV = np.empty_like(scored.logprobs_LK)
    np.put_along_axis(logprobs_LV, scored.ids_LK.astype(np.int64), scored.logprobs_LK, 1)
    return logprobs_LV


@pytest.fixture(scope="module")
def start(folder, recording):
    def make(kind: str, num_ids: int, temperature: float, batch_tokens: int, chunk_rows: int) -> VllmEngine:
        settings = recording(kind, num_ids, temperature, chunk_rows)
        return VllmEngine(folder, settings, SEQ_LEN, "auto", batch_tokens, 0.5, "cpu")

    return make


@pytest.fixture(scope="module")
def topk_engine(start) -> Iterator[VllmEngine]:
    engine = start("topk", 16, 1.0, 4096, 1024)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def sampled_engine(start) -> Iterator[VllmEngine]:
    """Steps of 16 tokens: a sequence of 48 takes three."""
    engine = start("sampled", 50, 1.0, 16, 100)
    scheduler = engine._llm.llm_engine.vllm_config.scheduler_config
    assert (scheduler.max_num_batched_tokens, scheduler.enable_chunked_prefill) == (16, True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def warm_engine(start) -> Iterator[VllmEngine]:
    """At temperature 2, in steps of 100 tokens, and 7 rows of logits at once."""
    engine = start("topk", 16, 2.0, 100, 7)
    yield engine
    engine.close()


def _require_equal(found: list[Scored], expected_LV: list[np.ndarray], submission: list[Request]) -> None:
    assert len(found) == len(submission)
    for scored, logprobs_LV, request in zip(found, expected_LV, submission, strict=True):
        assert scored.ids_LK.shape == scored.logprobs_LK.shape == (SEQ_LEN, 16)
        assert scored.ids_LK.max() < VOCAB_SIZE
        top_LK = np.sort(logprobs_LV)[:, ::-1][:, :16]
        at_ids_LK = np.take_along_axis(logprobs_LV, scored.ids_LK.astype(np.int64), 1)
        assert np.abs(scored.logprobs_LK - at_ids_LK).max() < TOLERANCE_NATS
        assert np.abs(at_ids_LK - top_LK).max() < TOLERANCE_NATS, "an id that is not among the top-k tokens"
        assert np.abs(scored.tail_L - (1 - np.exp(top_LK).sum(1))).max() < TOLERANCE_NATS
        _require_labels(scored, logprobs_LV, request)


def _require_labels(scored: Scored, logprobs_LV: np.ndarray, request: Request) -> None:
    labels_L1 = request.tokens_L1[1:, None].astype(np.int64)
    assert np.abs(scored.label_logprobs_L - np.take_along_axis(logprobs_LV, labels_L1, 1)[:, 0]).max() < TOLERANCE_NATS


def test_topk_is_that_of_the_reference(topk_engine, submission, reference) -> None:
    assert topk_engine.name.startswith("vllm 0.")
    assert topk_engine.dtype == "float32", "`auto` is the dtype in which the teacher was saved"
    _require_equal(topk_engine.score(submission), reference(1.0), submission)


def test_topk_at_temperature_2_in_chunks_is_that_of_the_reference(
    warm_engine, topk_engine, submission, reference
) -> None:
    found = warm_engine.score(submission)
    _require_equal(found, reference(2.0), submission)
    for warm, cold in zip(found, topk_engine.score(submission), strict=True):
        # the teacher's own top is taken at temperature 1, however hot the recording
        assert abs(warm.top_logprob - cold.top_logprob) < TOLERANCE_NATS


def test_draws_are_those_of_the_reference(sampled_engine, folder, submission, recording, reference) -> None:
    found = sampled_engine.score(submission)
    expected = TransformersEngine(folder, recording("sampled", 50), "auto", 4096, "cpu").score(submission)
    different = []
    for scored, wanted, logprobs_LV, request in zip(found, expected, reference(1.0), submission, strict=True):
        assert scored.samples_Ln.shape == (SEQ_LEN, 50)
        _require_labels(scored, logprobs_LV, request)
        counts_LV = _counts(scored) - _counts(wanted)
        different += list(counts_LV[counts_LV.any(1)])
    assert len(different) < DIFFERING_ROWS * len(submission) * SEQ_LEN
    assert all(np.abs(row_V).sum() == 2 for row_V in different), "more than one sample moved to a neighbour"


def test_a_sequence_scores_alike_alone_and_cut_in_two_among_others(sampled_engine, submission) -> None:
    together = sampled_engine.score(submission[:8])
    different = 0
    for request, scored in zip(submission[:8], together, strict=True):
        alone = sampled_engine.score([request])[0]
        assert np.abs(alone.label_logprobs_L - scored.label_logprobs_L).max() < TOLERANCE_NATS
        different += int(_counts(alone).ravel().tolist() != _counts(scored).ravel().tolist())
    assert different <= 1, "of 384 rows less than one is expected to have a sample at an id's end"


def test_a_sequence_that_comes_twice_is_scored_twice_in_its_places(topk_engine, submission) -> None:
    a, b = submission[:2]
    found = topk_engine.score([a, b, a, a, b])
    labels = [scored.label_logprobs_L for scored in found]
    assert np.abs(labels[0] - labels[1]).max() > 1
    for i, j in [(0, 2), (0, 3), (1, 4)]:
        assert np.abs(labels[i] - labels[j]).max() < TOLERANCE_NATS


def test_no_requests_are_no_rows(topk_engine) -> None:
    assert topk_engine.score([]) == []


def test_documents_and_both_recordings_are_those_of_the_reference(folder, submission, recording) -> None:
    """In steps of 49 tokens; documents of 1 token and of 48."""
    settings = recording("both", 16, extra_temperatures=(2.0,))
    starts_L1 = np.zeros(SEQ_LEN + 1, np.bool_)
    starts_L1[[0, 1, 9, 47, 48]] = True
    requests = [part for r in submission[:20] for part in to_requests(r.tokens_L1, starts_L1, "document")]
    requests += submission[:5]
    assert sorted({len(r.tokens_L1) for r in requests}) == [2, 9, 39, 49]
    engine = VllmEngine(folder, settings, SEQ_LEN, "auto", 16, 0.5, "cpu")
    found = engine.score(requests)
    engine.close()
    different = 0
    expected = TransformersEngine(folder, settings, "auto", 4096, "cpu").score(requests)
    for scored, wanted in zip(found, expected, strict=True):
        for name in ("label_logprobs_L", "logprobs_LK", "tail_L", "log_tails_LT"):
            assert getattr(scored, name).shape == getattr(wanted, name).shape, name
            assert np.abs(getattr(scored, name) - getattr(wanted, name)).max() < TOLERANCE_NATS, name
        different += int((scored.samples_Ln != wanted.samples_Ln).any(1).sum())
    assert different < DIFFERING_ROWS * 25 * SEQ_LEN


def test_too_few_positions_are_refused(teacher_folder, recording) -> None:
    folder = teacher_folder(max_positions=SEQ_LEN - 1)
    with pytest.raises(InputError, match=r"found max_position_embeddings = 47, expected at least corpus\.seq_len = 48"):
        VllmEngine(folder, recording(), SEQ_LEN, "auto", 4096, 0.5, "cpu")


def test_heads_that_vllm_does_not_have_on_a_cpu_are_refused(teacher_folder, recording) -> None:
    with pytest.raises(MachineError, match=r"found attention heads of size 16, expected one of 32, .*transformers"):
        VllmEngine(teacher_folder(head_dim=16), recording(), SEQ_LEN, "auto", 4096, 0.5, "cpu")


def test_a_device_that_vllm_was_not_built_for_is_refused(folder, recording) -> None:
    with pytest.raises(MachineError, match="found a build for cpu, expected one for cuda:0"):
        VllmEngine(folder, recording(), SEQ_LEN, "auto", 4096, 0.5, "cuda:0")


def test_the_first_generation_of_the_runner_is_used_on_a_cpu_whether_triton_is_there_or_not(topk_engine) -> None:
    assert topk_engine.runner == "V1"


def test_requests_that_lose_their_cache_half_way_have_every_row_once(folder, submission, recording, reference) -> None:
    # 8 blocks of 32 tokens, and 16 requests at a time that go on by 8 tokens a step: each needs two blocks in the end
    crowded = {"block_size": 32, "num_gpu_blocks_override": 8, "long_prefill_token_threshold": 8}
    crowded |= {"scheduler_reserve_full_isl": False}
    settings = recording("topk", 16)
    engine = VllmEngine(folder, settings, SEQ_LEN, "auto", 128, 0.5, "cpu", engine_args=crowded)
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request

    def counted(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    _require_equal(engine.score(submission), reference(1.0), submission)
    assert len(preempted) > 10
    engine.close()


def _unknown_to_the_capture(monkeypatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._get_prompt_logprobs_dict

    def with_one_more(self, hidden_states, num_scheduled_tokens, query_lens=None):
        return original(self, hidden_states, num_scheduled_tokens)

    monkeypatch.setattr(GPUModelRunner, "_get_prompt_logprobs_dict", with_one_more)


def test_a_vllm_that_the_capture_does_not_know_gives_topk_with_a_warning(
    teacher_folder, requests_of, recording, monkeypatch, caplog
) -> None:
    _unknown_to_the_capture(monkeypatch)
    folder, settings, requests = teacher_folder(num_columns=VOCAB_SIZE), recording("topk", 16), requests_of(3)
    with caplog.at_level("WARNING", "capgap"):
        engine = VllmEngine(folder, settings, SEQ_LEN, "auto", 4096, 0.5, "cpu")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "capgap"]
    assert "this vLLM cannot be captured; found capture hook: found ['hidden_states'" in warning
    assert "'query_lens'" in warning
    assert engine.name.endswith(", public logprobs")
    expected = TransformersEngine(folder, settings, "float32", 4096, "cpu").score(requests)
    for scored, wanted in zip(engine.score(requests), expected, strict=True):
        assert np.abs(scored.logprobs_LK - wanted.logprobs_LK).max() < TOLERANCE_NATS
    for other, message in [
        (
            recording("sampled", 50),
            r"cache\.recording: .*cannot be kept without capture .* found sampled, expected topk",
        ),
        (recording("both", 16), r"cache\.recording: .* found both, expected topk"),
        (recording("topk", 16, 2.0), r"cache\.temperature: .* found 2\.0, expected 1"),
        (
            recording("topk", 16, extra_temperatures=(0.5, 2.0)),
            r"cache\.extra_temperatures: .* found 0\.5, 2, expected none",
        ),
    ]:
        with pytest.raises(SettingError, match=message):
            engine.record(other)
    engine.close()
    with pytest.raises(MachineError, match=r"this vLLM cannot be captured; found capture hook: .*'query_lens'"):
        VllmEngine(folder, settings, SEQ_LEN, "auto", 4096, 0.5, "cpu", capture="worker")


@pytest.mark.parametrize(
    ("kind", "temperature", "message"),
    [
        ("sampled", 1.0, r"cache\.recording: .*\(cache\.capture: public\); found sampled, expected topk"),
        ("both", 1.0, r"cache\.recording: .*\(cache\.capture: public\); found both, expected topk"),
        ("topk", 0.5, r"cache\.temperature: .*found 0\.5, expected 1"),
        ("topk", 1.0, r"teacher: .*found a head of 320 columns, expected 300"),
    ],
)
def test_what_the_public_logprobs_cannot_give_is_refused_before_the_engine_starts(
    folder, recording, kind: str, temperature: float, message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        VllmEngine(folder, recording(kind, 16, temperature), SEQ_LEN, "auto", 4096, 0.5, "cpu", capture="public")


class _Failing(Capture):
    def step(self, hidden_NH, logits_of, spans):
        raise RuntimeError("something\nwithin")


def test_a_fault_within_vllm_is_one_line_and_nothing_else(folder, submission, recording, capfd) -> None:
    engine = VllmEngine(folder, recording("topk", 16), SEQ_LEN, "auto", 4096, 0.5, "cpu")
    engine._llm.collective_rpc("capgap_hook", args=(_Failing(recording("topk", 16)),))
    capfd.readouterr()
    with pytest.raises(MachineError, match=r"the engine failed; found RuntimeError: something within; set VLLM"):
        engine.score(submission[:2])
    assert capfd.readouterr() == ("", "")
    engine.close()


WITHOUT_VLLM = """
import importlib.util, sys

class Hidden:
    \"\"\"The finder it wraps, without vllm.\"\"\"
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "vllm" else self._finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("vllm") is None
from capgap.pipeline.cache.scoring import Recording
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.schemas.errors import MachineError

try:
    VllmEngine("nowhere", Recording("topk", 4, 1.0, 0, 300, 64), 48, "auto", 64, 0.5, "cpu")
except MachineError as error:
    print(error)
"""


def test_without_vllm_one_line_says_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cache.engine: vllm: vLLM is not installed; run `make venv`")
    assert done.stdout.count("\n") == 1


def _counts(scored: Scored) -> np.ndarray:
    return np.stack([np.bincount(samples_n, minlength=VOCAB_SIZE) for samples_n in scored.samples_Ln])
