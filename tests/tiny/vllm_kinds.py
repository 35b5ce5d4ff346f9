"""A tiny teacher of some kind, scored by vLLM and by transformers: `vllm_kinds.py KIND FOLDER [DTYPE]`.

Prints how far they are apart, or the error, as a line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    FalconH1Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from capgap.pipeline.cache.scoring import Recording, Request, Scored
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.schemas.errors import CapgapError

SEQ_LEN, VOCAB_SIZE = 48, 300
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
QWEN3 = {"vocab_size": 151_936, "hidden_size": 64}
QWEN3_VOCAB_SIZE = 151_669
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAMBA2 = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}
CONFIGS: dict[str, Any] = {
    "mixture": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "hybrid": FalconH1Config(**SIZES, **MAMBA2),
    "padded": Qwen3Config(**SIZES | QWEN3),
    "int8": LlamaConfig(**SIZES),
    "nvfp4": LlamaConfig(**SIZES),
}
INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
}
QUANTISED = {
    "int8": (
        "int-quantized",
        INT8 | {"strategy": "channel", "dynamic": False},
        INT8 | {"strategy": "token", "dynamic": True},
    ),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT4 | {"dynamic": False}, FLOAT4 | {"dynamic": "local"}),
}


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    reference_folder = _save(kind, folder)
    vocab_size = QWEN3_VOCAB_SIZE if kind == "padded" else VOCAB_SIZE
    recording = Recording(50, 16, 1.0, 0, vocab_size, 64)
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, vocab_size, SEQ_LEN + 1, dtype=np.int32)) for _ in range(6)]
    dtype = sys.argv[3] if len(sys.argv) > 3 else "auto"
    try:
        # a sequence takes several steps
        engine = VllmEngine(str(folder), recording, SEQ_LEN, dtype, 32, 0.5, "cpu")
        scored = engine.score(requests)
        engine.close()
    except CapgapError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code}))
        return
    found: dict[str, Any] = {"runner": engine.runner, "dtype": engine.dtype}
    exact = _reference(kind, reference_folder, recording, "float32", requests)
    found |= {"apart": _largest(scored, exact), "rms": _rms(scored, exact)}
    found["same"] = sum(int((a.samples_Ln == b.samples_Ln).all(1).sum()) for a, b in zip(scored, exact, strict=True))
    found["largest_id"] = max(int(one.ids_LK.max()) for one in scored)
    if dtype == "bfloat16":
        found["own_rms"] = _rms(_reference(kind, reference_folder, recording, dtype, requests), exact)
    print(json.dumps(found))


def _save(kind: str, folder: Path) -> Path:
    """The model for vLLM; returns the folder of the one for transformers, the same where it is not quantised."""
    if kind == "sees":
        text = Gemma3TextConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
            sliding_window=16,
        )
        vision = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        ids = {"image_token_index": 319, "boi_token_index": 317, "eoi_token_index": 318}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
        return folder
    MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[kind])](CONFIGS[kind]).float().save_pretrained(folder)
    return _quantise(kind, folder) if kind in QUANTISED else folder


def _quantise(kind: str, folder: Path) -> Path:
    """Rows of int8 with a scale each, which nothing but int8 reads; the folder of what they stand for."""
    whole = folder.with_name(f"{folder.name}-whole")
    shutil.copytree(folder, whole)
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            steps = (weight / scale).round()
            stored[name], stored[f"{name}_scale"], meant[name] = steps.to(torch.int8), scale, steps * scale
    save_file(meant, whole / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    form, weights, activations = QUANTISED[kind]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return whole


def _reference(kind: str, folder: Path, recording: Recording, dtype: str, requests: list[Request]) -> list[Scored]:
    engine = TransformersEngine(str(folder), recording, dtype, 4096, "cpu")
    if kind == "int8":
        for name, module in engine._model.named_modules():
            if name.endswith("proj"):
                module.register_forward_pre_hook(_rounded_to_int8)
    return engine.score(requests)


def _rounded_to_int8(module: Any, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What a product of int8 sees of its input: each token's values in steps of a scale of its own."""
    scale = given[0].abs().amax(-1, keepdim=True) / 127
    return ((given[0] / scale).round() * scale,)


def _labels(scored: list[Scored]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([one.label_logprobs_L for one in scored]).astype(np.float64)


def _rms(scored: list[Scored], other: list[Scored]) -> float:
    return float(np.sqrt(((_labels(scored) - _labels(other)) ** 2).mean()))


def _largest(scored: list[Scored], other: list[Scored]) -> float:
    return max(float(np.abs(a.logprobs_LK - b.logprobs_LK).max()) for a, b in zip(scored, other, strict=True))


if __name__ == "__main__":
    main()
