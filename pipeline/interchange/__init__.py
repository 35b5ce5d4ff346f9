"""Import of other programs' captures as corpus and cache, and export of caches as Parquet.

captures (Parquet) --columns, distillkit--> CapturedRow --pack--> sequences of a length --corpus, cache--> two folders
                                                  |
                                                  +--shift: does each target belong to the token after it?

a finished cache --export--> Parquet, one file a shard, and a card

An imported corpus and cache are like any other: they have the same shards, checks and manifests, and their settings and
sources say where they came from.
"""
