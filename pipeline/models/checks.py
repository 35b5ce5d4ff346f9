"""Fresh models of a given shape, and the checks that a given one must pass before it meets a corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.models.complete import require_complete
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import model_facts
from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.tokenizers import load_tokenizer, require_extended_tokenizer, require_same_tokenizer
from capgap.pipeline.stage.context import StageInput
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.run_model import ModelShape


def corpus_tokenizer(corpus: StageInput) -> PreTrainedTokenizerBase:
    """The tokenizer of a finished corpus, or of a cache that stands for it."""
    return RunText(corpus).tokenizer()


def fresh_model(shape: ModelShape, corpus: StageInput, seed: int) -> PreTrainedModel:
    """A Llama-shaped model whose weights are a pure function of shape, vocabulary and seed.

    Weights have the standard deviation sqrt(2 / (5 hidden)) ("small init": Nguyen & Salazar, arXiv 1910.05895). With
    the 0.02 that is usual at widths of thousands, a narrow model spends its first hundreds of steps on a plateau.
    """
    facts = RunText(corpus).facts
    config = LlamaConfig(
        vocab_size=facts.tokenizer.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_heads,
        max_position_embeddings=seq_len_of(corpus),
        tie_word_embeddings=shape.tie_word_embeddings,
        initializer_range=math.sqrt(2 / (5 * shape.hidden_size)),
        bos_token_id=facts.bos_ids[0] if facts.bos_ids else facts.tokenizer.eos_id,
        eos_token_id=facts.tokenizer.eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def seq_len_of(corpus: StageInput) -> int:
    """Targets per sequence of a finished corpus, or of a cache that stands for it."""
    return RunText(corpus).seq_len


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Whoever made the run file knows the setting."""
    try:
        yield
    except InputError as error:
        raise InputError(error.what, where=setting, found=error.found, expected=error.expected, fix=error.fix) from None


def check_given_model(
    path: str,
    corpus: StageInput,
    setting: str,
    trust_remote_code: bool = False,
    *,
    to_be_adapted: bool = False,
    is_served: bool = False,
) -> tuple[str, ModelFacts]:
    """Facts of a given model that fits the text, and its path, absolute where it is a folder.

    Args:
        path: folder or id, as given.
        corpus: the corpus that it must fit, or the cache that stands for it.
        setting: the setting that names the model, for errors.
        trust_remote_code: run code that comes with it.
        to_be_adapted: the corpus's tokenizer may have entries that the model has not.
        is_served: its weights are elsewhere; configuration and tokenizer alone are looked at.

    Raises:
        InputError: there is no such model, it has an encoder, its weights are not complete, or it takes shorter
            sequences than the corpus has.
        MismatchError: its tokenizer differs from the corpus's, or its vocabulary is smaller.
    """
    text = RunText(corpus)
    expected = Expected(
        corpus_tokenizer(corpus), f"the {corpus.manifest.stage}", text.seq_len, to_be_adapted, is_served
    )
    return check_model(path, setting, trust_remote_code, expected)


@dataclass(frozen=True)
class Expected:
    """What a given model must fit.

    Attributes:
        tokenizer: of the text; None where it is not known yet.
        whose: the text, as it is called in errors.
        seq_len: targets of its sequences.
        to_be_adapted: the text's tokenizer may have entries that the model has not.
        is_served: the model's weights are elsewhere.
    """

    tokenizer: PreTrainedTokenizerBase | None
    whose: str
    seq_len: int
    to_be_adapted: bool = False
    is_served: bool = False


def check_model(path: str, setting: str, trust_remote_code: bool, expected: Expected) -> tuple[str, ModelFacts]:
    """As `check_given_model`, for a text of which only this is known."""
    where = f"{setting}: {path}"
    resolved = str(Path(path).resolve()) if Path(path).is_dir() else path
    with named(where):
        config = load_config(resolved, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            "this is no causal language model", where=where, found="an encoder beside the decoder", expected="a decoder"
        )
    with named(where):
        if not expected.is_served:
            require_complete(resolved, trust_remote_code, config)
        tokenizer = load_tokenizer(resolved, trust_remote_code)
    if expected.tokenizer is not None:
        require = require_extended_tokenizer if expected.to_be_adapted else require_same_tokenizer
        require(expected.tokenizer, expected.whose, tokenizer, where)
    # what it has beside the text's ids is padding
    of_text = tokenizer if expected.tokenizer is None or expected.to_be_adapted else expected.tokenizer
    facts = model_facts(config, of_text, resolved, trust_remote_code)
    if facts.padded_vocab_size < facts.tokenizer.vocab_size:
        raise MismatchError(
            f"the model's vocabulary is smaller than {expected.whose}'s",
            where=where,
            found=f"{facts.padded_vocab_size} rows in its embedding",
            expected=f"at least {facts.tokenizer.vocab_size}",
            fix="resize its embeddings, or use a model of this tokenizer",
        )
    if facts.max_positions is not None and facts.max_positions < expected.seq_len:
        raise InputError(
            f"the model takes shorter sequences than {expected.whose} has",
            where=where,
            found=f"max_position_embeddings = {facts.max_positions}",
            expected=f"at least {expected.seq_len}, the targets of a sequence",
            fix="use a model with more positions, or a smaller corpus.seq_len",
        )
    return resolved, facts
