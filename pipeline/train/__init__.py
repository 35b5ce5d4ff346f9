"""Training on shards with Lightning's Trainer: a student learns from a cache, or a small teacher from plain text.

ShardReader --SequenceLoader--> Batch --LightningModule--> hidden states --linear_sparse_kl--> loss
                    |             |      positions end attention             (no [N, V] logits)
                    |             + with several caches, MixedLoader takes each batch from one of them
             its state is one integer in the checkpoint: a killed training goes on with the very next batch
"""
