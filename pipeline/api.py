"""For notebooks and training loops of your own: a cache as torch tensors or as a WebDataset, and the student's loss.

    open_cache(folder or URL) --batches-----> Batch --DistillationLoss--> loss, and each token's KL and cross-entropy
                              --webdataset--> a pipeline of webdataset, one sequence a sample

No run file, stage or lease is needed. What a run file would refuse is refused here too.

Legend: B sequences of a batch, L targets of a sequence, N = B x L rows, K kept ids, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel
from webdataset import FluidWrapper, split_by_node, split_by_worker

from capgap.kernels.sparse_kl import SparseKl
from capgap.pipeline.cache_lines import describe
from capgap.pipeline.stage.manifests import finished_cache
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader, target_temperature_of
from capgap.pipeline.store.batch import TargetTemperature
from capgap.pipeline.store.samples import SampleShape
from capgap.pipeline.store.webdatasets import MemberDecoder, Splitter, webdataset_of
from capgap.pipeline.train.attention import require_ending_attention
from capgap.pipeline.train.caches import choose
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import objective_of, require_projected
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_train import TrainSettings


@dataclass(frozen=True, repr=False)
class Cache:
    """A finished cache, as `open_cache` returns it.

    Attributes:
        location: Folder or URL of the cache.
        manifest: The manifest of the cache: its shards, digests and versions, and what it was made from.
        facts: Tokenizer, context rule, recordings and temperatures of the cache.
    """

    location: Path | str
    manifest: Manifest
    facts: CacheFacts

    @property
    def vocab_size(self) -> int:
        """Number of ids in the real vocabulary of teacher and student, without padding."""
        return self.facts.tokenizer.vocab_size

    def batches(
        self,
        batch_sequences: int,
        *,
        recording: RecordingName | None = None,
        temperature: float | None = None,
        heldout: bool = False,
        seed: int = 0,
        num_epochs: int = 1,
        **options: Any,
    ) -> SequenceLoader:
        """Return a loader of the cache's sequences, shuffled, and resumable by `state_dict` and `load_state_dict`.

        Each `Batch` has `input_ids_BL` and `labels_BL` [B, L], int64, and the teacher's distribution after each of the
        N tokens: `ids_NK`, int64, `weights_NK`, float32 probabilities, and for `topk` also `tail_N`, the probability of
        all other ids.

        Args:
            batch_sequences: B, the number of sequences of a step over all ranks; `options` may give `rank` and
                `world_size`.
            recording: `topk` or `sampled`; needed where the cache has both.
            temperature: Temperature of the targets; by default the temperature at which the cache was captured.
            heldout: Whether to read the held-out sequences instead of the training sequences.
            seed: Seed of the order.
            num_epochs: Number of passes over the data.
            options: Further fields of `LoaderSettings`, for example `micro_batch`, `row_len`, `threads`.

        Raises:
            SettingError: The cache lacks the recording or the temperature, or has two recordings and none is named; or
                an option is out of bounds.
            InputError: There are fewer sequences than one step needs, or no held-out sequences.
            CorruptError: A shard is damaged; raised when it is read.
        """
        reader, target = self._chosen(recording, temperature, heldout)
        return SequenceLoader(
            reader,
            LoaderSettings(
                batch_sequences,
                seed,
                num_epochs=num_epochs,
                target_temperature=target,
                context=self.facts.context,
                **options,
            ),
        )

    def webdataset(
        self,
        *,
        recording: RecordingName | None = None,
        temperature: float | None = None,
        heldout: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        nodesplitter: Splitter | None = split_by_node,
        workersplitter: Splitter | None = split_by_worker,
    ) -> FluidWrapper:
        """Return the cache's sequences as a pipeline of webdataset, each sequence once an epoch.

            samples = cache.webdataset(shuffle=True).shuffle(1000)
            loader = wds.WebLoader(samples.batched(8, collation_fn=capgap.collate_samples), batch_size=None)

        A sample is a dictionary of numpy arrays, for L targets of K ids each (the samples, or the kept ids):

        | key | shape and dtype | holds |
        |---|---|---|
        | `__key__` | str | name of the member and number in it, for example `sampled-000000-0002-0001` |
        | `__url__` | str | path or URL of the shard |
        | `tokens` | [L + 1] int64 | the sequence |
        | `starts` | [L + 1] bool | where a document begins |
        | `mask` | [L + 1] bool | where a token counts as a label; position 0 is never one |
        | `positions` | [L] int64 | position of each token in its document; only under the context rule `document` |
        | `ids` | [L, K] int64 | target i belongs to the token at i + 1; padding has weight 0 |
        | `weights` | [L, K] float32 | probabilities of the ids, at the temperature asked for |
        | `tail` | [L] float32 | probability of all other ids; only of the recording `topk` |
        | `label_logprobs` | [L] float32 | the teacher's logprob of the real next token, as captured; nats |

        In a cache that `align` made, the last four are replaced by these:

        | key | shape and dtype | holds |
        |---|---|---|
        | `chunk_left` | [L] int64 | number of targets left in its chunk after each; -1 outside chunks to learn from |
        | `chunk_logprobs` | [L] float32 | the teacher's logprob of a chunk at its last target, 0 at others; nats |
        | `ids`, `weights`, `tail` | as above | projected targets, where `align` kept some; 0 at targets without one |

        WebDataset deals whole shards out to ranks and workers. Here members are dealt out, so any number of workers has
        work as long as there are members, and each member is read by exactly one worker of one rank. The numbers of
        sequences of two ranks may differ by those of one member. Where every rank must take equally many steps, use
        `batches`, or `.with_epoch`.

        Args:
            recording: `topk` or `sampled`; needed where the cache has both.
            temperature: Temperature of the targets; by default the temperature at which the cache was captured.
            heldout: Whether to read the held-out sequences instead of the training sequences.
            shuffle: Whether each worker reads its members in a new order each time it begins. The order follows from
                `seed` and, in a worker, from torch's seed. The sequences of a member stay together until
                `.shuffle(1000)` mixes them.
            seed: Seed of that order.
            nodesplitter: A splitter of webdataset among ranks; with None every rank reads everything.
            workersplitter: A splitter of webdataset among the workers of a loader; with None each reads everything.

        Raises:
            SettingError: The cache lacks the recording or the temperature, or has two recordings and none is named.
            InputError: There are no held-out sequences.
            CorruptError: On iteration, a member's bytes or structure are damaged, or its targets are of other tokens.
        """
        reader, target = self._chosen(recording, temperature, heldout)
        shape = SampleShape(reader.codec.num_ids, self.facts.context, target)
        return webdataset_of(
            reader, shape, shuffle=shuffle, seed=seed, nodesplitter=nodesplitter, workersplitter=workersplitter
        )

    def webdataset_decoder(
        self,
        *,
        recording: RecordingName | None = None,
        temperature: float | None = None,
        heldout: bool = False,
        whole_shards: bool = True,
    ) -> MemberDecoder:
        """Return a pipeline stage that decodes this cache's members into samples such as those of `webdataset`.

            wds.WebDataset(urls, shardshuffle=100).compose(cache.webdataset_decoder())

        It runs no code from the data, and checks each member's crc32 and zstd checksum, and that no member of a shard
        is missing. Put no `.decode` before it: WebDataset's own decoders unpickle what they find in a shard.

        Args:
            recording: `topk` or `sampled`; needed where the cache has both.
            temperature: Temperature of the targets; by default the temperature at which the cache was captured.
            heldout: Whether the members are those of the held-out sequences.
            whole_shards: Whether to raise CorruptError at the end of a stream in which a shard gave only some of its
                members. Set it to False where you drop members on purpose.

        Raises:
            SettingError: The cache lacks the recording or the temperature, or has two recordings and none is named.
            InputError: There are no held-out sequences; or, on iteration, a sample comes from another source.
            CorruptError: On iteration, a member's bytes or structure are damaged, or its targets are of other tokens.
        """
        reader, target = self._chosen(recording, temperature, heldout)
        return MemberDecoder(reader, SampleShape(reader.codec.num_ids, self.facts.context, target), whole_shards)

    def __repr__(self) -> str:
        """Return a few lines that say what the cache holds, which teacher made it, and where it lies."""
        return describe(self.location, self.manifest, self.facts)

    def _chosen(
        self, recording: RecordingName | None, temperature: float | None, heldout: bool
    ) -> tuple[ShardReader, TargetTemperature | None]:
        chosen, at = choose(self.facts, _settings(recording=recording, temperature=temperature))
        name = heldout_set(chosen) if heldout else chosen
        if name not in self.manifest.shard_sets:
            raise InputError(
                "the cache has no held-out sequences",
                where=self.location,
                fix="make one with cache.num_heldout_sequences above 0",
            )
        reader = ShardReader(self.location, self.manifest.shard_sets[name])
        # the loss raises chunk likelihoods to a power itself, so an aligned cache's targets have no other temperature
        if self.facts.aligned is not None:
            return reader, None
        return reader, target_temperature_of(reader.codec, self.facts.temperature, at)


def open_cache(location: Path | str) -> Cache:
    """Open a finished cache by its folder or URL.

    Raises:
        InputError: No finished cache is there.
        CorruptError: The manifest differs from what was written when the cache was finished.
        MachineError: The URL cannot be read.
    """
    place, manifest = finished_cache(location)
    return Cache(place, manifest, CacheFacts.model_validate(manifest.facts))


class DistillationLoss:
    """The loss `alpha T^2 KL + (1 - alpha) CE` of a batch, computed without all logits [N, V] in memory at once.

        loss = DistillationLoss(model, cache, alpha=0.9)
        loss(batch).loss.backward()

    The model's head is not called: a fused operation replaces it, after a short trial has shown that both agree. It
    works on any device, in float32, bfloat16 and under autocast. Parameters that have no effect on the logits are
    frozen.

    Args:
        model: A causal language model of transformers.
        cache: The cache whose batches the model learns from; it must have the model's tokenizer and vocabulary.
        alpha: Weight of the KL, for calls that give none.
        recording: The recording that was given to `Cache.batches`.
        temperature: Temperature at which teacher and student are compared; must be the one given to `Cache.batches`.
        divergence: Divergence that takes the place of the KL; see `train.divergence`.
        tail: Treatment of the teacher's probability outside the kept ids; see `train.tail`.
        jsd_beta: Weight of the teacher in the mixture of `jsd`; see `train.jsd_beta`.
        token_weights: Weighting of the tokens; see `train.token_weights`.
        projected_weight: Weight of an aligned cache's projected targets; see `train.projected_weight`.

    Raises:
        SettingError: A value is out of bounds, or the cache lacks the recording or the temperature.
        MismatchError: The recording does not support the divergence, or the model has fewer ids than the cache.
        InputError: The fused operation cannot replace the model's head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        alpha: float = 1.0,
        recording: RecordingName | None = None,
        temperature: float | None = None,
        divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
        tail: Literal["drop", "renorm", "ghost", "label"] | None = None,
        jsd_beta: float | None = None,
        token_weights: Literal["equal", "entropy"] = "equal",
        projected_weight: float = 0.0,
    ) -> None:
        settings = _settings(
            alpha=alpha,
            recording=recording,
            temperature=temperature,
            divergence=divergence,
            tail=tail,
            jsd_beta=jsd_beta,
            token_weights=token_weights,
            projected_weight=projected_weight,
        )
        # a batch may bring an alpha other than 0, so the objective is chosen and checked even where this alpha is 0
        weighed = settings.model_copy(update={"alpha": 1.0})
        chosen, at = choose(cache.facts, weighed)
        objective = objective_of(weighed, chosen, cache.location)
        if chosen == "chunks":
            require_projected(weighed, cache.facts.recordings[chosen].num_ids, cache.location)
        num_rows = model.get_input_embeddings().num_embeddings
        if num_rows < cache.vocab_size:
            raise MismatchError(
                "the model has fewer ids than the cache",
                where=model.name_or_path or model.config.model_type,
                found=num_rows,
                expected=f"at least {cache.vocab_size}",
                fix="take a model of the cache's tokenizer",
            )
        self._model, self._alpha, self._proven_row_len = model, alpha, 0
        self._module = DistillationModule(model, settings, 1, alpha, at, cache.vocab_size, objective)

    def __call__(self, batch: Batch, alpha: float | None = None) -> SparseKl:
        """Return the scalar `loss` to differentiate, and `kl_N` and `ce_N` [N], in nats, of the batch's N tokens.

        Args:
            batch: A batch of `Cache.batches`; it is moved to the model's device.
            alpha: Weight of the KL for this batch, for example from a schedule.

        Raises:
            SettingError: alpha is out of bounds.
            InputError: Rows hold several sequences or documents, and the model attends across them. A short trial of
                the model finds that out before the first such batch.
        """
        if alpha is not None and not 0 <= alpha <= 1:
            raise SettingError("cannot be used", where="alpha", found=repr(alpha), expected="a number from 0 to 1")
        # train() is not called, because it would change parts of the model that are kept in another mode
        self._module.training = self._model.training
        if batch.positions_BL is not None and batch.positions_BL.shape[1] > self._proven_row_len:
            require_ending_attention(self._model, batch.positions_BL.shape[1])
            self._proven_row_len = batch.positions_BL.shape[1]
        return self._module.loss(batch.to(self._model.device), self._alpha if alpha is None else alpha)


def _settings(**given: Any) -> TrainSettings:
    try:
        return TrainSettings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or None
        raise SettingError(
            first["msg"].removeprefix("Value error, "), where=where, found=repr(first["input"]) if where else None
        ) from None
