"""A chat teacher's cache to tune a model on: its distributions after each token of whole conversations."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from capgap.pipeline.models.text import RunText
from capgap.pipeline.models.tokenizers import require_same_tokenizer
from capgap.pipeline.stage.context import StageInput
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
        chosen: The cache with the recording and the temperature to train with.
        text: The conversations, and the tokenizer with their chat template.
        objective: The loss of the training.
        heldout: The held-out conversations.
    """

    chosen: ChosenCache
    text: RunText
    objective: Objective
    heldout: ShardReader

    def with_template(self, tokenizer: PreTrainedTokenizerBase, where: str) -> PreTrainedTokenizerBase:
        """Give the model's tokenizer, in place, the chat template of the conversations, and return it.

        Raises:
            MismatchError: The model's tokenizer is not that of the conversations.
        """
        theirs = self.text.tokenizer()
        require_same_tokenizer(theirs, "the chat teacher's cache", tokenizer, where)
        tokenizer.chat_template = theirs.chat_template
        return tokenizer


def chat_cache(settings: TuneSettings, cache: StageInput) -> ChatCache:
    """Open the cache that the settings name.

    Raises:
        InputError: The cache does not hold whole conversations, or none of them is held out.
        SettingError, MismatchError: The cache lacks what the loss needs.
    """
    facts, loss = CacheFacts.model_validate(cache.manifest.facts), settings.loss_settings()
    recording, temperature = choose(facts, loss, "tune")
    shards = cache.manifest.shard_sets[recording]
    chosen = ChosenCache("tune.cache", cache.location, facts, recording, temperature, shards, 1.0)
    if not facts.whole_conversations:
        raise InputError(
            "the cache is not of whole conversations",
            where=f"tune.cache: {cache.location}",
            found="a corpus that may cut answers",
            expected="a corpus made with corpus.messages_field and corpus.whole_conversations",
            fix="make corpus and cache again with whole_conversations: true",
        )
    heldout = cache.manifest.shard_sets.get(heldout_set(recording))
    if heldout is None:
        raise InputError(
            "the cache holds no held-out conversations",
            where=f"tune.cache: {cache.location}",
            found="cache.num_heldout_sequences was 0",
            expected="more than 0",
            fix="make the cache again with held-out sequences",
        )
    objective = objective_of(loss, recording, cache.location)
    return ChatCache(chosen, RunText(cache), objective, ShardReader(cache.location, heldout))
