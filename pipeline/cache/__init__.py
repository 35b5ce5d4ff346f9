"""The teacher's distributions, made once and kept.

    corpus shard --requests--> engine (vllm: captured on the worker, where the logits are; transformers: the reference)
                                  |
         target shard <--codec-- Targets <--convert-- Scored (ids, logprobs, the label's logprob; whole arrays)

One corpus shard is one submission and one target shard: the batches, and so the rounding, depend on the shard alone.
A finished target shard is verified and skipped.
"""
