"""Both engines continue prompts alike, and alike every time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from judge_runs import tiny_model
from transformers import GenerationConfig

from capgap.pipeline.answers.chat import Generated, Prompt
from capgap.pipeline.answers.generators import TransformersGenerator, VllmGenerator
from capgap.schemas.errors import InputError

STOP_ID = 5
LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = tiny_model(1)
    # what a folder says of sampling is not what is asked for
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.01, top_k=1)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def generator(folder: str) -> TransformersGenerator:
    return TransformersGenerator(folder, [STOP_ID], "cpu", "auto")


def prompt(first: int, temperature: float = 0.0, seed: int = 0, max_tokens: int = 20, top_p: float = 1.0) -> Prompt:
    return Prompt(tuple(range(first, first + 8)), max_tokens, temperature, top_p, seed)


def test_at_temperature_0_each_token_is_the_top_1_token(folder: str, generator: TransformersGenerator) -> None:
    (made,) = generator.generate([prompt(10)])
    ids = [*prompt(10).ids, *made.ids]
    with torch.inference_mode():
        most_probable = tiny_model(1)(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert ids[8:] == most_probable[7 : len(ids) - 1]
    assert made.finish == "length" and len(made.ids) == 20


def test_an_answer_ends_before_the_token_that_ends_it(folder: str) -> None:
    (whole,) = TransformersGenerator(folder, [], "cpu", "auto").generate([prompt(10)])
    stop = whole.ids[3]
    (made,) = TransformersGenerator(folder, [stop], "cpu", "auto").generate([prompt(10)])
    assert made == Generated(whole.ids[: whole.ids.index(stop)], "stop", end_id=stop)


def test_what_is_drawn_follows_from_the_seed_alone(generator: TransformersGenerator) -> None:
    torch.manual_seed(1)
    (first,) = generator.generate([prompt(10, 1.0, seed=7)])
    torch.manual_seed(2)
    _, again = generator.generate([prompt(30, 1.0, seed=8), prompt(10, 1.0, seed=7)])
    (other,) = generator.generate([prompt(10, 1.0, seed=8)])
    assert first == again != other


def test_the_share_of_the_probability_that_is_drawn_from_counts(generator: TransformersGenerator) -> None:
    (most_probable,) = generator.generate([prompt(10)])
    (narrow,) = generator.generate([prompt(10, 1.0, seed=7, top_p=1e-6)])
    (wide,) = generator.generate([prompt(10, 1.0, seed=7)])
    assert narrow == most_probable != wide


def test_a_model_with_broken_weights_is_named(tmp_path: Path) -> None:
    model = tiny_model(1)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    broken = TransformersGenerator(str(tmp_path), [], "cpu", "auto")
    with pytest.raises(
        InputError, match=rf"{tmp_path}: the model's answers cannot be sampled; found logits that are not"
    ):
        broken.generate([prompt(10, 1.0)])


@pytest.fixture(scope="module")
def vllm(folder: str) -> Iterator[VllmGenerator]:
    pytest.importorskip("vllm")
    started = VllmGenerator(folder, [STOP_ID], LENGTH, "cpu", "auto", 0.5)
    yield started
    started.close()


@pytest.mark.slow
def test_vllm_s_most_probable_answers_are_those_of_transformers(
    vllm: VllmGenerator, generator: TransformersGenerator
) -> None:
    prompts = [prompt(first) for first in range(10, 200, 10)]
    told: list[float] = []
    assert vllm.generate(prompts, told.append) == generator.generate(prompts)
    assert told == [1] * len(prompts), "each is heard of, and not all of them at the end alone"


@pytest.mark.slow
def test_vllm_s_draws_follow_from_the_seed_whatever_stands_beside(vllm: VllmGenerator) -> None:
    def drawn(seed: int) -> list[Prompt]:
        return [prompt(first, 1.0, seed + first) for first in range(10, 100, 10)]

    first, again, other = (vllm.generate(drawn(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert vllm.generate(drawn(0)[3:4]) == first[3:4]


@pytest.mark.slow
def test_vllm_s_draws_follow_from_the_seed_where_prompts_do_not_fit_into_one_pass(folder: str) -> None:
    """Twelve thousand tokens of prompts, where a pass has eight."""
    pytest.importorskip("vllm")
    # all begin otherwise, so that none is remembered from another
    ids = [(10 + number // 20, 10 + number % 20, *range(10, 48)) for number in range(300)]
    crowd = [Prompt(one, LENGTH - 40, 1.0, 1.0, number) for number, one in enumerate(ids)]
    started = VllmGenerator(folder, [STOP_ID], LENGTH, "cpu", "auto", 0.5, num_at_once=300)
    try:
        assert started.generate(crowd)[-8:] == started.generate(crowd[-8:])
    finally:
        started.close()
