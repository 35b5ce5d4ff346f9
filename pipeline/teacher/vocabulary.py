"""Add rows to a model's embedding and head for a vocabulary that extends the model's own.

The row of a new piece is the mean of the rows of the pieces that the old tokenizer spells it with, in the embedding and
in the head alike. A padding row, which belongs to no token, is the mean of all old rows, so its logit is ordinary.

Legend: V rows, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capgap.pipeline.models.tokenizers import tokenizer_facts


def extend_vocabulary(
    model: PreTrainedModel,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    pad_to_multiple_of: int | None = None,
) -> int:
    """Give the model a row for every entry of `new`, in place. The rows of old entries stay bit-identical.

    Args:
        model: the model, whose vocabulary is that of `old`.
        old: the model's tokenizer.
        new: tokenizer that has every entry of `old` at the same id, and further entries.
        pad_to_multiple_of: number that the number of rows is rounded up to a multiple of; None for no rounding.

    Returns:
        The number of new entries.
    """
    num_old, num_new = (tokenizer_facts(tokenizer).vocab_size for tokenizer in (old, new))
    spellings = _spellings(old, new)
    num_rows = max(model.get_input_embeddings().weight.shape[0], num_new)
    if pad_to_multiple_of is not None:
        num_rows = -(-num_rows // pad_to_multiple_of) * pad_to_multiple_of
    if not spellings and num_rows == model.get_input_embeddings().weight.shape[0]:
        return 0
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    head = model.get_output_embeddings()
    matrices: list[Tensor] = [model.get_input_embeddings().weight]
    if not tied:
        matrices.append(head.weight)
    if getattr(head, "bias", None) is not None:
        matrices.append(head.bias)
    for matrix in matrices:
        _fill(matrix, spellings, num_old)
    return len(spellings)


@torch.no_grad()
def _fill(rows_VH: Tensor, spellings: dict[int, list[int]], num_old: int) -> None:
    rows_VH[num_old:] = rows_VH[:num_old].mean(dim=0, dtype=torch.float32).to(rows_VH.dtype)
    for new, pieces in spellings.items():
        rows_VH[new] = rows_VH[pieces].mean(dim=0, dtype=torch.float32).to(rows_VH.dtype)


def _spellings(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Return the ids of the old entries that spell each new entry, by the id of the new entry."""
    known = old.get_vocab()
    added = {token.content for token in new.added_tokens_decoder.values()}
    found = {}
    for entry, number in new.get_vocab().items():
        if entry in known:
            continue
        if entry in added or not hasattr(old, "backend_tokenizer"):
            # the entry as text: a piece may write bytes or spaces with other characters
            text = entry if entry in added else new.convert_tokens_to_string([entry])
            ids = old(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = [token.id for token in old.backend_tokenizer.model.tokenize(entry)]
        assert ids, entry
        found[number] = ids
    return found
