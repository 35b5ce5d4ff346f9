"""For notebooks and training loops of one's own: a cache as torch tensors or as a WebDataset, and the student's loss.

    open_cache(folder or URL) --batches-----> Batch --DistillationLoss--> loss, and each token's KL and cross-entropy
                              --webdataset--> a pipeline of webdataset, one sequence a sample

Nothing of the workflow is needed: no run file, no stage, no lease. What a run file would refuse is refused here too.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids kept, V vocabulary.
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
    """A finished cache; made by `open_cache`.

    Attributes:
        location: its folder or URL.
        manifest: what stands in it: shards, digests, versions, what it was made from.
        facts: tokenizer, context rule, recordings, temperatures.
    """

    location: Path | str
    manifest: Manifest
    facts: CacheFacts

    @property
    def vocab_size(self) -> int:
        """The real vocabulary of teacher and student."""
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
        """The loader of its sequences, shuffled, and resumable by `state_dict` and `load_state_dict`.

        Each `Batch` has `input_ids_BL` and `labels_BL` [B, L], int64, and the teacher's distribution after each of the
        N tokens: `ids_NK` int64, `weights_NK` probabilities, float32, and for `topk` `tail_N`, the rest.

        Args:
            batch_sequences: B; over all ranks, where `rank` and `world_size` are among the options.
            recording: `topk` or `sampled`; needed where the cache has both.
            temperature: of the targets; the capture's where it is left out.
            heldout: the held-out sequences in place of those to train on.
            seed: of the order.
            num_epochs: passes over the data.
            options: of `LoaderSettings`, for example `micro_batch`, `row_len`, `threads`.

        Raises:
            SettingError: the cache lacks the recording or the temperature, or has two recordings and none is named; an
                option is out of bounds.
            InputError: there are fewer sequences than a step, or no held-out ones.
            CorruptError: a shard that is read is damaged.
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
        """Its sequences as a pipeline of webdataset, each once an epoch, for `wds.WebLoader` and beside other sources.

            samples = cache.webdataset(shuffle=True).shuffle(1000)
            loader = wds.WebLoader(samples.batched(8, collation_fn=capgap.collate_samples), batch_size=None)

        A sample is a dictionary of numpy arrays, for L targets and K ids, the samples or the kept ids a token:

        | key | shape and dtype | holds |
        |---|---|---|
        | `__key__` | str | member of the shard and number in it, `sampled-000000-0002-0001` |
        | `__url__` | str | path or URL of the shard |
        | `tokens` | [L + 1] int64 | the sequence |
        | `starts` | [L + 1] bool | where a document begins |
        | `mask` | [L + 1] bool | where a token counts as a label; position 0 is never one |
        | `positions` | [L] int64 | of each token in its document; only in a cache of the context rule `document` |
        | `ids` | [L, K] int64 | target i belongs to the token at i + 1; padding has weight 0 |
        | `weights` | [L, K] float32 | probabilities of the ids, at the temperature asked for |
        | `tail` | [L] float32 | probability of all other ids; only of the recording `topk` |
        | `label_logprobs` | [L] float32 | logprob of the real next token under the teacher, as captured; nats |

        Of a cache that `align` made, the last four give way to these:

        | key | shape and dtype | holds |
        |---|---|---|
        | `chunk_left` | [L] int64 | targets of its chunk that come after each; -1 in no chunk to learn from |
        | `chunk_logprobs` | [L] float32 | the teacher's logprob of a chunk at its last target, 0 at others; nats |
        | `ids`, `weights`, `tail` | as above | projected targets, where `align` kept some; 0 at targets without one |

        WebDataset deals whole shards out to ranks and workers. Here members are dealt out, so any number of workers has
        work as long as there are members, and a member is read by exactly one worker of one rank. Ranks may differ by
        a member's sequences; where every rank must take equally many steps, use `batches`, or `.with_epoch`.

        Args:
            recording: as for `batches`; `temperature` and `heldout` likewise.
            temperature: see `recording`.
            heldout: see `recording`.
            shuffle: the members of each worker in another order each time it begins, which follows from `seed` and, in
                a worker, from torch's seed. Sequences of a member stay together; `.shuffle(1000)` parts them.
            seed: see `shuffle`.
            nodesplitter: of webdataset's kind; None gives every rank everything.
            workersplitter: likewise for the workers of a loader.

        Raises:
            SettingError, InputError: as `batches`.
            CorruptError: on iteration, a member is damaged: bytes, structure, or targets of other tokens.
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
        """A stage that decodes this cache's members in a pipeline of yours; samples are those of `webdataset`.

            wds.WebDataset(urls, shardshuffle=100).compose(cache.webdataset_decoder())

        It runs no code from data, and checks each member's crc32 and checksum, and that none of a shard is missing. Do
        not put `.decode` before it: WebDataset's own decoders unpickle what they find in a shard.

        Args:
            recording: as for `webdataset`; `temperature` and `heldout` likewise.
            temperature: see `recording`.
            heldout: see `recording`.
            whole_shards: raise CorruptError at the end of a stream in which a shard gave only some of its members;
                set it to False where you drop members on purpose.

        Raises:
            SettingError, InputError: as `batches`; on iteration, InputError for a sample of another source.
            CorruptError: on iteration, as `webdataset`.
        """
        reader, target = self._chosen(recording, temperature, heldout)
        return MemberDecoder(reader, SampleShape(reader.codec.num_ids, self.facts.context, target), whole_shards)

    def __repr__(self) -> str:
        """What it holds, of what teacher, and where."""
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
        if self.facts.aligned is not None:  # likelihoods of chunks are raised in the loss, whatever the temperature
            return reader, None
        return reader, target_temperature_of(reader.codec, self.facts.temperature, at)


def open_cache(location: Path | str) -> Cache:
    """A finished cache, by its folder or URL.

    Raises:
        InputError: there is none.
        CorruptError: its manifest is not what was written.
        MachineError: the URL cannot be read.
    """
    place, manifest = finished_cache(location)
    return Cache(place, manifest, CacheFacts.model_validate(manifest.facts))


class DistillationLoss:
    """`alpha T^2 KL + (1 - alpha) CE` of a model's batch, without the logits [N, V] in memory at once.

        loss = DistillationLoss(model, cache, alpha=0.9)
        loss(batch).loss.backward()

    The model's head is not called: the fused operation stands for it, once a short trial has shown that it may. Works
    on any device, in float32, bfloat16 and under autocast. Parameters that have no part in the logits are frozen.

    Args:
        model: a causal language model of transformers.
        cache: whose batches it is to learn from; tokenizer and vocabulary must be the model's.
        alpha: weight of the KL, where a call gives no other.
        recording: as for `Cache.batches`, whose `temperature` this one must be too.
        temperature: at which teacher and student are compared.
        divergence: what is called KL here; see `train.divergence`.
        tail: what becomes of the teacher's probability outside the kept ids; see `train.tail`.
        jsd_beta: of `jsd`.
        token_weights: what a token counts; see `train.token_weights`.
        projected_weight: of an aligned cache's projected targets; see `train.projected_weight`.

    Raises:
        SettingError: a value is out of bounds, or the cache lacks the recording or the temperature.
        MismatchError: the recording does not support the divergence, or the model has fewer ids than the cache.
        InputError: the model's head cannot be served.
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
        # a batch may bring another alpha than 0, so what alpha weighs is chosen and checked whatever this one is
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
        """`loss`, a scalar to differentiate, and `kl_N` and `ce_N`, nats, of each of the batch's N tokens.

        Args:
            batch: of `Cache.batches`; it is moved to the model's device.
            alpha: for this batch, where it has a schedule of yours.

        Raises:
            SettingError: alpha is out of bounds.
            InputError: rows hold several sequences or documents, and the model would look across them; the first such
                batch is preceded by a short trial of it.
        """
        if alpha is not None and not 0 <= alpha <= 1:
            raise SettingError("cannot be used", where="alpha", found=repr(alpha), expected="a number from 0 to 1")
        # not by train(), which would set parts of the model that are kept in another mode
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
