"""Training on shards, with Lightning's Trainer: a student from a cache, or a small teacher from plain text.

ShardReader --SequenceLoader--> Batch --LightningModule--> hidden states --linear_sparse_kl--> loss
                    |             |      positions end attention             (no [N, V] logits)
                    |             + several caches: MixedLoader, each batch of one of them
             one integer, in the checkpoint: a killed training goes on with the very next batch
"""
