"""Make fresh models of a given shape, and check that a given model fits a corpus."""

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
    """Load the tokenizer of a finished corpus, or of a cache that takes its place."""
    return RunText(corpus).tokenizer()


def fresh_model(shape: ModelShape, corpus: StageInput, seed: int) -> PreTrainedModel:
    """Make a Llama-shaped model whose weights are a pure function of shape, vocabulary and seed.

    Weights have the standard deviation sqrt(2 / (5 hidden)) ("small init": Nguyen & Salazar, arXiv 1910.05895). With
    0.02, which is usual for widths of thousands, a narrow model spends its first hundreds of steps on a plateau.
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
    """Return the number of targets per sequence of a finished corpus, or of a cache that takes its place."""
    return RunText(corpus).seq_len


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Within this context, make an InputError name the setting, which the author of the run file knows."""
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
    """Check that a given model fits a corpus, and return its path, absolute for a folder, and its facts.

    Args:
        path: folder or id, as given.
        corpus: the corpus that the model must fit, or a cache that takes its place.
        setting: the setting that names the model, for errors.
        trust_remote_code: whether to run code that comes with the model.
        to_be_adapted: whether the corpus's tokenizer may have entries that the model lacks.
        is_served: whether the weights are elsewhere, so that only configuration and tokenizer are checked.

    Raises:
        InputError: the model does not exist, has an encoder, lacks weights, or takes shorter sequences than the corpus
            has.
        MismatchError: its tokenizer differs from the corpus's, or its vocabulary is smaller.
    """
    text = RunText(corpus)
    expected = Expected(
        corpus_tokenizer(corpus), f"the {corpus.manifest.stage}", text.seq_len, to_be_adapted, is_served
    )
    return check_model(path, setting, trust_remote_code, expected)


@dataclass(frozen=True)
class Expected:
    """The properties of a text that a given model must fit.

    Attributes:
        tokenizer: tokenizer of the text; None where it is not known yet.
        whose: name of the text in errors.
        seq_len: number of targets per sequence.
        to_be_adapted: whether the text's tokenizer may have entries that the model lacks.
        is_served: whether the model's weights are elsewhere.
    """

    tokenizer: PreTrainedTokenizerBase | None
    whose: str
    seq_len: int
    to_be_adapted: bool = False
    is_served: bool = False


def check_model(path: str, setting: str, trust_remote_code: bool, expected: Expected) -> tuple[str, ModelFacts]:
    """Check a given model by the known properties of its text; results and errors are those of `check_given_model`."""
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
    # rows of the model beyond the ids of the text are padding
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
