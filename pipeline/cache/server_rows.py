"""Read the rows of a request from a server's answer, by token ids and never by text.

    prompt of L + 1 tokens -> prompt_logprobs: null, then for each token its own logprob and those of the top-k tokens

Row i of the result is entry i + 1. An entry has k ids where the token is one of the top-k tokens, and k + 1 where it
is not. Each entry must contain the token that was sent, so that an answer which was cut, shifted or swapped
never becomes a row of a cache. The tail is 1 minus the sum of the kept probabilities, as a server does not return it.

Legend: L targets of a request, K ids kept, D ids of all entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.cache.scoring import Recording, Request, Scored, unpack
from capgap.pipeline.store.alignment import LOGPROB_TOLERANCE_NATS
from capgap.schemas.errors import InputError

# the probabilities of float32 logprobs may exceed a sum of 1 by rounding
_MOST_PROBABILITY = 1 + 1e-3


def rows_of(choice: dict[str, Any], recording: Recording, request: Request) -> Scored:
    """Read one request's rows from the server's answer.

    Args:
        choice: one choice of a completion, as plain JSON values.
        recording: what to keep; must be `topk` at temperature 1.
        request: the request that the server answered.

    Raises:
        InputError: the answer does not hold the rows of the request's tokens.
        AttributeError, KeyError, TypeError, ValueError: the answer does not have vLLM's form.
    """
    entries, sent = choice.get("prompt_logprobs"), request.tokens_L1
    if entries is None:
        raise InputError(
            "the server answers without prompt_logprobs",
            where=request.name,
            found=f"a choice of {', '.join(sorted(choice))}",
            expected="the prompt's logprobs, which vLLM adds to OpenAI's answer format",
            fix="ask a vLLM server",
        )
    echoed = choice.get("prompt_token_ids")
    if any(entry is None for entry in entries[1:]):
        raise _not_its_own(request, "tokens without logprobs", "a logprob for every token after the first")
    if len(entries) != len(sent) or (echoed is not None and list(echoed) != sent.tolist()):
        found = len(entries) if echoed is None or len(entries) != len(sent) else len(echoed)
        raise _not_its_own(
            request,
            f"rows of {found} tokens" if found != len(sent) else "rows of other tokens",
            f"rows of the {len(sent)} tokens that were sent",
        )
    sizes = np.array([len(entry) for entry in entries[1:]])
    ids_D = np.array([int(one) for entry in entries[1:] for one in entry], np.int64)
    logprobs_D = np.array([one["logprob"] for entry in entries[1:] for one in entry.values()], np.float32)
    return unpack(recording, *_packed(sizes, ids_D, logprobs_D, recording, request), request.name)


def _packed(
    sizes: npt.NDArray[np.int64],
    ids_D: npt.NDArray[np.int64],
    logprobs_D: npt.NDArray[np.float32],
    recording: Recording,
    request: Request,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the ids [L, K] int32 and the numbers [L, 3 + K] float32, in the columns of `PackedRows`."""
    top_k, num_rows = recording.top_k, len(sizes)
    if ((sizes != top_k) & (sizes != top_k + 1)).any():
        wrong = sizes[(sizes != top_k) & (sizes != top_k + 1)]
        raise _not_its_own(request, f"{wrong[0]} ids for a token", f"the top {top_k} and the token itself")
    if (ids_D < 0).any() or (ids_D >= recording.vocab_size).any():
        outside = ids_D[(ids_D < 0) | (ids_D >= recording.vocab_size)]
        raise InputError(
            "the server's teacher gives a logprob to an id outside the vocabulary",
            where=request.name,
            found=int(outside[0]),
            expected=f"0 to {recording.vocab_size - 1}",
            fix="lower cache.top_k, or use a server whose teacher has the corpus's tokenizer",
        )
    row_D = np.repeat(np.arange(num_rows), sizes)
    is_label_D = ids_D == request.tokens_L1[1:][row_D]
    if not (np.bincount(row_D[is_label_D], minlength=num_rows) == 1).all():
        row = int(np.flatnonzero(np.bincount(row_D[is_label_D], minlength=num_rows) != 1)[0])
        raise _not_its_own(
            request,
            f"{int(is_label_D.sum())} of {num_rows} rows contain their token",
            f"all of them; the first row that does not is row {row}",
        )
    label_L = logprobs_D[is_label_D]
    # an entry with k + 1 ids has its token beside the top-k tokens, so that one is not kept
    is_kept_D = ~(is_label_D & (sizes == top_k + 1)[row_D])
    ids_LK = ids_D[is_kept_D].reshape(num_rows, top_k).astype(np.int32)
    logprobs_LK = logprobs_D[is_kept_D].reshape(num_rows, top_k)
    order_LK = np.argsort(-logprobs_LK, axis=1, kind="stable")
    ids_LK, logprobs_LK = (np.take_along_axis(one, order_LK, axis=1) for one in (ids_LK, logprobs_LK))
    if (label_L[sizes == top_k + 1] > logprobs_LK[sizes == top_k + 1, -1] + LOGPROB_TOLERANCE_NATS).any():
        raise _not_its_own(request, "a token outside the top k that is more probable than the last of them", "none")
    held_L = np.exp(logprobs_LK, dtype=np.float64).sum(axis=1)
    if (held_L > _MOST_PROBABILITY).any():
        raise _not_its_own(
            request,
            f"top-{top_k} tokens that together have a probability of {held_L.max():.3g}",
            "at most 1; start the server without --logprobs-mode",
        )
    tail_L = np.maximum(0.0, 1.0 - held_L).astype(np.float32)
    return ids_LK, np.concatenate([np.stack([label_L, logprobs_LK[:, 0], tail_L], axis=1), logprobs_LK], axis=1)


def _not_its_own(request: Request, found: str, expected: str) -> InputError:
    return InputError(
        "the server's answer is not that of the tokens it was sent",
        where=request.name,
        found=found,
        expected=expected,
        fix="ask vLLM's server directly, without a proxy that may change prompts or answers",
    )
