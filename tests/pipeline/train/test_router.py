from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SIZES, tiny_llama, tiny_model
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

from capgap.pipeline.store import Batch
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.router import RouterLoss
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

SHAPE = SIZES | {"vocab_size": 40, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return tiny_model(CONFIGS[request.param])


@pytest.fixture
def batch() -> Batch:
    tokens_BL1 = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(1))
    return Batch(tokens_BL1[:, :-1], tokens_BL1[:, 1:])


def _module(model, weight: float, **settings: Any) -> DistillationModule:
    objective = Objective(router_loss_weight=weight)
    return DistillationModule(model, OptimizationSettings(**settings), 10, 0.0, 1.0, 40, objective)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_loss_and_its_gradients_are_those_of_transformers(model, batch, checkpointed: bool) -> None:
    module = _module(model, 0.3, activation_checkpointing=checkpointed).train()
    found = module.training_step(batch, 0)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    output = model(input_ids=batch.input_ids_BL, output_router_logits=True)
    ce = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch.labels_BL.flatten())
    expected = ce + 0.3 * output.aux_loss
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # float32, summed in another order
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_without_a_weight_the_routers_learn_from_the_tokens_alone(model, batch) -> None:
    plain = _module(model, 0.0).train()
    loss = plain.training_step(batch, 0)
    ce = torch.nn.functional.cross_entropy(model(batch.input_ids_BL).logits.flatten(0, 1), batch.labels_BL.flatten())
    assert loss.item() == pytest.approx(ce.item(), rel=1e-6)  # as above
    # whatever the configuration says, the setting decides
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0
    assert torch.equal(plain.training_step(batch, 0), loss)


def test_the_held_out_loss_has_none_of_it(model, batch) -> None:
    with_it, without = _module(model, 0.3).eval(), _module(model, 0.0).eval()
    assert torch.equal(with_it.loss(batch, 0.0).loss, without.loss(batch, 0.0).loss)


def test_experts_that_are_used_evenly_have_the_least_loss() -> None:
    loss = RouterLoss(tiny_model(CONFIGS["mixtral"]))

    def loss_of(logits_NE: torch.Tensor) -> float:
        return loss(MoeModelOutputWithPast(router_logits=(logits_NE, logits_NE))).item()

    tokens = torch.arange(12)
    even_NE = torch.full((12, 4), -20.0)
    even_NE[tokens, tokens % 4] = even_NE[tokens, (tokens + 1) % 4] = 0.0
    one_sided_NE = torch.tensor([0.0, 0.0, -20.0, -20.0]).expand(12, 4)
    # transformers adds over the two experts of a token: 2 where the paper's loss has 1
    assert loss_of(even_NE) == pytest.approx(2.0)
    assert loss_of(one_sided_NE) == pytest.approx(4.0)


def test_a_model_without_experts_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(
        InputError, match=r"llama: this model has no load-balancing loss; found train\.router_loss_weight"
    ):
        _module(model, 0.1)
