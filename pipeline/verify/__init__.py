"""Finished folders against their manifests: sizes, digests, structure of every shard, alignment of every target."""
