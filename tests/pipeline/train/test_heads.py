"""Tiny real models of many architectures: what the loss takes for their logits, and what it refuses.

Legend: B sequences, L tokens a sequence, N = B x L rows, K ids kept, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from capgap.pipeline.store import Batch
from capgap.pipeline.train.heads import served_head
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

VOCAB_SIZE = 40
PADDED = 48
MODERN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS: dict[str, Any] = MODERN | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Name of transformers, settings, scale and cap of the logits.
ARCHITECTURES: list[tuple[str, dict[str, Any], float, float | None]] = [
    ("llama", MODERN, 1, None),
    ("llama", MODERN | {"tie_word_embeddings": True}, 1, None),
    ("mistral", MODERN, 1, None),
    ("qwen2", MODERN, 1, None),
    ("qwen3", MODERN | {"head_dim": 16}, 1, None),
    ("gemma", MODERN | {"head_dim": 16}, 1, None),
    ("gemma2", MODERN | {"head_dim": 16, "final_logit_softcapping": 0.5}, 1, 0.5),
    ("gemma3_text", MODERN | {"head_dim": 16, "final_logit_softcapping": 3.0}, 1, 3.0),
    ("recurrent_gemma", MODERN | {"lru_width": 32, "logits_soft_cap": 2.0}, 1, 2.0),
    ("nanochat", MODERN, 1, 15.0),
    ("gpt2", OLD, 1, None),
    ("gptj", OLD | {"rotary_dim": 8}, 1, None),  # a bias at the head
    ("gpt_neox", MODERN, 1, None),
    ("phi", MODERN, 1, None),  # a bias at the head
    ("phi3", MODERN | {"pad_token_id": 0}, 1, None),
    ("opt", MODERN | {"ffn_dim": 48, "word_embed_proj_dim": 16}, 1, None),  # a head narrower than the model
    ("cohere", MODERN | {"logit_scale": 0.3}, 0.3, None),
    ("granite", MODERN | {"logits_scaling": 7.0}, 1 / 7, None),
    ("stablelm", MODERN, 1, None),
    ("starcoder2", MODERN, 1, None),
    ("falcon", {k: v for k, v in MODERN.items() if "key" not in k} | {"multi_query": False}, 1, None),
    ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}, 1, None),
    ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}, 1, None),
    ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, 1, None),
    ("olmo2", MODERN, 1, None),
    ("mixtral", EXPERTS, 1, None),
    ("qwen2_moe", EXPERTS, 1, None),
    ("granitemoe", EXPERTS | {"logits_scaling": 4.0}, 0.25, None),
    ("gemma3", {"text_config": MODERN | {"head_dim": 16, "vocab_size": PADDED}, "vision_config": VISION}, 1, None),
]
IDS = [f"{name}-{index}" for index, (name, *_) in enumerate(ARCHITECTURES)]


def _model(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    given = settings if "text_config" in settings else settings | {"vocab_size": PADDED}
    config = CONFIG_MAPPING[name](**given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        head = model.get_output_embeddings()
        head.weight.data.mul_(20)  # logits of some nats, on which caps and scales tell
        if head.bias is not None:
            head.bias.data.normal_()
    return model.eval()  # no dropout


def _batch(num_sequences: int = 2, seq_len: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens_BL1 = torch.randint(VOCAB_SIZE, (num_sequences, seq_len + 1), generator=generator)
    labels_BL = tokens_BL1[:, 1:].clone()
    labels_BL[0, 3:6] = -100
    ids_NK = torch.rand((labels_BL.numel(), VOCAB_SIZE), generator=generator).argsort(1)[:, :5]
    p_NK = torch.softmax(torch.randn((len(ids_NK), 6), generator=generator), -1)
    return Batch(tokens_BL1[:, :-1], labels_BL, ids_NK, p_NK[:, :5].contiguous(), p_NK[:, 5].contiguous())


def _loss_of_full_logits(model: PreTrainedModel, batch: Batch, alpha: float) -> torch.Tensor:
    """In float64 from the model's own logits [N, V] on; the tail is one cell."""
    logq_NV = torch.log_softmax(model(input_ids=batch.input_ids_BL).logits.flatten(0, 1)[:, :VOCAB_SIZE].double(), -1)
    counts_N = batch.labels_BL.flatten() >= 0
    ce_N = -logq_NV.gather(1, batch.labels_BL.flatten().clamp_min(0)[:, None])[:, 0]
    p_NK, tail_N = batch.weights_NK.double(), batch.tail_N.double()
    others_N = logq_NV.scatter(1, batch.ids_NK, float("-inf")).logsumexp(-1)
    kl_N = (p_NK * (p_NK.log() - logq_NV.gather(1, batch.ids_NK))).sum(-1) + tail_N * (tail_N.log() - others_N)
    return (alpha * kl_N + (1 - alpha) * ce_N)[counts_N].mean()


