"""A row of documents against the documents alone, on one tiny model of each kind.

Legend: L tokens a row, V vocabulary, n tokens of a document.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from tiny_models import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.pipeline.store.batch import positions_in_documents
from capgap.pipeline.train.attention import ending_attention, require_ending_attention, rows_are_known
from capgap.schemas.errors import InputError

VOCAB_SIZE = 48
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Architecture, settings of its configuration.
THAT_END = {
    "Llama": ("LlamaConfig", SHAPE),
    "Llama, scaled positions": (
        "LlamaConfig",
        SHAPE | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "Qwen2": ("Qwen2Config", SHAPE),
    "Qwen2, sliding window": (
        "Qwen2Config",
        SHAPE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3Config", SHAPE),
    "Mistral, no window": ("MistralConfig", SHAPE | {"sliding_window": None}),
    "Mistral, sliding window": ("MistralConfig", SHAPE | {"sliding_window": 5}),
    "Mixtral": ("MixtralConfig", SHAPE | EXPERTS),
    "Gemma2": ("Gemma2Config", SHAPE | {"sliding_window": 5}),
    "Gemma3": ("Gemma3TextConfig", SHAPE | {"sliding_window": 5}),
    "Phi3": ("Phi3Config", SHAPE),
    "OLMo2": ("Olmo2Config", SHAPE),
    "GPT2": ("GPT2Config", GPT2),
    "GPT-NeoX": ("GPTNeoXConfig", {name: value for name, value in SHAPE.items() if name != "head_dim"}),
}
DOCUMENT_LENGTHS = (9, 1, 17, 2, 11)


def _model(config: str, settings: dict, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()
    with torch.no_grad():
        # sharper than fresh weights: what a token sees decides its logits
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def _documents(num_rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the same lengths in another order, and where documents start."""
    tokens_BL = torch.randint(1, VOCAB_SIZE, (num_rows, sum(DOCUMENT_LENGTHS)), generator=torch.manual_seed(1))
    starts_BL1 = torch.zeros((num_rows, sum(DOCUMENT_LENGTHS) + 1), dtype=torch.bool)
    for row in range(num_rows):
        lengths = DOCUMENT_LENGTHS[row:] + DOCUMENT_LENGTHS[:row]
        starts_BL1[row, torch.tensor([0, *lengths]).cumsum(0)] = True
    return tokens_BL, starts_BL1


@torch.no_grad()
def _largest_difference(model: PreTrainedModel, tokens_BL: torch.Tensor, starts_BL1: torch.Tensor, **several) -> float:
    """Of logits in the row from those of each document alone, over the spread of the logits."""
    logits_BLV = model(input_ids=tokens_BL, use_cache=False, **several).logits
    differences = []
    for row, starts_L1 in enumerate(starts_BL1):
        for first, end in pairwise(starts_L1.nonzero()[:, 0].tolist()):
            alone_nV = model(input_ids=tokens_BL[row : row + 1, first:end], use_cache=False).logits[0]
            differences.append(float((logits_BLV[row, first:end] - alone_nV).abs().max()))
    return max(differences) / float(logits_BLV.std())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", THAT_END)
def test_logits_of_a_packed_row_are_those_of_its_documents_alone(name: str, attention: str) -> None:
    model = _model(*THAT_END[name], attention)
    require_ending_attention(model, 64)
    tokens_BL, starts_BL1 = _documents()
    positions_BL = positions_in_documents(starts_BL1)
    several = ending_attention(model, positions_BL)
    # float32 sums over another number of summands, through four layers
    assert _largest_difference(model, tokens_BL, starts_BL1, **several) < 1e-4
    # so the test can fail: seen across documents, logits are others
    assert _largest_difference(model, tokens_BL, starts_BL1) > 0.1


@pytest.mark.parametrize(
    ("config", "settings", "found"),
    [
        ("MambaConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}, "a model without posit"),
        ("BloomConfig", {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "a model without po"),
        # positions for its attention, and a state that runs on
        (
            "JambaConfig",
            SHAPE | {"mamba_d_state": 4, "use_mamba_kernels": False, "num_experts": 1, "attn_layer_offset": 1,
                     "attn_layer_period": 2},
            "hidden states",
        ),
        ("RecurrentGemmaConfig", SHAPE | {"attention_window_size": 16}, "hidden states"),
        ("Llama4TextConfig", SHAPE | EXPERTS | {"attention_chunk_size": 8}, "attention_chunk_size = 8, expected at"),
    ],
)  # fmt: skip
def test_a_model_that_sees_across_documents_is_refused(config: str, settings: dict, found: str) -> None:
    with pytest.raises(InputError, match=f"found {found}"):
        require_ending_attention(_model(config, settings), 64)


def test_fresh_weights_are_no_way_around_the_proof() -> None:
    """Attention counts for little in a model that was never trained."""
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        **SHAPE, mamba_d_state=4, use_mamba_kernels=False, num_experts=1, attn_layer_offset=1, attn_layer_period=2
    )
    with pytest.raises(InputError, match="would look across"):
        require_ending_attention(AutoModelForCausalLM.from_config(config), 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_where_float32_does(dtype: torch.dtype) -> None:
    require_ending_attention(_model(*THAT_END["Llama"]).to(dtype), 64)


def test_the_proof_leaves_the_model_in_its_mode_and_takes_no_random_number() -> None:
    model = _model(*THAT_END["Llama"]).train()
    state = torch.get_rng_state()
    require_ending_attention(model, 64)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


class Waits(TorchDispatchMode):
    """The looks at a tensor's values, each of which would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions_BL", [None, torch.arange(8).repeat(2, 2)], ids=["one sequence", "two documents"])
def test_what_is_known_of_rows_is_not_looked_for(positions_BL) -> None:
    model = tiny_llama(0)
    several = {} if positions_BL is None else {"position_ids": positions_BL}
    ids_BL = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    with Waits() as looking:
        expected = model.model(input_ids=ids_BL, use_cache=False, **several).last_hidden_state
    with rows_are_known(positions_BL), Waits() as knowing:
        found = model.model(input_ids=ids_BL, use_cache=False, **several).last_hidden_state
    assert (looking.num, knowing.num) == (1, 0)
    assert torch.equal(found, expected)
    with Waits() as after:
        model.model(input_ids=ids_BL, use_cache=False, **several)
    assert after.num == 1, "whoever else uses transformers has it as it is"
