"""The architectures that benchmarks/architectures.py measures, each with the smallest shape that vLLM accepts.

Each configuration exercises what is special about its architecture: attention windows are shorter than the sequences,
layers of every kind are present, and there are more experts than are chosen for a token.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCAB_SIZE = 300
NUM_COLUMNS = 320  # rows of the output head: the vocabulary and twenty rows of padding
SEQ_LEN = 64
_WINDOW = 16

_LLAMA: dict[str, Any] = {
    "vocab_size": NUM_COLUMNS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2 * SEQ_LEN,
    "initializer_range": 0.2,  # large enough that the predicted distributions are far from uniform
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_EVERY_HEAD = {"num_key_value_heads": 4}
_GPT: dict[str, Any] = {
    "vocab_size": NUM_COLUMNS,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 2 * SEQ_LEN,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_MOE: dict[str, Any] = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_LATENT: dict[str, Any] = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MAMBA2: dict[str, Any] = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 16,
}

# By name: the model type in transformers, the settings that it starts from, and its own settings.
_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("llama", _LLAMA, {}),
    "Llama 3.1, scaled rotation": (
        "llama",
        _LLAMA,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "Mistral": ("mistral", _LLAMA, {"sliding_window": _WINDOW}),
    "Ministral": ("ministral", _LLAMA, {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    "Qwen2": ("qwen2", _LLAMA, {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", _LLAMA, {}),
    "Gemma": ("gemma", _LLAMA, {}),
    "Gemma 2": ("gemma2", _LLAMA, {"sliding_window": _WINDOW, "query_pre_attn_scalar": 32}),
    "Gemma 3": (
        "gemma3_text",
        _LLAMA,
        {"sliding_window": _WINDOW, "query_pre_attn_scalar": 32, "layer_types": _SLIDING},
    ),
    "Mixtral": ("mixtral", _LLAMA, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("qwen2_moe", _LLAMA, _MOE | {"shared_expert_intermediate_size": 64}),
    "Qwen3-MoE": ("qwen3_moe", _LLAMA, _MOE),
    "Qwen3-Next": (
        "qwen3_next",
        _LLAMA,
        _MOE
        | {
            "shared_expert_intermediate_size": 64,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "GPT-2": ("gpt2", _GPT, {}),
    "GPT-BigCode": ("gpt_bigcode", _GPT, {}),
    "GPT-J": ("gptj", _GPT, {"rotary_dim": 16}),
    "GPT-NeoX": ("gpt_neox", _LLAMA, {}),
    "OPT": ("opt", _LLAMA, {"ffn_dim": 192, "word_embed_proj_dim": 128, "init_std": 0.2, "pad_token_id": 1}),
    "BLOOM": ("bloom", _GPT, {"hidden_size": 128}),
    "MPT": (
        "mpt",
        {"vocab_size": NUM_COLUMNS, "initializer_range": 0.2},
        {"d_model": 128, "n_heads": 4, "n_layers": 4, "max_seq_len": 2 * SEQ_LEN},
    ),
    "Falcon": (
        "falcon",
        {name: value for name, value in _LLAMA.items() if name != "head_dim"},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "Falcon-H1": ("falcon_h1", _LLAMA, _MAMBA2),
    "Phi": ("phi", _LLAMA, _EVERY_HEAD),
    "Phi-3": ("phi3", _LLAMA, {"sliding_window": None}),
    "OLMo": ("olmo", _LLAMA, _EVERY_HEAD),
    "OLMo 2": ("olmo2", _LLAMA, {}),
    "OLMo 3": ("olmo3", _LLAMA, {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    "OLMoE": ("olmoe", _LLAMA, {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite": (
        "granite",
        _LLAMA,
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0},
    ),
    "Granite-MoE": ("granitemoe", _LLAMA, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": ("cohere", _LLAMA, {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", _LLAMA, {"logit_scale": 0.25, "sliding_window": _WINDOW, "layer_types": _SLIDING}),
    "Nemotron": ("nemotron", _LLAMA, {}),
    "StarCoder2": ("starcoder2", _LLAMA, {"sliding_window": _WINDOW}),
    "StableLM": ("stablelm", _LLAMA, {}),
    "SmolLM3": ("smollm3", _LLAMA, {"no_rope_layer_interval": 4}),
    "GLM": ("glm", _LLAMA, {}),
    "GLM-4": ("glm4", _LLAMA, {}),
    "GLM-4-MoE": (
        "glm4_moe",
        _LLAMA,
        {
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "DeepSeek-V2": ("deepseek_v2", _LLAMA, _LATENT | {"n_group": 1, "topk_group": 1}),
    "DeepSeek-V3": (
        "deepseek_v3",
        _LLAMA,
        _LATENT | {"n_group": 2, "topk_group": 1, "topk_method": "noaux_tc"},
    ),
    "GPT-OSS": (
        "gpt_oss",
        _LLAMA,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": _WINDOW},
    ),
    "EXAONE 4": ("exaone4", _LLAMA, {"sliding_window": _WINDOW, "layer_types": _SLIDING}),
    "ERNIE 4.5": ("ernie4_5", _LLAMA, {}),
    "Hunyuan": ("hunyuan_v1_dense", _LLAMA, {}),
    "Seed-OSS": ("seed_oss", _LLAMA, {}),
    "Apertus": ("apertus", _LLAMA, {}),
    "Arcee": ("arcee", _LLAMA, {}),
    "LFM2": ("lfm2", _LLAMA, {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "Mamba": (
        "mamba",
        {"vocab_size": NUM_COLUMNS, "initializer_range": 0.2},
        {"hidden_size": 128, "num_hidden_layers": 4},
    ),
}
NAMES = tuple(_KINDS)


def config_of(name: str) -> PreTrainedConfig:
    """Return the configuration of one of `NAMES`."""
    kind, base, own = _KINDS[name]
    config: PreTrainedConfig = AutoConfig.for_model(kind, **base | own)
    return config
