"""A chat teacher's cache as what a model is tuned on: its distributions after each token of whole conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.checks import corpus_tokenizer
from capgap.pipeline.models.tokenizers import require_same_tokenizer
from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.pipeline.train.caches import ChosenCache, choose
from capgap.pipeline.train.objective import Objective, objective_of
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.run_tune import TuneSettings


@dataclass(frozen=True)
class ChatCache:
    """A cache of conversations.

    Attributes:
        chosen: its recording, at the temperature.
        corpus: that it was made of.
        objective: of the training.
        heldout_targets: its held-out conversations; None where it has none.
    """

    chosen: ChosenCache
    corpus: StageInput
    objective: Objective
    heldout_targets: ShardReader | None

    @property
    def heldout(self) -> ShardReader:
        """The corpus's held-out conversations."""
        return ShardReader(self.corpus.path, self.corpus.manifest.shard_sets["heldout"])

    def with_template(self, tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
        """The tokenizer of the model with the chat template of the conversations, in place.

        Raises:
            MismatchError: it is another tokenizer than that of the conversations.
        """
        theirs = corpus_tokenizer(self.corpus)
        require_same_tokenizer(theirs, "the chat teacher's cache", tokenizer, where)
        tokenizer.chat_template = theirs.chat_template
        return tokenizer


def chat_cache(settings: TuneSettings, cache: StageInput) -> ChatCache:
    """The cache that the settings name.

    Raises:
        InputError: it is not of whole conversations, or its corpus is gone.
        SettingError, MismatchError: it has not what the loss needs.
    """
    facts, loss = CacheFacts.model_validate(cache.manifest.facts), settings.loss_settings()
    recording, temperature = choose(facts, loss, "tune")
    shards = cache.manifest.shard_sets[recording]
    chosen = ChosenCache("tune.cache", cache.location, facts, recording, temperature, shards, 1.0)
    corpus, objective = _corpus_of(cache), objective_of(loss, recording, cache.location)
    heldout = cache.manifest.shard_sets.get(heldout_set(recording)) if chosen.has_targets else None
    return ChatCache(chosen, corpus, objective, None if heldout is None else ShardReader(cache.location, heldout))


def _corpus_of(cache: StageInput) -> StageInput:
    entry = cache.manifest.inputs["corpus"]
    manifest = read_manifest(Path(entry.path))
    if manifest is None or manifest.identity != entry.identity:
        raise InputError(
            "the corpus that the cache was made of is not there, whose tokenizer has the chat template",
            where=f"tune.cache: {cache.location}",
            found="no finished stage" if manifest is None else f"corpus {manifest.identity[:12]}",
            expected=f"corpus {entry.identity[:12]} at {entry.path}",
        )
    if not manifest.settings["corpus"].get("whole_conversations"):  # type: ignore[union-attr]
        raise InputError(
            "the cache is not of whole conversations",
            where=f"tune.cache: {cache.location}",
            found="a corpus that may cut answers",
            expected="one of corpus.messages_field with corpus.whole_conversations",
            fix="make corpus and cache again with whole_conversations: true",
        )
    return StageInput(Path(entry.path), manifest)
