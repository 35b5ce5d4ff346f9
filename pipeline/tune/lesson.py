"""Chooses the tokenizer, the chat template and the conversations (from files or a chat teacher's cache) of a tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capgap.pipeline.corpus.conversations import ChatFormat
from capgap.pipeline.models.configs import load_config, max_positions
from capgap.pipeline.models.tokenizers import load_tokenizer, tokenizer_facts
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.pipeline.store import ShardReader
from capgap.pipeline.tune.chat_cache import ChatCache, chat_cache
from capgap.pipeline.tune.data import ChatRows, chat_rows, row_facts
from capgap.pipeline.tune.template import with_template
from capgap.schemas.errors import InputError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.run_tune import TuneSettings


@dataclass(frozen=True)
class Lesson:
    """A tokenizer with its chat template, and the source of the conversations.

    Attributes:
        format: The tokenizer with its chat template, after a check that answers can be learnt with it.
        template: The name of the template, for errors and the model card.
        facts: The facts about the tokenizer, with role marks if they were added.
        old_size: Size of the vocabulary before role marks were added.
        cache: The cache of a chat teacher; None where conversations are read from files.
    """

    format: ChatFormat
    template: str
    facts: TokenizerFacts
    old_size: int
    cache: ChatCache | None

    def task_arguments(self, context: StageContext, settings: TuneSettings) -> tuple[dict[str, Any], ChatRows]:
        """Return the arguments of `TrainingTask` that name the data, and the shards that were made; all ranks call it.

        Raises:
            InputError: Conversations cannot be read, or none is left to learn from or to measure.
        """
        if self.cache is not None:
            source, chosen = self.cache.chosen.source(), self.cache.chosen
            return {
                "training": source.reader,
                "heldout": self.cache.heldout,
                "heldout_targets": self.cache.heldout,
                "alpha": settings.loss_settings().alpha,
                "temperature": chosen.temperature,
                "target_temperature": source.target_temperature,
                "objective": self.cache.objective,
                "context": source.context,
            }, ChatRows(shard_sets={}, totals={"num_train_rows": chosen.shards.num_sequences})
        rows = chat_rows(context, self.format, self.facts)
        return {
            "training": ShardReader(context.folder, rows.shard_sets["train"]),
            "heldout": ShardReader(context.folder, rows.shard_sets["heldout"]),
            "alpha": 0.0,
            "temperature": 1.0,
            # Without packing, each row is one conversation followed by padding, so attention need not end within it.
            "context": "document" if settings.packing else "packed",
        }, ChatRows(shard_sets=rows.shard_sets, totals=row_facts(rows))


def lesson_of(settings: TuneSettings, path: str, cache_input: StageInput | None) -> Lesson:
    """Return the lesson that the settings ask for.

    Args:
        settings: The settings of the tune stage.
        path: Folder or id of the model that is tuned.
        cache_input: The cache of a chat teacher, or None.

    Raises:
        InputError: Answers cannot be learnt with the chat template, or rows are longer than the model takes.
        MismatchError, SettingError: The cache has another tokenizer, or lacks what the loss needs.
    """
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    old_size = tokenizer_facts(tokenizer).vocab_size
    cache = None if cache_input is None else chat_cache(settings, cache_input)
    if cache is None:
        tokenizer, name = with_template(tokenizer, settings.chat_template)
    else:
        tokenizer, name = cache.with_template(tokenizer, path), "the chat teacher's chat template"
    longest = settings.max_len if cache is None else cache.chosen.shards.seq_len
    most = max_positions(load_config(path, settings.trust_remote_code))
    if most is not None and longest > most:
        raise InputError(
            "the rows are longer than the model takes",
            where=f"tune.{'max_len' if cache is None else 'cache'}, for {path}",
            found=longest,
            expected=f"at most {most}, its positions",
            fix="lower tune.max_len" if cache is None else "make the cache of a corpus with a smaller seq_len",
        )
    return Lesson(ChatFormat(tokenizer, name), name, tokenizer_facts(tokenizer), old_size, cache)
