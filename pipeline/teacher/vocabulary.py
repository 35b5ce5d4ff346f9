"""Rows of embedding and head for a vocabulary that extends the model's own.

A new piece's row is the mean of the rows of the pieces that the old tokenizer spells it with, in the embedding and in
the head alike. A row that no token has, padding, is the mean of all old rows: its logit is then an ordinary one.

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
    """Give the model rows for every entry of `new`, in place; rows of old entries stay as they are, to the bit.

    Args:
        model: of `old`, whose every entry `new` has at the same id.
        old: its tokenizer.
        new: an extension of that.
        pad_to_multiple_of: of the number of rows.

    Returns:
        How many entries are new.
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
    """For each new entry, by id, the old entries that it is spelt with."""
    known = old.get_vocab()
    added = {token.content for token in new.added_tokens_decoder.values()}
    found = {}
    for entry, number in new.get_vocab().items():
        if entry in known:
            continue
        if entry in added or not hasattr(old, "backend_tokenizer"):
            # as it stands in text, which pieces do not where bytes or blanks have letters of their own
            text = entry if entry in added else new.convert_tokens_to_string([entry])
            ids = old(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = [token.id for token in old.backend_tokenizer.model.tokenize(entry)]
        assert ids, entry
        found[number] = ids
    return found
