"""The cache stage: it computes the teacher's distributions once and keeps them as shards.

    corpus shard --requests--> engine (vllm: captured on the worker, where the logits are; transformers: the reference)
                                  |
        target shards <--codec-- Targets <--convert-- Scored (ids, logprobs, the label's logprob; whole arrays)

One corpus shard is one submission and one target shard in each recording (`shards.py`): the batches, and so the
rounding, depend on the shard alone. A finished shard is verified and skipped. Separate threads encode and write a shard
while the teacher scores the next one (`overlap.py`).
"""
