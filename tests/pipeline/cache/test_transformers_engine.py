from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import SIZES, llama_config, save_model, tiny_model
from transformers import AutoModelForCausalLM as AnyModel
from transformers import CohereConfig, FalconH1Config, Gemma2Config, GPTJConfig, GraniteConfig

from capgap.pipeline.cache import transformers_engine
from capgap.pipeline.cache.scoring import Request, row_offsets
from capgap.pipeline.cache.transformers_engine import TransformersEngine
from capgap.schemas.errors import InputError

NUM_SEQUENCES = 6
COUNT_TOLERANCE = 1e-3  # n p of float32 logits against float64: 50 x 1e-5 nats


@pytest.fixture(scope="module")
def requests(requests_of):
    return requests_of(NUM_SEQUENCES)


@pytest.fixture(scope="module", params=["tied", "untied", "biased", "soft-capped"])
def folder(request, teacher_folder, tmp_path_factory) -> str:
    if request.param in ("tied", "untied"):
        return teacher_folder(tied=request.param == "tied")
    if request.param == "biased":
        config = GPTJConfig(vocab_size=320, n_embd=32, n_layer=1, n_head=2, rotary_dim=8, initializer_range=0.2)
    else:
        capped = {"final_logit_softcapping": 2.0, "initializer_range": 0.2}
        config = Gemma2Config(**SIZES | capped, num_key_value_heads=1, head_dim=16)
    return _saved(config, tmp_path_factory.mktemp("model"))


def _saved(config, folder) -> str:
    model = tiny_model(config, 1)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(1))
    return save_model(folder, model)


@pytest.fixture(scope="module")
def exact_logprobs(folder, requests):
    """Float64 softmax of the logits that the model itself computes, over the real vocabulary."""

    def at(temperature: float) -> np.ndarray:
        model = AnyModel.from_pretrained(folder).eval()
        tokens_BL1 = torch.from_numpy(np.stack([r.tokens_L1 for r in requests])).long()
        with torch.inference_mode():
            logits_BLV = model(input_ids=tokens_BL1[:, :-1]).logits[..., :300].double()
        return torch.log_softmax(logits_BLV / temperature, -1).numpy()

    return at


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_ids_and_logprobs_are_those_of_the_models_own_logits(
    folder, requests, recording, exact_logprobs, temperature
) -> None:
    engine = TransformersEngine(folder, recording(temperature=temperature), "auto", 4096, "cpu")
    assert (engine.name.split()[0], engine.dtype) == ("transformers", "float32")
    expected_BLV = exact_logprobs(temperature)
    scored = engine.score(requests)
    assert len(scored) == NUM_SEQUENCES
    for s, expected_LV, request in zip(scored, expected_BLV, requests, strict=True):
        kept_LK = np.take_along_axis(expected_LV, s.ids_LK.astype(np.int64), 1)
        # float32 products and logprobs, rounded at 1e-6 of up to 15 nats; 1e-4 leaves room for another order of sums
        assert np.abs(s.logprobs_LK - kept_LK).max() < 1e-4
        assert np.abs(np.sort(expected_LV)[:, ::-1][:, :16] - kept_LK).max() < 1e-4, "not the top-k tokens"
        assert np.abs(s.tail_L - (1 - np.exp(kept_LK).sum(1))).max() < 1e-4
        labels_LV = np.take_along_axis(expected_LV, request.tokens_L1[1:, None].astype(np.int64), 1)
        assert np.abs(s.label_logprobs_L - labels_LV[:, 0]).max() < 1e-4


def test_sequences_are_counted_as_they_are_scored(folder, requests, recording, monkeypatch) -> None:
    told: list[float] = []
    monkeypatch.setattr("capgap.pipeline.cache.transformers_engine.advance_within", told.append)
    halves = [Request(request.tokens_L1, share=0.5) for request in requests]
    # two sequences in a forward pass
    TransformersEngine(folder, recording(), "auto", 2 * len(requests[0].tokens_L1), "cpu").score(halves)
    assert len(told) > 1 and sum(told) == len(requests) / 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_count_is_the_floor_or_ceiling_of_n_p(folder, requests, recording, exact_logprobs, temperature) -> None:
    engine = TransformersEngine(folder, recording("sampled", 50, temperature), "float32", 4096, "cpu")
    expected_BLV = 50 * np.exp(exact_logprobs(temperature))
    for s, expected_LV in zip(engine.score(requests), expected_BLV, strict=True):
        counts_LV = np.stack([np.bincount(samples_n, minlength=300) for samples_n in s.samples_Ln])
        assert (counts_LV.sum(1) == 50).all()
        assert (counts_LV >= np.floor(expected_LV - COUNT_TOLERANCE)).all()
        assert (counts_LV <= np.ceil(expected_LV + COUNT_TOLERANCE)).all()


