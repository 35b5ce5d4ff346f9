from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from capgap.pipeline.cache.scoring import Request
from capgap.pipeline.cache.vllm_worker import Capture, CaptureExtension, RequestKey, _require_signature, _Span

SIGNATURE = ["hidden_states", "num_scheduled_tokens"]


@pytest.mark.parametrize("suffix", ["", "-0a1b2c3d"], ids=["as given", "with vLLM's suffix"])
def test_a_request_id_carries_index_label_and_digest(suffix: str) -> None:
    key = RequestKey(17, 250_000, bytes(range(16)))
    assert RequestKey.decode(key.encode() + suffix) == key


def test_a_method_of_another_signature_is_refused() -> None:
    def with_one_more(hidden_states, num_scheduled_tokens, spec_decode): ...

    def renamed(hidden_states, num_tokens): ...

    def as_expected(hidden_states, num_scheduled_tokens): ...

    _require_signature(as_expected, SIGNATURE)
    with pytest.raises(RuntimeError, match=r"found \[.*'spec_decode'\], expected \['hidden_states'"):
        _require_signature(with_one_more, SIGNATURE)
    with pytest.raises(RuntimeError, match="num_tokens"):
        _require_signature(renamed, SIGNATURE)
    with pytest.raises(RuntimeError, match="found None"):
        _require_signature(None, SIGNATURE)


def test_a_runner_of_another_vllm_is_refused_and_left_as_it_is(recording) -> None:
    class Runner:
        def _get_prompt_logprobs_dict(self, hidden_states): ...

    extension = CaptureExtension()
    extension.model_runner = runner = Runner()
    with pytest.raises(RuntimeError, match=r"capture hook: found \['hidden_states'\], expected"):
        extension.capgap_install(**vars(recording()))
    assert vars(runner) == {}
    extension.model_runner = SimpleNamespace(prompt_logprobs_worker=None)
    with pytest.raises(RuntimeError, match="found None"):
        extension.capgap_install(**vars(recording()))


