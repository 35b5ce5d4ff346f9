"""Room for the logits of a chunk: what is reserved for it holds what it takes, as torch's allocator counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from capgap.kernels.sampling import largest as sampling_largest
from capgap.kernels.sampling import rows as sampling_rows
from capgap.pipeline.cache.scoring import Request
from capgap.pipeline.cache.vllm_start import (
    chunk_bytes,
    has_low_bit_head,
    has_packed_weights,
    head_settings,
    quantisation_of,
    require_room,
    require_runs_on_cpu,
    teacher_config,
)
from capgap.pipeline.cache.vllm_worker import Capture, RequestKey, _Span
from capgap.pipeline.models.low_bit import layers_to_quantise, make_low_bit, scheme_of
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.stage import device
from capgap.schemas.errors import MachineError
from capgap.schemas.run_quantize import QuantizeSettings

NUM_COLUMNS = 50_304


@pytest.fixture
def peak_bytes(recording, monkeypatch) -> Callable[..., int]:
    """Of all that a step of the capture allocates, the most that stands in memory at once."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    # as on a GPU: all rows of a chunk at once, and the top-k tokens in one step
    monkeypatch.setattr(sampling_rows, "_PART_ELEMENTS_CPU", 2**40)
    monkeypatch.setattr(sampling_largest, "_MIN_HEIGHT", 2**40)

    def measure(kind: str, temperature: float, vocab_size: int, chunk_rows: int, num_rows: int) -> int:
        request = Request(np.zeros(num_rows + 1, dtype=np.int32))
        key = RequestKey(0, 0, request.digest).encode()
        span = _Span(key, 0, num_rows, 0, num_rows, torch.zeros(num_rows, dtype=torch.int32))
        extra = () if kind == "sampled" else (3.0, 0.5)
        capture = Capture(recording(kind, 50, temperature, chunk_rows, 0, vocab_size, extra))
        hidden_NH, head_HV = torch.randn(num_rows, 8), torch.randn(8, NUM_COLUMNS)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            capture.step(hidden_NH, lambda rows_NH: rows_NH @ head_HV, [span])
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
        return int(held.max())

    return measure


@pytest.mark.parametrize("vocab_size", [NUM_COLUMNS, NUM_COLUMNS - 47], ids=["exact head", "padded head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["topk", "sampled", "both"])
def test_a_chunk_takes_no_more_than_is_reserved_for_it(peak_bytes, kind, temperature, vocab_size) -> None:
    reserved = chunk_bytes(NUM_COLUMNS, 64, tensor_parallel=1)
    found = peak_bytes(kind, temperature, vocab_size, chunk_rows=64, num_rows=64)
    assert 0.4 * reserved < found <= reserved


def test_many_rows_take_no_more_than_one_chunk_of_them(peak_bytes) -> None:
    chunked = peak_bytes("topk", 1.0, NUM_COLUMNS, chunk_rows=16, num_rows=256)
    whole = peak_bytes("topk", 1.0, NUM_COLUMNS, chunk_rows=256, num_rows=256)
    # 16 rows of logits and one chunk that is not freed yet, and what is kept of all rows
    assert chunked < whole / 8


def test_a_gpu_that_has_no_room_for_a_chunk_is_refused_with_what_would_fit() -> None:
    needed_bytes = chunk_bytes(152_064, 8192, tensor_parallel=1)
    require_room(80 << 30, 0.7, needed_bytes, 8192)
    with pytest.raises(MachineError, match=r"8192 rows, which take 20\.88 GiB.* lower cache\.chunk_rows to 3138"):
        require_room(80 << 30, 0.9, needed_bytes, 8192)
    require_room(80 << 30, 0.9, chunk_bytes(152_064, 3138, tensor_parallel=1), 3138)
    assert chunk_bytes(152_064, 8192, tensor_parallel=2) > needed_bytes


def _quantised(kind: str, **more: str) -> LlamaConfig:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "type": kind}}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}
    return LlamaConfig(quantization_config=settings)


