"""Drafts in vLLM.

Legend: N positions, V vocabulary, B requests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_model, tiny_llama
from transformers import LlamaForCausalLM

from capgap.pipeline.eval.drafts import DraftJob, _spread, drafted, prompts_of
from capgap.schemas.errors import MachineError, SettingError
from capgap.schemas.run_eval import SpeculativeSettings


def test_prompts_are_the_beginnings_of_the_first_sequences(make_sequences) -> None:
    sequences = make_sequences(6, 24)
    settings = SpeculativeSettings(num_prompts=4, num_prompt_tokens=8, num_new_tokens=10)
    assert prompts_of(sequences, settings) == tuple(tuple(row) for row in sequences.tokens_BL1[:4, :8].tolist())
    # no more than leaves room for what is written
    assert {len(prompt) for prompt in prompts_of(sequences, settings.model_copy(update={"num_new_tokens": 20}))} == {4}
    with pytest.raises(SettingError, match=r"num_new_tokens: no room for a prompt; found 24, expected fewer .* 24"):
        prompts_of(sequences, settings.model_copy(update={"num_new_tokens": 24}))


def test_a_requests_temperature_is_that_of_each_of_its_tokens() -> None:
    found = _spread(torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 3, 6], dtype=torch.int32), 6, 0, 1)
    assert found.tolist() == [0.5, 0.5, 1.0, 2.0, 2.0, 2.0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A teacher, and a student that agrees with it now and then; vLLM has no narrower heads on a CPU."""
    found = {}
    for name, seed, layers in (("teacher", 0, 2), ("student", 1, 1)):
        model = tiny_llama(
            seed,
            vocab_size=128,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=layers,
            max_position_embeddings=128,
            initializer_range=0.15,
        )
        found[name] = save_model(tmp_path_factory.mktemp(name), model)
    return found


def _job(folders: dict[str, str], student: str, **settings: Any) -> DraftJob:
    rng = np.random.default_rng(0)
    prompts = tuple(tuple(map(int, rng.integers(0, 128, 12))) for _ in range(64))
    return DraftJob(folders["teacher"], folders[student], prompts, SpeculativeSettings(**settings), "cpu")


def _foretold(folders: dict[str, str], num_sequences: int = 256) -> float:
    """Sum over ids of the smaller probability, on text that the teacher writes."""
    teacher, student = (LlamaForCausalLM.from_pretrained(folders[name]).eval() for name in ("teacher", "student"))
    torch.manual_seed(0)
    prompts = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (num_sequences, 12)))
    with torch.inference_mode():
        written = teacher.generate(prompts, max_new_tokens=48, min_new_tokens=48, do_sample=True, top_k=0, top_p=1.0)
        p_NV, q_NV = (model(written[:, :-1]).logits[:, 11:].softmax(-1) for model in (teacher, student))
    return float(torch.minimum(p_NV, q_NV).sum(-1).mean())


@pytest.mark.slow
def test_vllm_accepts_what_the_distributions_foretell(folders) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = drafted(_job(folders, "student", num_speculative_tokens=1, num_new_tokens=48))
    expected = _foretold(folders)
    # binomial: both counts are of a few thousand positions, and four standard errors of the smaller one leave room for
    # the positions behind an accepted draft, which are not drafted
    error = 4 * math.sqrt(expected * (1 - expected) / found.num_drafts)
    assert found.num_drafts > 1500
    assert found.acceptance == pytest.approx(expected, abs=error)
    # a draft that was its top-1 token would be accepted a tenth as often
    assert found.acceptance > 0.15


@pytest.mark.slow
def test_a_student_that_is_the_teacher_drafts_what_is_accepted(folders) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = drafted(_job(folders, "teacher", num_speculative_tokens=3, num_new_tokens=16))
    # probabilities of one batch and of another differ in the last bits: one draft in thousands may fall between
    assert found.acceptance > 0.99
    assert found.tokens_per_look > 3.9


@pytest.mark.slow
def test_models_that_vllm_does_not_take_are_one_line(folders, tmp_path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    save_model(tmp_path, tiny_llama(vocab_size=96, hidden_size=64, intermediate_size=64))
    job = _job({"teacher": folders["teacher"], "student": str(tmp_path)}, "student")
    with pytest.raises(MachineError, match=r"eval.speculative: .* cannot be measured; found .*vocab") as error:
        drafted(job)
    assert "\n" not in str(error.value)
