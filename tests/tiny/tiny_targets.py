"""Targets as a teacher's logits give them."""

from __future__ import annotations

import numpy as np
import torch

from capgap.kernels.sampling import sampled_rows, topk_rows
from capgap.pipeline.store.codec import SAMPLED, Codec
from capgap.schemas.records import SampledTargets, Targets, TopkTargets


def targets_of(codec: Codec, logits_NV: torch.Tensor, labels_BL: torch.Tensor, seed: int) -> Targets:
    """What a codec of samples or of top-k tokens keeps of a teacher's logits; the seed is that of the samples.

    A codec of unknown labels knows no label that is not kept.
    """
    shape, labels_N = tuple(labels_BL.shape), labels_BL.flatten()
    if codec.name != SAMPLED:
        kept = topk_rows(logits_NV, labels_N, codec.num_ids, codec.temperature, powers=codec.powers)
        label_logprobs_N = kept.label_logprobs_N
        if codec.unknown_labels:
            is_kept_N = (kept.ids_NK == labels_N[:, None]).any(dim=1)
            label_logprobs_N = label_logprobs_N.where(is_kept_N, float("nan"))
        return TopkTargets(
            kept.ids_NK.view(*shape, codec.num_ids).numpy(),
            kept.logprobs_NK.view(*shape, codec.num_ids).numpy(),
            kept.tail_N.view(shape).numpy(),
            label_logprobs_N.view(shape).numpy(),
            kept.log_tails_NT.view(*shape, len(codec.powers)).numpy(),
        )
    offsets_N = torch.rand(len(labels_N), generator=torch.Generator().manual_seed(seed))
    sampled = sampled_rows(logits_NV, labels_N, offsets_N, codec.num_ids)
    rows = [np.unique(samples_n, return_counts=True) for samples_n in sampled.samples_Nn.numpy()]
    return SampledTargets(
        np.array([len(ids) for ids, _ in rows], np.int32).reshape(shape),
        np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        np.concatenate([counts for _, counts in rows]).astype(np.int32),
        sampled.label_logprobs_N.view(shape).numpy(),
    )
