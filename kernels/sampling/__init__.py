"""Conversion of the teacher's logits to what a cache keeps: systematic samples, or the top-k tokens and the tail.

    logits [N, V] --sampled_rows--> ids of n samples, label's and top logprob
                  --topk_rows-----> K ids, logprobs, tail, label's logprob

Systematic sampling draws one uniform offset r in [0, 1) for each row and takes the ids at the points (j + r) / n of the
cumulative distribution, j = 0 .. n - 1. An interval of length p contains floor(n p) or ceil(n p) of these points, and
n p on average over r. So E[count_i] = n p_i, as with independent samples, but with a fraction of their variance.
`offsets` computes r as a pure function of seed, sequence and position.

On one CPU thread, n = 50 samples take 7 us a row at V = 4096 and 31 us at V = 32000; the top 64 take 9 us and 42 us.
On a GPU, a call needs the memory of two or three float32 copies of the logits, so pass a chunk of rows at a time.
`reference.py` holds `sampled_rows` and `topk_rows` in float64; `sampled_and_topk_rows` computes both from one softmax.

>>> import torch
>>> logits_NV = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
>>> sampled_rows(logits_NV, torch.tensor([1]), torch.tensor([0.5]), num_samples=4).samples_Nn
tensor([[0, 0, 1, 2]], dtype=torch.int32)
"""

from capgap.kernels.sampling.offsets import offsets
from capgap.kernels.sampling.rows import SampledRows, TopkRows, sampled_and_topk_rows, sampled_rows, topk_rows

__all__ = ["SampledRows", "TopkRows", "offsets", "sampled_and_topk_rows", "sampled_rows", "topk_rows"]
