"""The sequences of a cache as dictionaries of numpy arrays, the samples of a WebDataset pipeline.

    block of a member --samples_of--> one dictionary a sequence --collate_samples--> Batch

Each array has the same shape for every sequence of a cache, so that any collation can stack it. The arrays are numpy
arrays because torch tensors take a file descriptor each when they pass between processes.

Legend: B sequences, L targets a sequence, K ids a row, N = B x L rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capgap.pipeline.store.batch import IGNORED_LABEL, Batch, TargetTemperature, collate
from capgap.schemas.records import ChunkTargets, Sequences, Targets
from capgap.schemas.run_corpus import ContextRule

DictSample = dict[str, Any]
"""One sequence; `Cache.webdataset` lists its keys, shapes and dtypes."""


@dataclass(frozen=True)
class SampleShape:
    """The properties that all samples of a cache share, and the conversion of blocks to samples.

    Attributes:
        num_ids: K, the number of samples (`sampled`) or of kept ids (`topk`) of a row.
        context: Context rule under which the teacher scored.
        target_temperature: The extra temperature of the targets; None for the capture temperature.
    """

    num_ids: int
    context: ContextRule = "packed"
    target_temperature: TargetTemperature | None = None

    def samples_of(self, sequences: Sequences, targets: Targets | None, key: str, url: str) -> Iterator[DictSample]:
        """Yield the sequences of one member as samples, in the order of the member.

        Args:
            sequences: Sequences of the member.
            targets: Targets of the member.
            key: Key of the member; a sample's key is this key and the number of its sequence in the member.
            url: URL or path of the shard.
        """
        for row in range(len(sequences)):
            # made with the loader's own function, so that samples and batches agree in every bit
            batch = collate([(sequences, targets, row)], self.num_ids, self.target_temperature, self.context)
            sample: DictSample = {
                "__key__": f"{key}-{row:04d}",
                "__url__": url,
                "tokens": sequences.tokens_BL1[row].astype(np.int64),
                "starts": sequences.starts_BL1[row].copy(),
                "mask": sequences.mask_BL1[row].copy(),
            }
            if batch.positions_BL is not None:
                sample["positions"] = batch.positions_BL[0].numpy()
            if batch.chunk_left_N is not None and batch.chunk_logprobs_N is not None:
                sample["chunk_left"] = batch.chunk_left_N.numpy()
                sample["chunk_logprobs"] = batch.chunk_logprobs_N.numpy()
            if batch.ids_NK is not None and batch.weights_NK is not None:
                sample["ids"] = _widened(batch.ids_NK.numpy(), self.num_ids)
                sample["weights"] = _widened(batch.weights_NK.numpy(), self.num_ids)
            if targets is not None and not isinstance(targets, ChunkTargets):
                sample["label_logprobs"] = targets.label_logprobs_BL[row].copy()
            if batch.tail_N is not None:
                sample["tail"] = batch.tail_N.numpy()
            yield sample


def collate_samples(samples: Sequence[DictSample]) -> Batch:
    """Collate samples into a `Batch`, which equals the batch that the cache's own loader makes of these sequences.

    Use it in WebDataset's `batched(8, collation_fn=collate_samples)` or as `collate_fn` of a DataLoader.

    Args:
        samples: Samples of one cache, as `Cache.webdataset` yields them.
    """
    tokens_BL1, mask_BL1 = (np.stack([sample[name] for sample in samples]) for name in ("tokens", "mask"))
    labels_BL = np.where(mask_BL1[:, 1:], tokens_BL1[:, 1:], IGNORED_LABEL)
    batch = Batch(torch.from_numpy(tokens_BL1[:, :-1].copy()), torch.from_numpy(labels_BL))
    batch.num_counted = int(mask_BL1[:, 1:].sum())
    if "positions" in samples[0]:
        batch.positions_BL = torch.from_numpy(np.stack([sample["positions"] for sample in samples]))
    if "ids" in samples[0]:
        ids_NK, weights_NK = (np.concatenate([sample[name] for sample in samples]) for name in ("ids", "weights"))
        # the loader makes rows as wide as the widest one, except that rows of top-k tokens are always K wide
        is_fixed = "tail" in samples[0] and "chunk_left" not in samples[0]
        width = ids_NK.shape[1] if is_fixed else max(1, int((weights_NK > 0).sum(axis=1).max()))
        batch.ids_NK, batch.weights_NK = (
            torch.from_numpy(np.ascontiguousarray(values[:, :width])) for values in (ids_NK, weights_NK)
        )
    for key, name in (("tail", "tail_N"), ("chunk_left", "chunk_left_N"), ("chunk_logprobs", "chunk_logprobs_N")):
        if key in samples[0]:
            setattr(batch, name, torch.from_numpy(np.concatenate([sample[key] for sample in samples])))
    return batch


def _widened(values_NK: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Return the rows, padded with zeros at the end to `width` columns."""
    return np.pad(values_NK, ((0, 0), (0, width - values_NK.shape[1])))
