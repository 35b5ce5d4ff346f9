from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import DEEPER, SIZES, gpt2_config, llama_config, mamba_config, tiny_model
from transformers import (
    Gemma3Config,
    PreTrainedModel,
    SiglipVisionConfig,
)

from capgap.pipeline.models.configs import empty_model
from capgap.pipeline.train.fits import (
    _container_bytes,
    activation_bytes,
    free_bytes,
    require_memory,
    require_positions,
)
from capgap.schemas.errors import InputError, MachineError
from capgap.schemas.run_optimization import OptimizationSettings

GIB = 2**30
SMALL = llama_config(vocab_size=40, **DEEPER)


def _huge(**settings: int) -> PreTrainedModel:
    """A model of 2^40 parameters in its embedding alone, on no memory at all."""
    return empty_model(llama_config(vocab_size=2**30, hidden_size=2**10, **settings))


def test_a_model_larger_than_memory_is_refused_with_the_sum_and_its_parts() -> None:
    model = _huge(tie_word_embeddings=True)
    weights = sum(p.numel() for p in model.parameters()) * 4 / GIB
    with pytest.raises(MachineError) as refused:
        require_memory(model, OptimizationSettings(batch_sequences=4), "cpu", 256)
    message = str(refused.value)
    assert message.startswith("cpu: the model does not fit into this device's memory; found ")
    assert f"expected at least {4 * weights:.3g} GiB: {weights:.3g} GiB of weights, {weights:.3g} GiB of gradients" in (
        message
    )
    # 4 sequences of 256 tokens, one layer 1024 wide, 34 bytes in 16 bits and twice as many in 32
    assert f"{2 * weights:.3g} GiB of AdamW's states; and about {4 * 256 * 1024 * 68 / GIB:.3g} GiB" in message
    assert message.endswith("train a smaller model, or with precision bf16-true")


def test_half_the_bytes_a_weight_are_half_the_sum() -> None:
    model = _huge(tie_word_embeddings=True).to(torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) * 2 / GIB
    with pytest.raises(MachineError, match="or on a larger device") as refused:
        require_memory(model, OptimizationSettings(precision="bf16-true"), "cpu", 256)
    assert f"expected at least {4 * weights:.3g} GiB: {weights:.3g} GiB of weights" in str(refused.value)


def test_a_model_that_fits_is_not_refused_whatever_its_activations() -> None:
    model = tiny_model(SMALL)
    settings = OptimizationSettings(batch_sequences=2**30)
    assert activation_bytes(model, settings, 2**20) > free_bytes("cpu")
    require_memory(model, settings, "cpu", 2**20)


def test_the_limit_is_that_of_the_device(monkeypatch) -> None:
    """Weights, gradients and two states in 32 bits: 16 bytes a parameter, and the weights may lie there already."""
    held, empty = tiny_model(SMALL), empty_model(SMALL)
    num_bytes = 4 * sum(p.numel() for p in held.parameters())
    for model, still_needed in ((held, 3 * num_bytes), (empty, 4 * num_bytes)):
        monkeypatch.setattr("capgap.pipeline.train.fits.free_bytes", lambda _, free=still_needed: free)
        require_memory(model, OptimizationSettings(), "cpu", 16)
        monkeypatch.setattr("capgap.pipeline.train.fits.free_bytes", lambda _, free=still_needed: free - 1)
        with pytest.raises(MachineError, match="does not fit"):
            require_memory(model, OptimizationSettings(), "cpu", 16)


def test_what_is_not_trained_needs_no_gradients(monkeypatch) -> None:
    text = SIZES | DEEPER | {"vocab_size": 40, "head_dim": 16, "num_key_value_heads": 2}
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = empty_model(Gemma3Config(text_config=text, vision_config=vision.to_dict()))
    tower = sum(p.nbytes for name, p in model.named_parameters() if "vision" in name or "multi_modal" in name)
    rest = sum(p.nbytes for p in model.parameters()) - tower
    assert tower > 0
    monkeypatch.setattr("capgap.pipeline.train.fits.free_bytes", lambda _: tower + 4 * rest)
    require_memory(model, OptimizationSettings(), "cpu", 16)


def test_checkpointed_layers_keep_their_inputs_alone() -> None:
    model = empty_model(SMALL)
    settings = {"batch_sequences": 8, "micro_batch_sequences": 2, "precision": "bf16-mixed"}
    kept = activation_bytes(model, OptimizationSettings(**settings), 64)
    recomputed = activation_bytes(model, OptimizationSettings(**settings, activation_checkpointing=True), 64)
    assert (kept, recomputed) == (2 * 64 * 32 * 2 * 34, 2 * 64 * 32 * 2 * 2)


def test_free_memory_is_between_nothing_and_all_of_it() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 0 < free_bytes("cpu") <= total


@pytest.mark.parametrize(
    ("names", "cache"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_limit_counts_without_its_file_cache(tmp_path: Path, names, cache: str) -> None:
    assert _container_bytes(tmp_path) == [2**63], "no container"
    (tmp_path / "memory").mkdir()
    for name, text in zip(names, ("1000\n", "700\n", f"anon 500\n{cache} 150\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert _container_bytes(tmp_path) == [450]
    (tmp_path / names[1]).write_text("1200\n")
    assert _container_bytes(tmp_path) == [0], "over its limit for a moment"
    (tmp_path / names[0]).write_text("max\n")
    assert _container_bytes(tmp_path) == [2**63], "without a limit"


@pytest.mark.parametrize(
    "config",
    [llama_config(max_position_embeddings=16), gpt2_config(n_positions=16)],
    ids=["rotary", "learned"],
)
def test_a_sequence_beyond_the_models_positions_is_refused(config) -> None:
    model = empty_model(config)
    require_positions(model, 16)
    with pytest.raises(
        InputError, match="found sequences of 17 tokens, max_position_embeddings = 16, expected at most"
    ):
        require_positions(model, 17)


def test_a_model_without_positions_takes_any_sequence() -> None:
    require_positions(empty_model(mamba_config()), 10**9)