@pytest.mark.parametrize(("name", "settings", "scale", "softcap"), ARCHITECTURES, ids=IDS)
def test_loss_and_gradients_are_those_of_full_logits(name: str, settings, scale: float, softcap: float | None) -> None:
    model, batch = _model(name, settings), _batch()
    module = DistillationModule(model, OptimizationSettings(), 10, 0.5, 1.0, VOCAB_SIZE).eval()
    assert module._head.scale == pytest.approx(scale, rel=1e-7)  # a float32, and exactly that
    assert module._head.softcap == softcap
    loss = module.loss(batch, 0.5).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = _loss_of_full_logits(model, batch, 0.5)
    expected.backward()
    # float32 against float64 from the logits on: 1e-7 of a few nats, summed over 21 rows
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    true = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == true.keys()
    for key, gradient in true.items():
        # sums in another order; of a head of 48 rows of which 8 are padding
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=2e-6 * max(1, float(gradient.abs().max())))


def test_the_logits_of_the_table_are_far_from_flat_so_caps_and_scales_are_seen() -> None:
    for name in ("gemma2", "cohere", "granite"):
        settings = next(row[1] for row in ARCHITECTURES if row[0] == name)
        batch, model = _batch(), _model(name, settings)
        true = _loss_of_full_logits(model, batch, 0.5).item()
        plain = settings | {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
        other = _model(name, {k: v for k, v in plain.items() if k in settings})
        assert abs(_loss_of_full_logits(other, batch, 0.5).item() - true) > 1e-2


def test_the_head_of_a_vocabulary_like_gemma_s_is_served_though_float32_rounds_sums_over_it() -> None:
    # in float32 torch's own loss is off by 3e-5 nats there, and by 7e-5 with Gemma 3
    settings = MODERN | {"vocab_size": 262_144, "head_dim": 16, "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](**settings)).eval()
    weight_VH = model.get_output_embeddings().weight
    weight_VH.data.mul_(3 / (weight_VH.std() * weight_VH.shape[1] ** 0.5))
    assert served_head(model, 262_144).linear.weight is weight_VH


def test_what_has_no_part_in_the_logits_is_frozen() -> None:
    name, settings, *_ = ARCHITECTURES[-1]
    model = _model(name, settings)
    DistillationModule(model, OptimizationSettings(), 10, 0.5, 1.0, VOCAB_SIZE)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in model.named_parameters() if "vision" in key or "multi_modal" in key}
    assert frozen


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "mamba"])
def test_a_bfloat16_model_is_served_as_well(name: str) -> None:
    settings, scale, softcap = next(row[1:] for row in ARCHITECTURES if row[0] == name)
    model = _model(name, settings, torch.bfloat16)
    head = served_head(model, VOCAB_SIZE)
    # a factor that a bfloat16 can hold
    assert head.scale == pytest.approx(scale, rel=2**-8)
    assert head.softcap == softcap
    module = DistillationModule(model, OptimizationSettings(), 10, 0.0, 1.0, VOCAB_SIZE).eval()
    batch = _batch()
    with torch.no_grad():
        logits_NV = model(input_ids=batch.input_ids_BL).logits.float().flatten(0, 1)[:, :VOCAB_SIZE]
        expected = cross_entropy(logits_NV, batch.labels_BL.flatten())
        # logits of up to 20 nats, rounded to 8 bits in another order
        assert module.loss(batch, 0.0).loss.item() == pytest.approx(expected.item(), abs=0.05)


