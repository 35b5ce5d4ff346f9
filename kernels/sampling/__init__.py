"""From the teacher's logits to what a cache keeps: systematic samples, or the top-k tokens and their tail.

    logits [N, V] --sampled_rows--> ids of n samples, label's and top logprob
                  --topk_rows-----> K ids, logprobs, tail, label's logprob

Systematic sampling takes one offset r in [0, 1) a row, and takes the ids at the points (j + r) / n of the cumulative
distribution, j = 0 .. n - 1. The number of points in an interval of length p is floor(n p) or ceil(n p), and over r it
is n p on average: E[count_i] = n p_i, as with independent samples, at a fraction of their variance. `offsets` gives r
as a pure function of seed, sequence and position.

Cost on one CPU thread: 7 us a row at V = 4096 and 31 us at V = 32000 for n = 50; the top 64 tokens take 9 and 42.
Memory on a GPU is two or three float32 copies of the logits: hand over a chunk of rows at a time.
`reference.py` holds `sampled_rows` and `topk_rows` in float64; `sampled_and_topk_rows` gives both from one softmax.

>>> import torch
>>> logits_NV = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
>>> sampled_rows(logits_NV, torch.tensor([1]), torch.tensor([0.5]), num_samples=4).samples_Nn
tensor([[0, 0, 1, 2]], dtype=torch.int32)
"""

from capgap.kernels.sampling.offsets import offsets
from capgap.kernels.sampling.rows import SampledRows, TopkRows, sampled_and_topk_rows, sampled_rows, topk_rows

__all__ = ["SampledRows", "TopkRows", "offsets", "sampled_and_topk_rows", "sampled_rows", "topk_rows"]
