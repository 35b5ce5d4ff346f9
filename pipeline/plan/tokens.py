"""How many tokens a run has in its corpus, in its cache and in each training."""

from __future__ import annotations

import math

from capgap.pipeline.corpus.amounts import bytes_per_token, source_texts
from capgap.pipeline.corpus.split import SPLITS
from capgap.pipeline.generate.prompts import read_prompts, split_prompts
from capgap.pipeline.plan.measured import text_bytes_per_token
from capgap.pipeline.stage.rounds import rounds_of
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import CacheFacts, heldout_set, text_facts
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure
from capgap.schemas.run_corpus import SplitName
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings


def vocab_size_of(run: RunFile, text: Manifest | None) -> float | None:
    """Return the vocabulary size of the run's tokenizer; None where the tokenizer cannot be read.

    Args:
        run: The run file.
        text: Manifest of the finished corpus, or of the cache that stands for it; None where neither is finished.
    """
    if text is not None:
        return text_facts(text.stage, text.facts).tokenizer.vocab_size
    if run.corpus.tokenizer is None:
        return run.corpus.trained_vocab_size
    from capgap.pipeline.models.tokenizers import load_tokenizer

    more = run.corpus.extend_vocabulary
    try:
        return len(load_tokenizer(run.corpus.tokenizer)) + (0 if more is None else more.num_pieces)
    except CapgapError:
        return None


def split_tokens(
    run: RunFile, made: Manifest | None, vocab_size: float | None, stated_bytes_per_token: float | None
) -> dict[str, Figure]:
    """Return the tokens of each split of the corpus, counted where possible, else estimated.

    Args:
        run: The run file.
        made: Manifest of the finished corpus, or of the cache that stands for it; None where neither is finished.
        vocab_size: Size of the tokenizer's vocabulary; None where it is not known.
        stated_bytes_per_token: Bytes of text in a token, stated by the user; None to measure it on a sample.

    Raises:
        InputError: A source of the corpus cannot be read.
    """
    if made is not None:
        counted = {name: part.num_tokens for name, part in made.shard_sets.items()}
        for name in CacheFacts.model_validate(made.facts).recordings if made.read_as == "cache" else ():
            counted |= {"student": counted[name], "heldout": counted.get(heldout_set(name), 0)}
        return {name: Figure(value=counted.get(name, 0), source=f"the {made.stage}") for name in SPLITS}
    settings = run.corpus
    texts, shares = source_texts(settings)
    per_token = _bytes_per_token(run, vocab_size, stated_bytes_per_token)
    if per_token.value is None:
        return dict.fromkeys(SPLITS, per_token)
    total = 0.0
    for (_, source), text, share in zip(settings.named_sources, texts, shares, strict=True):
        total += min((text.value or 0.0) * share / per_token.value, source.max_tokens or math.inf)
    said = f"estimated: {', '.join(text.source for text in texts)}; {per_token.source}"
    fractions: dict[SplitName, float] = {"teacher": settings.teacher_fraction, "heldout": settings.heldout_fraction}
    fractions["student"] = 1 - sum(fractions.values())
    most = {name: _in_shards(run, limit) for name, limit in settings.max_tokens.items()}
    return {
        name: Figure(value=min(total * share, most.get(name, math.inf)), source=said)
        for name, share in fractions.items()
    }


def cache_tokens(run: RunFile, cache: Manifest | None, student: Figure) -> Figure:
    """Return the tokens that the teacher scores: whole shards of the student's split."""
    if cache is not None:
        return Figure(value=next(iter(cache.shard_sets.values())).num_tokens, source="the cache")
    asked = run.cache.max_tokens
    if student.value is None or asked is None:
        return student
    value, source = min(student.value, _in_shards(run, asked)), student.source
    if value > asked:
        source += f"; cache.max_tokens asks for {asked:,}, and a shard is scored whole ({_in_shards(run, 1):,} tokens)"
    return Figure(value=value, source=source)


def written_tokens(run: RunFile) -> Figure:
    """Return the most tokens that one round's answers can have; the tokens of the prompts are not counted.

    Raises:
        InputError: The prompts cannot be read.
    """
    rounds = rounds_of(run)
    chosen = split_prompts(read_prompts(rounds.prompts), rounds, 0)
    num_answers = len(chosen["student"]) * rounds.num_samples
    source = f"at most: {num_answers:,} answers of up to {rounds.max_new_tokens:,} tokens, a round"
    return Figure(value=num_answers * rounds.max_new_tokens, source=source)


def _in_shards(run: RunFile, num_tokens: int) -> int:
    """Round a number of tokens up to whole shards."""
    shard = run.corpus.sequences_per_shard * run.corpus.seq_len
    return math.ceil(num_tokens / shard) * shard


def trained_tokens(settings: OptimizationSettings, data: Figure) -> Figure:
    """Return the tokens that a training sees in all its epochs."""
    if data.value is None:
        return data
    value = data.value * settings.num_epochs
    most = value if settings.max_tokens is None else settings.max_tokens
    return Figure(value=min(value, most), source=data.source)


def _bytes_per_token(run: RunFile, vocab_size: float | None, stated: float | None) -> Figure:
    settings = run.corpus
    if stated is not None:
        return Figure(value=stated, source=f"{stated:g} bytes of text a token, stated")
    if settings.tokenizer is None:
        return text_bytes_per_token(vocab_size)
    from capgap.pipeline.models.bos import document_bos
    from capgap.pipeline.models.tokenizers import load_tokenizer

    try:
        tokenizer = load_tokenizer(settings.tokenizer)
    except CapgapError as error:
        return Figure(value=None, source=f"give --text-bytes-per-token, or the tokenizer: {error}")
    num_around = len(document_bos(tokenizer, settings.tokenizer, settings.bos)) + 1
    skips = settings.on_bad_record == "skip"
    named = [(source.paths, source.text_field or settings.text_field) for _, source in settings.named_sources]
    return bytes_per_token(tokenizer, named, settings.messages_field, num_around, skips)
