"""What models write: greedily, from the same beginnings, with real ids alone, and read back from `results.json`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from capgap.pipeline.eval import stage
from capgap.pipeline.eval.samples import prompts_of
from capgap.schemas.results import EvalResults
from capgap.schemas.run_eval import EvalSettings

VOCAB_SIZE = 128


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id, so that text tells the ids."""
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0", unk_token="w1"
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory, make_context, tokenizer) -> EvalResults:
    context = make_context(
        tmp_path_factory.mktemp("run"), {"distilled": {}}, 1, num_text_samples=2, text_sample_tokens=5
    )
    tokenizer.save_pretrained(context.input("corpus").path / "tokenizer")
    stage.run(context)
    return EvalResults.model_validate_json((Path(context.folder) / "results.json").read_bytes())


def test_a_sample_is_the_greedy_continuation_and_twins_write_alike(measured, make_model, make_sequences):
    tokens_BL1 = make_sequences().tokens_BL1
    assert len(measured.samples) == 2
    for sample, place in zip(measured.samples, (0, 2), strict=True):
        # w0 ends a document, which is nothing to read
        assert sample.prompt.split() == [f"w{i}" for i in tokens_BL1[place, :12] if i]
        assert sample.truth.split() == [f"w{i}" for i in tokens_BL1[place, 12:17] if i]
        assert list(sample.continuations) == ["teacher", "train/distilled/seed-0"]
        ids = tokens_BL1[place, :12].tolist()
        for _ in range(5):
            with torch.inference_mode():
                ids.append(int(make_model(0, rows=160)(torch.tensor([ids])).logits[0, -1, :VOCAB_SIZE].argmax()))
            if ids[-1] == 0:
                break
        # the one student is the teacher itself
        assert set(sample.continuations.values()) == {" ".join(f"w{i}" for i in ids[12:] if i)}


def test_padded_ids_and_a_models_own_generation_settings_have_no_say(make_model, make_sequences, tokenizer):
    prompts = prompts_of(
        make_sequences(), "packed", EvalSettings(num_text_samples=1, text_sample_tokens=6), tokenizer, 100
    )
    model = make_model(3, rows=160, tied=False)
    with torch.no_grad():
        model.lm_head.weight[100:] *= 50  # else no padded id would ever be the top-1 token
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, max_new_tokens=1)
    (text,) = prompts.write(model, "teacher")
    ids = [int(word.removeprefix("w")) for word in text.split()]
    assert max(ids) < 100
    again = make_model(3, rows=160, tied=False)
    so_far = list(prompts.prompts[0])
    for one in ids:
        with torch.inference_mode():
            assert int(again(torch.tensor([so_far])).logits[0, -1, :100].argmax()) == one
        so_far.append(one)


def test_under_the_rule_document_a_beginning_is_of_one_document(make_sequences, tokenizer):
    sequences = make_sequences()
    starts_BL1 = np.zeros_like(sequences.starts_BL1)
    starts_BL1[:, [0, 4, 7, 20]] = True
    sequences = dataclasses.replace(sequences, starts_BL1=starts_BL1)
    settings = EvalSettings(num_text_samples=64, text_sample_tokens=1024)
    packed, alone = (prompts_of(sequences, rule, settings, tokenizer, 128) for rule in ("packed", "document"))
    assert [len(prompt) for prompt in packed.prompts] == [12] * len(sequences)
    assert [len(prompt) for prompt in alone.prompts] == [5] * len(sequences)
    assert packed.truths == alone.truths and {len(truth) for truth in alone.truths} == {13}


def test_a_beginning_is_a_document_s_where_one_begins_early_enough(make_sequences, tokenizer):
    sequences = make_sequences(seq_len=200)
    starts_BL1 = np.zeros_like(sequences.starts_BL1)
    starts_BL1[0, [30, 60]] = True
    starts_BL1[1, 190] = True  # too late for a beginning and what follows it
    sequences = dataclasses.replace(sequences, starts_BL1=starts_BL1)
    settings = EvalSettings(num_text_samples=6, text_sample_tokens=8)
    found = prompts_of(sequences, "packed", settings, tokenizer, 128)
    tokens_BL1 = sequences.tokens_BL1
    assert found.prompts[0] == tuple(tokens_BL1[0, 30:78]) and found.truths[0] == tuple(tokens_BL1[0, 78:86])
    assert found.prompts[1] == tuple(tokens_BL1[1, :48]) and found.truths[1] == tuple(tokens_BL1[1, 48:56])


def test_a_model_that_cannot_write_is_left_out_and_said(make_model, make_sequences, tokenizer, caplog):
    prompts = prompts_of(make_sequences(), "packed", EvalSettings(), tokenizer, 128)
    bare = make_model().model  # no head, so no way to write
    with caplog.at_level(logging.WARNING, "capgap"):
        assert prompts.write(bare, "teacher") is None
    assert "teacher writes no samples: LlamaModel cannot generate" in caplog.text
    assert [sample.continuations for sample in prompts.samples({})] == [{}] * 3


def test_results_from_before_there_were_samples_can_be_read(measured):
    old = measured.model_dump(mode="json")
    del old["samples"]
    assert EvalResults.model_validate(old).samples == ()
