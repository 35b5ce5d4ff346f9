from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DEEPER, gpt2_config, llama_config, tiny_model
from transformers import AutoModelForCausalLM

from capgap.pipeline.store import Batch
from capgap.pipeline.train.faster import checkpoint_activations, compile_layers, layers_of
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

LLAMA, GPT2 = llama_config(vocab_size=48, **DEEPER), gpt2_config()


@pytest.fixture
def batch() -> Batch:
    tokens_BL1 = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(1))
    ids_NK = torch.arange(4).expand(32, 4).contiguous()
    weights_NK = torch.softmax(torch.arange(4.0), -1).expand(32, 4).contiguous()
    return Batch(tokens_BL1[:, :-1], tokens_BL1[:, 1:], ids_NK, weights_NK)


def _step(config, batch: Batch, device: str = "cpu", **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a fresh model's first step."""
    model = tiny_model(config)
    module = DistillationModule(model, OptimizationSettings(**settings), 10, 0.5, 1.0, 40).train()
    if settings.get("compile"):
        compile_layers(model, module._head.decoder, torch.device(device))
    torch.manual_seed(1)  # of dropout
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["Llama", "GPT-2"])
def test_checkpointed_activations_give_the_same_bits(config, batch) -> None:
    (loss, gradients), (again, recomputed) = (
        _step(config, batch, activation_checkpointing=value) for value in (False, True)
    )
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_checkpointed_layers_run_twice(batch) -> None:
    model = tiny_model(LLAMA)
    module = DistillationModule(model, OptimizationSettings(activation_checkpointing=True), 10, 0.5, 1.0, 40).train()
    runs = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    module.training_step(batch, 0).backward()
    assert len(runs) == 2


def test_a_model_that_cannot_checkpoint_is_refused(monkeypatch) -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="llama: this model does not support activation checkpointing"):
        checkpoint_activations(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_decoder_gives_the_same_loss_and_gradients(batch, checkpointed: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    loss, gradients = _step(LLAMA, batch)
    compiled_loss, compiled = _step(LLAMA, batch, compile=True, activation_checkpointing=checkpointed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # float32, in another order
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == compiled.keys(), "compiled parameters keep their names"
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.fixture
def attention_calls(monkeypatch) -> list[dict[str, Any]]:
    """What torch's attention is called with from now on, also by what is compiled, which here is run as it is."""
    calls: list[dict[str, Any]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    @torch.compiler.disable
    def seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append({"causal": kwargs["is_causal"], "mask": kwargs["attn_mask"] is not None})
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    return calls


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["Llama", "GPT-2"])
def test_compiled_layers_ask_for_causal_attention_without_a_mask(
    config, batch, attention_calls, checkpointed: bool
) -> None:
    num_layers = config.num_hidden_layers
    settings = {"compile": True, "activation_checkpointing": checkpointed}
    _step(config, batch, **settings)
    tried = len(attention_calls) - num_layers * (2 if checkpointed else 1)
    assert attention_calls[tried:] == [{"causal": True, "mask": False}] * (len(attention_calls) - tried)
    assert tried >= 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiled_layers_are_given_the_mask_that_documents_need(batch, attention_calls) -> None:
    batch.positions_BL = torch.arange(8).repeat(2, 2)
    _step(LLAMA, batch, compile=True)
    assert attention_calls[-LLAMA.num_hidden_layers :] == [{"causal": False, "mask": True}] * LLAMA.num_hidden_layers


def test_many_layers_share_what_is_compiled(batch, attention_calls) -> None:
    found = []
    for num_layers in (3, 12):  # more than dynamo would compile one function for
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        _step(llama_config(vocab_size=48, **DEEPER | {"num_hidden_layers": num_layers}), batch, compile=True)
        found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert found[0] == found[1] > 0


def test_the_layers_of_a_model_that_names_none_are_its_longest_list() -> None:
    model = AutoModelForCausalLM.from_config(LLAMA)
    named = layers_of(model, model)
    assert named == list(model.model.layers)
    model._no_split_modules = None
    assert layers_of(model, model.model) == named


_WITHOUT_A_COMPILER = """
import torch
from capgap.pipeline.train.faster import compile_layers
from capgap.schemas.errors import MachineError

try:
    compile_layers(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.device("cpu"))
except MachineError as error:
    print(error)
"""


def test_a_machine_without_a_compiler_is_told_so(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True)
    assert "train.compile: torch.compile does not work on this machine; found " in done.stdout, done.stderr
    assert "expected a C++ compiler; install g++, or leave train.compile out" in done.stdout
