"""Finds the top-1 tokens of rows without holding all their logits in memory.

Legend: N rows, n of them at a time, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch

# 4096 rows by 8192 columns of logits are 128 MiB
_TOP_ROWS, _TOP_COLUMNS = 4096, 8192


def top_ids(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, vocab_size: int
) -> torch.Tensor:
    """Return the most probable id of each row [N], int64; on a tie the lowest one.

    Logits are computed in float32, because many of them tie in bfloat16. A soft cap or a scale that a model applies to
    its logits is left out, since neither changes their order.

    Args:
        hidden_NH: The inputs of the head.
        weight_VH: The weight of the head.
        bias_V: The bias of the head, or None.
        vocab_size: Size of the real vocabulary; ids at or past it are not considered.
    """
    found = []
    for hidden_nH in torch.split(hidden_NH, _TOP_ROWS):
        top_n = hidden_nH.new_full((len(hidden_nH),), -torch.inf, dtype=torch.float32)
        id_n = torch.zeros(len(hidden_nH), dtype=torch.int64, device=hidden_nH.device)
        for start in range(0, vocab_size, _TOP_COLUMNS):
            columns = slice(start, min(start + _TOP_COLUMNS, vocab_size))
            logits_nV = hidden_nH.float() @ weight_VH[columns].float().T
            if bias_V is not None:
                logits_nV += bias_V[columns].float()
            here_n, place_n = logits_nV.max(dim=1)
            is_more_n = here_n > top_n
            top_n, id_n = here_n.where(is_more_n, top_n), (place_n + start).where(is_more_n, id_n)
        found.append(id_n)
    return torch.cat(found)