def test_the_draws_are_those_of_the_sequences_own_offsets(folder, requests, recording, exact_logprobs) -> None:
    settings = recording("sampled", 50)
    ends_BLV = np.exp(exact_logprobs(1.0)).cumsum(-1)
    wrong = 0
    for s, request, ends_LV in zip(
        TransformersEngine(folder, settings, "float32", 4096, "cpu").score(requests), requests, ends_BLV, strict=True
    ):
        points_Ln = (np.arange(50) + row_offsets(settings, request.digest, 0, len(ends_LV))[:, None]) / 50
        expected_Ln = np.stack(
            [np.searchsorted(e, p * e[-1], "right") for e, p in zip(ends_LV, points_Ln, strict=True)]
        )
        wrong += int((s.samples_Ln != expected_Ln).any(1).sum())
    # a point within 1e-6 of an id's end falls to either side: of 288 rows x 50 points, less than one is expected
    assert wrong <= 3


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_the_size_of_a_batch_does_not_matter(teacher_folder, requests, recording, kind: str) -> None:
    folder = teacher_folder()
    whole = TransformersEngine(folder, recording(kind), "auto", 4096, "cpu").score(requests)
    for batch_tokens, chunk_rows in [(16, 1024), (100, 7)]:
        engine = TransformersEngine(folder, recording(kind, chunk_rows=chunk_rows), "auto", batch_tokens, "cpu")
        different = 0
        for a, b in zip(engine.score(requests), whole, strict=True):
            # matrix products of other shapes sum in another order: 1e-5 nats
            assert np.abs(a.label_logprobs_L - b.label_logprobs_L).max() < 1e-5
            different += int((np.sort(_ids(a)) != np.sort(_ids(b))).any(1).sum())
        assert different <= 3, (
            "of 288 rows only those with two ids, or a sample and an id's end, within 1e-5 of each other"
        )


def _ids(scored) -> np.ndarray:
    return np.concatenate([scored.samples_Ln, scored.ids_LK], axis=1)


@pytest.mark.parametrize("batch_tokens", [16, 200, 4096])
def test_requests_of_any_length_are_answered_as_each_alone_and_in_order(
    folder, requests, recording, batch_tokens: int
) -> None:
    settings = recording("both", extra_temperatures=(2.0,))
    lengths = (2, 49, 17, 17, 3, 40)
    mixed = [Request(r.tokens_L1[:length]) for r, length in zip(requests, lengths, strict=True)]
    found = TransformersEngine(folder, settings, "float32", batch_tokens, "cpu").score(mixed)
    alone = TransformersEngine(folder, settings, "float32", 1, "cpu")
    for scored, request in zip(found, mixed, strict=True):
        (expected,) = alone.score([request])
        for name, array in vars(expected).items():
            assert np.shape(getattr(scored, name)) == np.shape(array), name
        # products of other shapes sum in another order
        assert np.abs(scored.label_logprobs_L - expected.label_logprobs_L).max() < 1e-4
        assert np.abs(scored.logprobs_LK - expected.logprobs_LK).max() < 1e-4
        assert np.abs(scored.log_tails_LT - expected.log_tails_LT).max() < 1e-4


def test_no_requests_are_no_rows(teacher_folder, recording) -> None:
    assert TransformersEngine(teacher_folder(), recording(), "auto", 64, "cpu").score([]) == []


def test_the_chosen_dtype_is_that_of_the_body_and_the_head_stays_in_float32(
    teacher_folder, requests, recording
) -> None:
    engine = TransformersEngine(teacher_folder(), recording(), "bfloat16", 4096, "cpu")
    assert engine.dtype == "bfloat16"
    logprobs_LK = engine.score(requests[:1])[0].logprobs_LK
    rounded_LK = torch.from_numpy(logprobs_LK).bfloat16().float().numpy()
    assert (logprobs_LK != rounded_LK).mean() > 0.9, "logprobs of a bfloat16 head would tie and repeat"


MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
SCALED = {
    "Granite": (GraniteConfig, {"logits_scaling": 8.0}),
    "Cohere": (CohereConfig, {"logit_scale": 0.0625}),
    "Falcon-H1": (FalconH1Config, {"lm_head_multiplier": 0.25, **MAMBA}),
}


@pytest.mark.parametrize("name", SCALED)
def test_logits_that_a_model_scales_are_its_own(tmp_path, requests, recording, name: str, monkeypatch) -> None:
    config, scale = SCALED[name]
    small = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    folder = _saved(config(**small, **heads, **scale), tmp_path)
    (scored,) = TransformersEngine(folder, recording(), "auto", 64, "cpu").score(requests[:1])
    tokens_L1 = torch.from_numpy(requests[0].tokens_L1).long()
    with torch.inference_mode():
        logits_LV = AnyModel.from_pretrained(folder)(tokens_L1[None, :-1]).logits[0, :, :300]
    wanted_L = logits_LV.log_softmax(-1).gather(1, tokens_L1[1:, None])[:, 0].numpy()
    # products of other shapes sum in another order
    assert np.abs(scored.label_logprobs_L - wanted_L).max() < 1e-4
    # one that nobody here has heard of
    monkeypatch.setattr(transformers_engine, "_logit_scale", lambda config: 1.0)
    with pytest.raises(InputError, match=r"logits are not its head's product.*cache\.engine to vllm"):
        TransformersEngine(folder, recording(), "auto", 64, "cpu")


def test_a_folder_without_a_model_is_refused(tmp_path, recording) -> None:
    save_model(tmp_path, llama_config())
    with pytest.raises(InputError, match="no weights as safetensors"):
        TransformersEngine(str(tmp_path), recording(), "auto", 64, "cpu")
    with pytest.raises(InputError, match="no model can be found"):
        TransformersEngine(str(tmp_path / "nowhere"), recording(), "auto", 64, "cpu")
