"""What other programs keep, in and out.

captures (Parquet) --columns, distillkit--> CapturedRow --pack--> sequences of a length --corpus, cache--> two folders
                                                  |
                                                  +--shift: does each target belong to the token after it?

a finished cache --export--> Parquet, one file a shard, and a card

What is imported is a corpus and a cache like any other: the same shards, checks and manifests, whose settings and
sources say where they came from.
"""
