"""Decode a cache in your own WebDataset pipeline, and mix it with another source.

python webdataset_mix.py CACHE OTHER.tar
"""

import sys

import webdataset as wds

import capgap

if len(sys.argv) != 3:
    sys.exit(__doc__)
cache = capgap.open_cache(sys.argv[1])
recording = next(iter(cache.facts.recordings))
shards = [f"{cache.location}/{shard.file.path}" for shard in cache.manifest.shard_sets[recording].shards]

sequences = wds.WebDataset(shards, shardshuffle=100).compose(cache.webdataset_decoder(recording=recording))
texts = wds.WebDataset(sys.argv[2], shardshuffle=False).decode()
counts = {"sequences": 0, "texts": 0}
for sample in wds.RandomMix([sequences, texts], [0.8, 0.2], longest=True):
    counts["sequences" if "weights" in sample else "texts"] += 1
print(counts)
