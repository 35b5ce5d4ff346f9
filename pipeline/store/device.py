"""Decoding on the device that trains: the host only inflates members, and torch operations do the rest.

    member --pread, crc32, inflate, structure--> StoredBlock --gather--> StoredBatch --one copy--> device --> Batch

The device checks the same values that decoding on the host checks: ids, codes and escapes, and the alignment of targets
with their tokens. The result, the number of the first faulty micro-batch, stays on the device until `first_fault` is
called.

Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row.
"""

from __future__ import annotations

import torch

from capgap.pipeline.store.alignment import COUNT_TOLERANCE, LOGPROB_TOLERANCE_NATS
from capgap.pipeline.store.batch import IGNORED_LABEL, Batch, TargetTemperature, positions_in_documents
from capgap.pipeline.store.codec import Codec
from capgap.pipeline.store.device_targets import DecodedSamples, DecodedTopk, Tables, joined, sampled_rows, topk_rows
from capgap.pipeline.store.layout import CHUNKS, SAMPLED, SEQUENCES
from capgap.pipeline.store.stored_batch import StoredBatch
from capgap.schemas.errors import InputError

_NONE = torch.iinfo(torch.int64).max


class DeviceDecoder:
    """Decodes stored columns into batches on one device.

    If the stored columns hold the starts of documents, the batches have positions that restart at each document.

    Args:
        codec: Codec of the members.
        device: Device that decodes.
        temperature: The extra temperature of the targets; None for the capture temperature.
    """

    def __init__(self, codec: Codec, device: torch.device | str, temperature: TargetTemperature | None = None) -> None:
        if codec.name == CHUNKS:
            raise InputError(
                "a device does not decode chunks",
                found=codec.name,
                expected="a recording of tokens",
                fix="decode on the host: leave out train.decode or decode_on",
            )
        self._codec, self.device, self._temperature = codec, torch.device(device), temperature
        self._tables = Tables.of(codec, self.device)
        self._first_fault = torch.full((), _NONE, dtype=torch.int64, device=self.device)

    def decode(self, stored: StoredBatch, number: int) -> Batch:
        """Decode one batch; `number` is the number under which `first_fault` reports it."""
        faults: list[torch.Tensor] = []
        stored = stored.to(self.device)
        tokens_BL1 = self._tables.ids(joined(stored, "tokens"), faults)
        labels_BL = tokens_BL1[:, 1:]
        is_label_BL1 = self._bits(stored["mask"], tokens_BL1.shape[1])
        batch = Batch(tokens_BL1[:, :-1].contiguous(), labels_BL.masked_fill(~is_label_BL1[:, 1:], IGNORED_LABEL))
        batch.num_counted = stored.num_counted
        if "starts" in stored:
            batch.positions_BL = positions_in_documents(self._bits(stored["starts"], tokens_BL1.shape[1]))
        if self._codec.name == SAMPLED:
            sampled = sampled_rows(stored, self._codec, self._tables, faults)
            faults.append(self._contradict_sampled(labels_BL.flatten(), sampled))
            batch.ids_NK, batch.weights_NK = sampled.ids_NK, sampled.counts_NK.float() / self._codec.num_ids
        elif self._codec.name != SEQUENCES:
            topk = topk_rows(stored, self._codec, self._tables, faults)
            faults.append(self._contradict_topk(labels_BL.flatten(), topk))
            weights_NK, tail_N = self._unscaled(topk)
            total_N = weights_NK.sum(1) + tail_N
            batch.ids_NK, batch.weights_NK = topk.ids_NK, weights_NK / total_N[:, None]
            batch.tail_N = tail_N / total_N
        found = torch.stack(faults).any()
        self._first_fault = torch.where(found, self._first_fault.clamp(max=number), self._first_fault)
        return batch

    def first_fault(self) -> int | None:
        """Return the lowest number of a batch that contradicts the format or its tokens; waits for the device."""
        number = int(self._first_fault)
        return None if number == _NONE else number

    def _bits(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        bit_8 = torch.arange(8, dtype=torch.uint8, device=self.device)
        return ((packed[:, :, None] >> bit_8) & 1).flatten(1)[:, :width].bool()

    def _unscaled(self, rows: DecodedTopk) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and tails at the chosen temperature, before they are divided by their sum."""
        if self._temperature is None:
            return rows.logprobs_NK.exp(), rows.tail_N
        logprobs_NK, log_tail_N = (
            rows.logprobs_NK * self._temperature.power,
            rows.log_tails_TN[self._temperature.number],
        )
        largest_N = logprobs_NK.amax(1).maximum(log_tail_N)
        return (logprobs_NK - largest_N[:, None]).exp(), (log_tail_N - largest_N).exp()

    def _contradict_topk(self, labels_N: torch.Tensor, rows: DecodedTopk) -> torch.Tensor:
        error = self._codec.error
        tolerance = LOGPROB_TOLERANCE_NATS + error.label_nats + error.kept_nats
        kept_N = rows.logprobs_NK.masked_fill(rows.ids_NK != labels_N[:, None], -torch.inf).amax(1)
        # comparisons with NaN are false: an unknown logprob fails if its label is kept, and passes otherwise
        agrees_N = (kept_N - rows.label_logprobs_N.clamp(min=error.floor_nats)).abs() <= tolerance
        above_N = rows.label_logprobs_N > rows.last_N + tolerance
        return (~agrees_N).where(kept_N > -torch.inf, above_N).any()

    def _contradict_sampled(self, labels_N: torch.Tensor, rows: DecodedSamples) -> torch.Tensor:
        count_N = (rows.counts_NK * (rows.ids_NK == labels_N[:, None])).sum(1)
        expected_N = self._codec.num_ids * rows.label_logprobs_N.double().exp()
        error = torch.tensor(self._codec.error.label_nats, dtype=torch.float64)
        tolerance_N = 1 + COUNT_TOLERANCE + expected_N * float(error.expm1())
        return ((count_N - expected_N).abs() >= tolerance_N).any()
