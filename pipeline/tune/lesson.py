"""What a model is tuned on, and in which tokens: conversations of files, or a chat teacher's cache."""

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
    """A tokenizer with its chat template, and where the conversations are.

    Attributes:
        format: the tokenizer, seen to have a template that can be learnt from.
        template: its name.
        facts: of the tokenizer as it is now.
        old_size: of its vocabulary before marks of roles were added.
        cache: a chat teacher's; None where conversations are read from files.
    """

    format: ChatFormat
    template: str
    facts: TokenizerFacts
    old_size: int
    cache: ChatCache | None

    def task_arguments(self, context: StageContext, settings: TuneSettings) -> tuple[dict[str, Any], ChatRows]:
        """What of a training's task is learnt from, and the shards that were made for it; every rank calls it.

        Raises:
            InputError: as `chat_rows`.
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
            # a row of one conversation is seen whole: padding comes behind it
            "context": "document" if settings.packing else "packed",
        }, ChatRows(shard_sets=rows.shard_sets, totals=row_facts(rows))


def lesson_of(settings: TuneSettings, path: str, cache_input: StageInput | None) -> Lesson:
    """What the settings ask for, for the model at `path`.

    Raises:
        InputError: the chat template cannot be learnt from, or rows are longer than the model takes.
        MismatchError, SettingError: the cache is of another tokenizer, or has not what the loss needs.
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