def test_the_methods_of_the_installed_vllm_have_the_expected_signatures() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from capgap.pipeline.cache.vllm_worker import _V1_SIGNATURE, _V2_SIGNATURE

    for module, name, method, expected in [
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_get_prompt_logprobs_dict", _V1_SIGNATURE),
        ("vllm.v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker", "compute_prompt_logprobs", _V2_SIGNATURE),
    ]:
        found = getattr(getattr(importlib.import_module(module), name), method)
        _require_signature(found, ["self", *expected])


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_a_request_that_starts_over_has_every_row_once(recording, requests_of, kind: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    request: Request = requests_of(1)[0]
    prompt, label = request.tokens_L1[:-1], int(request.tokens_L1[-1])
    key = RequestKey(0, label, request.digest).encode()
    logits_LV = torch.randn(len(prompt), 320, generator=torch.Generator().manual_seed(0)) * 3

    def score(*pieces: tuple[int, int]):
        capture = Capture(recording(kind))
        finished = []
        for start, stop in pieces:
            following = torch.from_numpy(request.tokens_L1[start + 1 : stop + 1])
            span = _Span(key, 0, stop - start, start, len(prompt), following)
            finished.append(capture.step(logits_LV[start:stop], torch.clone, [span]))
        assert all(not step for step in finished[:-1]), "a request must be complete before it is handed on"
        return finished[-1][key]

    whole = score((0, 48))
    assert len(whole[0]) == len(whole[1]) == 48
    for pieces in [((0, 20), (20, 48)), ((0, 20), (20, 40), (0, 30), (30, 48)), ((0, 20), (0, 48))]:
        found = score(*pieces)
        assert torch.equal(found[0], whole[0])
        # a softmax of fewer rows at a time may round differently in the last place
        assert torch.allclose(found[1], whole[1], atol=1e-6)


@pytest.mark.parametrize("kind", ["topk", "sampled", "both"])
def test_a_step_never_waits_for_the_device(recording, requests_of, monkeypatch, kind: str) -> None:
    """Tensors of the meta device have no values: whatever would need one on the host, or copy one to it, raises."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    meta = torch.device("meta")
    pinned: list[torch.Tensor] = []
    # pinning itself needs a GPU; what must come from the host is noted, and has to go on by this way
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    requests: list[Request] = requests_of(3)
    capture = Capture(recording(kind, chunk_rows=50, extra_temperatures=() if kind == "sampled" else (2.0,)))
    hidden_NH, head_VH = torch.empty(3 * 48, 16, device=meta), torch.empty(320, 16, device=meta)
    spans = [
        _Span(_key(request), 48 * i, 48, 0, 48, torch.empty(48, dtype=torch.int32, device=meta))
        for i, request in enumerate(requests)
    ]
    with _CopiesOfPinnedMemoryOnly(pinned):
        finished = capture.step(hidden_NH, lambda rows_NH: rows_NH @ head_VH.T, spans)
        for wait in (lambda: hidden_NH.sum().item(), hidden_NH.cpu, hidden_NH.nonzero, lambda: bool(hidden_NH[0, 0])):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()
        with pytest.raises(AssertionError, match="not from pinned memory"):
            torch.zeros(3).to(meta)
    assert len(finished) == 3
    assert all(tensors[0].device == meta and len(tensors[0]) == 48 for tensors in finished.values())
    assert len(pinned) == 1 + (kind != "topk"), "which rows are last, the offsets of all rows at once, and nothing else"


class _CopiesOfPinnedMemoryOnly(TorchDispatchMode):
    """Within, what goes from the host to a device was pinned, and nobody waits for it."""

    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and out.device.type != "cpu":
            assert any(args[0] is tensor for tensor in self._pinned), "not from pinned memory"
            assert kwargs.get("non_blocking")
        return out


def _key(request: Request) -> str:
    return RequestKey(0, int(request.tokens_L1[-1]), request.digest).encode()


# Registers the CPU as a backend of Triton, whose interpreter then runs the runner's kernels, and compares with the
# reference engine. Steps of 100 tokens cut sequences of 48 in two.
SECOND_GENERATION = """
import json, sys
from types import SimpleNamespace

import triton.backends

class Driver:
    @classmethod
    def is_active(cls):
        return True

triton.backends.backends["cpu"] = SimpleNamespace(driver=Driver, compiler=None)

import numpy as np
from capgap.pipeline.cache.scoring import Recording, Request
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache.vllm_engine import VllmEngine

folder, tokens = sys.argv[1], np.load(sys.argv[2])
requests = [Request(row) for row in tokens]
recordings = {
    "topk": Recording(0, 16, 1.0, 0, 300, 1024),
    "sampled": Recording(50, 0, 1.0, 0, 300, 100),
    "warm": Recording(0, 16, 2.0, 0, 300, 7),
    "both": Recording(50, 16, 2.0, 0, 300, 100, (1.0,)),
}
engine = VllmEngine(folder, recordings["topk"], tokens.shape[1] - 1, "auto", 100, 0.5, "cpu")
found = {}
for name, recording in recordings.items():
    reference = TransformersEngine(folder, recording, "auto", 4096, "cpu").score(requests)
    engine.record(recording)
    scored = engine.score(requests)
    def apart(field):
        return float(max(np.abs(getattr(a, field) - getattr(b, field)).max() for a, b in zip(scored, reference)))
    def ids_of(s):
        return np.sort(np.concatenate([s.samples_Ln, s.ids_LK], axis=1))
    found[name] = {
        "runner": engine.runner,
        "rows": sorted({len(s.label_logprobs_L) for s in scored}),
        "label": apart("label_logprobs_L"),
        "kept": apart("logprobs_LK") if recording.top_k else 0.0,
        "tails": apart("log_tails_LT") if recording.extra_temperatures else 0.0,
        "different": sum(int((ids_of(a) != ids_of(b)).any(1).sum()) for a, b in zip(scored, reference)),
    }
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU")
def test_the_second_generation_of_vllms_runner_gives_what_the_reference_gives(
    teacher_folder, requests_of, tmp_path
) -> None:
    for package in ("vllm", "triton"):
        pytest.importorskip(package, reason=f"{package} is not installed; a CPU needs both for this runner")
    requests = requests_of(14)
    tokens = np.stack([r.tokens_L1 for r in [*requests, requests[3], requests[3]]])
    np.save(tmp_path / "tokens.npy", tokens)
    done = subprocess.run(
        [sys.executable, "-c", SECOND_GENERATION, teacher_folder(), str(tmp_path / "tokens.npy")],
        env=os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["runner"] == "V2", name
        assert found["rows"] == [48], name
        # tolerances as in test_vllm_engine.py: float32, summed in another order
        assert max(found["label"], found["kept"], found["tails"]) < 1e-4, name
        assert found["different"] < 0.01 * len(tokens) * 48, name
