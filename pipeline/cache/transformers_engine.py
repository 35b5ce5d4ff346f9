"""The reference engine: the teacher in transformers, one plain forward pass over whole sequences.

Legend: B sequences, L targets, N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import transformers

from capgap.pipeline.cache.request_checks import require_kept, require_scorable
from capgap.pipeline.cache.scoring import PackedRows, Recording, Request, Scored, record_rows, row_offsets, unpack
from capgap.pipeline.models.head_product import head_logits
from capgap.pipeline.models.load import load_model
from capgap.pipeline.stage.progress import advance_within
from capgap.schemas.errors import InputError

# Both computations start from the same hidden states. 2 % of the largest logit is ten times the rounding of bfloat16.
_HEAD_TOLERANCE = 0.02
_PROBE_TOKENS = 8

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersEngine:
    """An engine that scores requests with transformers, in batches of about `batch_tokens` tokens.

    Args:
        path: the teacher's folder or id.
        recording: what to keep of each row of logits.
        dtype: `auto` or a float type of the teacher's weights.
        batch_tokens: approximate number of tokens in one forward pass.
        device: `cpu` or `cuda:0`.
        trust_remote_code: whether to run code that comes with the teacher.

    Raises:
        InputError: the model does not exist, or its logits are not the head's product with the last hidden states.
        SettingError: `recording.top_k` is larger than the vocabulary.
    """

    def __init__(
        self,
        path: str,
        recording: Recording,
        dtype: str,
        batch_tokens: int,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        require_kept(recording.top_k, recording.vocab_size)
        self._recording, self._batch_tokens, self._device = recording, batch_tokens, device
        self._model = load_model(path, device, _DTYPES.get(dtype), trust_remote_code)
        self.name = f"transformers {transformers.__version__}"
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._head = self._model.get_output_embeddings()
        config = self._model.config.get_text_config()
        self._scale = _logit_scale(config)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._max_targets = getattr(config, "max_position_embeddings", None)
        self._require_own_head(path)

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Score all requests and return the results in the order of the requests.

        Raises:
            InputError: a request cannot be scored, or its rows are not finite.
        """
        require_scorable(requests, self._recording.vocab_size, self._max_targets)
        # sorted by falling length, so that the requests of a batch are about equally long and need little padding
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens_L1))
        scored: dict[int, Scored] = {}
        while order:
            size = max(1, self._batch_tokens // len(requests[order[0]].tokens_L1))
            batch, order = order[:size], order[size:]
            scored |= zip(batch, self._score_batch([requests[index] for index in batch]), strict=True)
            advance_within(sum(requests[index].share for index in batch))
        return [scored[index] for index in range(len(requests))]

    def close(self) -> None:
        """Drop the model, which frees the device's memory."""
        del self._model, self._head

    @torch.inference_mode()
    def _score_batch(self, requests: Sequence[Request]) -> list[Scored]:
        lengths = [len(r.tokens_L1) - 1 for r in requests]
        # attention is causal, so padding after a request changes none of its rows
        tokens_BL1 = torch.zeros((len(requests), max(lengths) + 1), dtype=torch.int64)
        for row_L1, request in zip(tokens_BL1, requests, strict=True):
            row_L1[: len(request.tokens_L1)] = torch.from_numpy(request.tokens_L1)
        tokens_BL1 = tokens_BL1.to(self._device)
        hidden_BLH = self._model.base_model(input_ids=tokens_BL1[:, :-1], use_cache=False).last_hidden_state
        real_BL = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        real_BL = real_BL.to(self._device)
        hidden_NH, labels_N = hidden_BLH[real_BL], tokens_BL1[:, 1:][real_BL]
        drawn = [row_offsets(self._recording, r.digest, 0, n) for r, n in zip(requests, lengths, strict=True)]
        offsets_N = None
        if drawn[0] is not None:
            offsets_N = torch.from_numpy(np.concatenate([d for d in drawn if d is not None])).to(self._device)
        parts = []
        for start in range(0, len(labels_N), self._recording.chunk_rows):
            rows = slice(start, start + self._recording.chunk_rows)
            logits_NV = self._logits(hidden_NH[rows])
            parts.append(
                record_rows(self._recording, logits_NV, labels_N[rows], None if offsets_N is None else offsets_N[rows])
            )
        return self._split(parts, requests, lengths)

    def _logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        logits_NV = head_logits(self._head, hidden_NH)
        if self._scale != 1:
            logits_NV = logits_NV * self._scale
        if self._softcap is not None:
            logits_NV = self._softcap * torch.tanh(logits_NV / self._softcap)
        return logits_NV

    @torch.inference_mode()
    def _require_own_head(self, path: str) -> None:
        """Compare the logits computed here with the model's own, as a model may change its logits in an unknown way."""
        tokens_BL = torch.arange(_PROBE_TOKENS, device=self._device)[None] % len(self._head.weight)
        own_NV = self._model(input_ids=tokens_BL, use_cache=False).logits[0].float()
        hidden_NH = self._model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state[0]
        apart, largest = float((self._logits(hidden_NH) - own_NV).abs().max()), float(own_NV.abs().max())
        if apart > _HEAD_TOLERANCE * largest:
            raise InputError(
                "the teacher's logits are not its head's product with the last hidden states",
                where=path,
                found=f"logits {apart:.3g} apart",
                expected=f"at most {_HEAD_TOLERANCE * largest:.3g}",
                fix="set cache.engine to vllm",
            )

    def _split(self, parts: list[PackedRows], requests: Sequence[Request], lengths: list[int]) -> list[Scored]:
        ids_NC = torch.cat([part.ids_NC for part in parts]).cpu().numpy()
        numbers_NW = torch.cat([part.numbers_NW for part in parts]).cpu().numpy()
        rows = [slice(*bounds) for bounds in pairwise(accumulate(lengths, initial=0))]
        return [
            unpack(self._recording, ids_NC[r], numbers_NW[r], request.name)
            for r, request in zip(rows, requests, strict=True)
        ]


def _logit_scale(config: Any) -> float:
    """Return the factor on the head's product that the configurations of Cohere, Falcon-H1 and Granite give."""
    factors = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    return float(factors[0] * factors[1] / (getattr(config, "logits_scaling", None) or 1.0))
