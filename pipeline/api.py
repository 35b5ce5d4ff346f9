"""For notebooks and training loops of one's own: a cache as torch tensors, and the student's loss.

    open_cache(folder or URL) --batches--> Batch --DistillationLoss--> loss, and each token's KL and cross-entropy

Nothing of the workflow is needed: no run file, no stage, no lease. What a run file would refuse is refused here too.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids kept, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import SparseKl
from capgap.pipeline.stage.manifests import read_manifest, require_seal
from capgap.pipeline.store import Batch, LoaderSettings, SequenceLoader, ShardReader, is_url, target_temperature_of
from capgap.pipeline.train.caches import choose
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import objective_of
from capgap.schemas.errors import InputError, MismatchError, SettingError
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_train import TrainSettings


@dataclass(frozen=True)
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
            SettingError: the cache lacks the recording or the temperature, or has two recordings and none is named.
            InputError: there are fewer sequences than a step, or no held-out ones.
            CorruptError: a shard that is read is damaged.
        """
        chosen, at = choose(self.facts, _settings(recording=recording, temperature=temperature))
        name = heldout_set(chosen) if heldout else chosen
        if name not in self.manifest.shard_sets:
            raise InputError(
                "the cache has no held-out sequences",
                where=self.location,
                fix="make one with cache.num_heldout_sequences above 0",
            )
        reader = ShardReader(self.location, self.manifest.shard_sets[name])
        target = target_temperature_of(reader.codec, self.facts.temperature, at)
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


def open_cache(location: Path | str) -> Cache:
    """A finished cache, by its folder or URL.

    Raises:
        InputError: there is none.
        CorruptError: its manifest is not what was written.
        MachineError: the URL cannot be read.
    """
    at = location.rstrip("/") if isinstance(location, str) and is_url(location) else Path(location)
    manifest = read_manifest(at)
    if manifest is None or manifest.stage != "cache":
        raise InputError(
            "no finished cache",
            where=at,
            found="no manifest" if manifest is None else f"a finished {manifest.stage}",
            expected="the folder of a cache stage, for example runs/mine/cache",
        )
    require_seal(at, manifest)
    return Cache(at, manifest, CacheFacts.model_validate(manifest.facts))


class DistillationLoss:
    """`alpha T^2 KL + (1 - alpha) CE` of a model's batch, without the logits [N, V] in memory at once.

        loss = DistillationLoss(model, cache, alpha=0.9)
        loss(batch).loss.backward()

    The model's head is not called: the fused operation stands for it, once a short trial has shown that it may. Works
    on any device, in float32, bfloat16 and under autocast. Parameters that have no part in the logits are frozen.

    Args:
        model: a causal language model of transformers.
        cache: whose batches it is to learn from; tokenizer and vocabulary must be the model's.
        alpha: weight of the KL.
        recording: as for `Cache.batches`, whose `temperature` this one must be too.
        temperature: at which teacher and student are compared.
        divergence: what is called KL here; see `train.divergence`.
        tail: what becomes of the teacher's probability outside the kept ids; see `train.tail`.
        jsd_beta: of `jsd`.
        token_weights: what a token counts; see `train.token_weights`.

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
    ) -> None:
        settings = _settings(
            alpha=alpha,
            recording=recording,
            temperature=temperature,
            divergence=divergence,
            tail=tail,
            jsd_beta=jsd_beta,
            token_weights=token_weights,
        )
        chosen, at = choose(cache.facts, settings)
        objective = objective_of(settings, chosen, cache.location)
        num_rows = model.get_input_embeddings().num_embeddings
        if num_rows < cache.vocab_size:
            raise MismatchError(
                "the model has fewer ids than the cache",
                where=model.name_or_path or model.config.model_type,
                found=num_rows,
                expected=f"at least {cache.vocab_size}",
                fix="take a model of the cache's tokenizer",
            )
        self._model, self._alpha = model, alpha
        self._module = DistillationModule(model, settings, 1, alpha, at, cache.vocab_size, objective)

    def __call__(self, batch: Batch, alpha: float | None = None) -> SparseKl:
        """`loss`, a scalar to differentiate, and `kl_N` and `ce_N`, nats, of each of the batch's N tokens.

        Args:
            batch: of `Cache.batches`; it is moved to the model's device.
            alpha: for this batch, where it has a schedule of yours.

        Raises:
            InputError: rows hold several documents, and the model would look across them.
        """
        self._module.train(self._model.training)
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
