"""Checks of finished folders against their manifests: sizes, digests, structure of shards, alignment of targets."""