def test_int8_on_a_cpu_is_for_bfloat16() -> None:
    config = _quantised("int", format="int-quantized")
    assert quantisation_of(config) == "compressed-tensors, int-quantized"
    require_runs_on_cpu(config, torch.bfloat16, 1)
    require_runs_on_cpu(_quantised("float"), torch.float32, 1)
    require_runs_on_cpu(LlamaConfig(), torch.float32, 1)
    assert quantisation_of(LlamaConfig()) == ""
    with pytest.raises(MachineError, match=r"cache\.dtype: vLLM multiplies int8 .* found float16, expected bfloat16"):
        require_runs_on_cpu(config, torch.float16, 1)


@pytest.fixture
def on_cpu_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A processor with these instruction sets, as Linux lists them."""

    def make(flags: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n\n")
        monkeypatch.setattr(device, "_CPU_INFO", tmp_path / "cpuinfo")

    return make


@pytest.mark.parametrize(
    ("settings", "lacks", "suffices", "found"),
    [
        ({"format": "int4", "group_size": 32}, "avx2 avx512_vnni", "avx2 avx512f", "pack-quantized, and no AVX-512"),
        ({"format": "int8"}, "avx2 avx512f", "avx2 avx_vnni", "int-quantized, and no VNNI: sums"),
    ],
)
def test_products_that_vllm_lacks_or_gets_wrong_on_a_processor_are_refused(
    tmp_path: Path, on_cpu_with: Callable[[str], None], settings: dict[str, Any], lacks: str, suffices: str, found: str
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    model = tiny_llama(1, hidden_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    model.save_pretrained(tmp_path / "plain")
    few = QuantizeSettings(**settings)
    make_low_bit(model, layers_to_quantise(model, few), scheme_of(few))
    save_compressed(model, tmp_path / "few")
    on_cpu_with(lacks)
    teacher_config(str(tmp_path / "plain"), 8, "cpu")
    teacher_config(str(tmp_path / "few"), 8, "cuda:0")
    with pytest.raises(MachineError, match=rf"{found}.*; set answers\.engine to transformers"):
        teacher_config(str(tmp_path / "few"), 8, "cpu", setting="answers.engine")
    on_cpu_with(suffices)
    teacher_config(str(tmp_path / "few"), 8, "cpu")
    # an Arm processor lists none of these
    on_cpu_with("")
    teacher_config(str(tmp_path / "few"), 8, "cpu")


def test_packed_weights_are_known_by_their_format() -> None:
    def config(**settings: Any) -> LlamaConfig:
        return LlamaConfig(quantization_config=settings)

    packed = {"group_0": {"format": "pack-quantized"}}
    assert has_packed_weights(config(quant_method="compressed-tensors", format="mixed-precision", config_groups=packed))
    assert has_packed_weights(config(quant_method="gptq")) and has_packed_weights(config(quant_method="awq"))
    assert not has_packed_weights(_quantised("int", format="int-quantized"))
    assert not has_packed_weights(config(quant_method="mxfp4")) and not has_packed_weights(LlamaConfig())


def test_layers_are_not_dealt_out_among_cpus() -> None:
    with pytest.raises(MachineError, match=r"pipeline_parallel_size: .* found 2, expected 1 .*cache\.tensor_parallel"):
        require_runs_on_cpu(LlamaConfig(), torch.float32, 2)


def test_a_head_of_few_bits_is_asked_for_no_logits_in_float32() -> None:
    def few(*targets: str) -> LlamaConfig:
        group = {"targets": list(targets), "weights": {"num_bits": 4}}
        return LlamaConfig(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"one": group}})

    assert head_settings(few("lm_head", "Linear")) == {}
    assert has_low_bit_head(few("re:.*lm_head")) and has_low_bit_head(
        LlamaConfig(quantization_config={"lm_head": True})
    )
    for plain in (LlamaConfig(), few("Linear")):
        assert head_settings(plain) == {"hf_overrides": {"head_dtype": "float32"}}