def test_a_trial_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = _model("gpt2", OLD).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    served_head(model, VOCAB_SIZE)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.lm_head._forward_hooks


class _Adapted(nn.Linear):
    """A head with an adapter that has not learned yet: its product is that of the linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + self.up(self.down(hidden))


def _adapted(model: PreTrainedModel) -> None:
    model.lm_head = _Adapted(model.lm_head)


def _in_8_bits(model: PreTrainedModel) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


class _Changed(LlamaForCausalLM):
    """A model that does something to its logits of which no configuration speaks."""

    how = staticmethod(lambda logits_BLV: logits_BLV)

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = self.how(output.logits)
        return output


def _forbid_a_token(logits_BLV: torch.Tensor) -> torch.Tensor:
    return logits_BLV.index_fill(2, torch.tensor([7]), torch.finfo(logits_BLV.dtype).min)


def _normalised(logits_BLV: torch.Tensor) -> torch.Tensor:
    return logits_BLV - logits_BLV.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "how",
    [_forbid_a_token, _normalised, lambda x: x + 1.0, lambda x: x.clamp(-30, 30), lambda x: 30 * x / (30 + x.abs())],
    ids=["a token forbidden", "normalised", "shifted", "clamped", "capped otherwise"],
)
def test_logits_that_are_changed_in_an_unknown_way_are_refused(how) -> None:
    torch.manual_seed(0)
    model = _Changed(LlamaConfig(vocab_size=PADDED, **MODERN))
    assert served_head(model, VOCAB_SIZE).scale == 1
    model.how = how
    with pytest.raises(InputError, match="fused loss; found logits that are changed in another way, expected a factor"):
        served_head(model, VOCAB_SIZE)


def test_a_factor_and_a_cap_of_which_no_setting_speaks_are_found() -> None:
    torch.manual_seed(0)
    model = _Changed(LlamaConfig(vocab_size=PADDED, **MODERN))
    model.how = lambda logits_BLV: 20 * torch.tanh(0.5 * logits_BLV / 20)
    head = served_head(model, VOCAB_SIZE)
    assert (head.scale, head.softcap) == (0.5, 20.0)


@pytest.mark.parametrize(
    ("change", "found"),
    [(_adapted, "a head of type _Adapted, expected a plain linear layer"), (_in_8_bits, "a head in torch.float8_e4m3")],
    ids=["adapter", "8 bits"],
)
def test_a_head_that_is_no_plain_linear_layer_is_refused(change, found: str) -> None:
    model = _model("llama", MODERN)
    change(model)
    with pytest.raises(
        InputError, match=f"llama: this model's head cannot be trained by the fused loss; found {found}"
    ):
        served_head(model, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("bert", MODERN | {"is_decoder": True}, "a head that reads something else"),  # a layer between the two
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}, "a token that changes .* before it"),
    ],
)
def test_an_architecture_that_the_loss_cannot_stand_for_is_refused(name: str, settings, found: str) -> None:
    with pytest.raises(
        InputError, match=f"{name}: this model's head cannot be trained by the fused loss; found {found}"
    ):
        served_head(_model(name, settings), VOCAB_SIZE)


def test_a_model_with_an_encoder_is_refused() -> None:
    model = _model("llama", MODERN)
    model.config.is_encoder_decoder = True
    with pytest.raises(InputError, match="found an encoder beside the decoder, expected a decoder alone"):
        served_head(model, VOCAB_SIZE)


def test_a_model_that_needs_more_than_tokens_is_refused_with_its_own_words() -> None:
    model = _model("llama", MODERN)
    model.forward = lambda **_: (_ for _ in ()).throw(ValueError("pixel_values are needed\nand more"))
    with pytest.raises(
        InputError, match="found pixel_values are needed, expected a model that runs on token ids alone"
    ):
        served_head(model, VOCAB_SIZE)


def test_a_model_whose_weights_are_not_finite_is_refused() -> None:
    model = _model("llama", MODERN)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="found logits that are not finite, expected weights that are numbers"):
        served_head(model, VOCAB_SIZE)
