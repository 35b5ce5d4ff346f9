"""A short description of a finished cache, for people to read."""

from __future__ import annotations

from pathlib import Path

from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.run_cache import RecordingName


def describe(location: Path | str, manifest: Manifest, facts: CacheFacts) -> str:
    """Return a few lines on a cache: its recordings and sizes, vocabulary, teacher, engine, tokenizer, context rule."""
    lines = [f"Cache at {location}"]
    for name in sorted(facts.recordings):
        lines += _recording(name, manifest, facts)
    settings = manifest.resolved.get("teacher")
    given = settings.get("path") if isinstance(settings, dict) else None
    made = manifest.inputs.get("teacher")
    given = given if facts.aligned is None else facts.aligned.teacher
    teacher = given or facts.served or (made.path if made is not None else "not known")
    tokenizer = facts.tokenizer
    lines += [
        f"  vocabulary: {tokenizer.vocab_size:,} ids, {facts.padded_vocab_size:,} with the teacher's padding",
        f"  teacher: {teacher}, by {', '.join(facts.engines) or 'an engine not known'} in {', '.join(facts.dtypes)}",
        f"  tokenizer: fingerprint {tokenizer.fingerprint[:12]}, documents end with id {tokenizer.eos_id}",
        f"  context: {facts.context}",
    ]
    if facts.cross_check is not None:
        lines.append(f"  engines: {facts.cross_check.sentence}")
    return "\n".join(lines)


def _recording(name: RecordingName, manifest: Manifest, facts: CacheFacts) -> list[str]:
    about = facts.recordings[name]
    if name == "chunks" and facts.aligned is not None:
        aligned = facts.aligned
        kept_share = f"{100 * aligned.num_kept_chunks / max(1, aligned.num_chunks):.1f} % of {aligned.num_chunks:,}"
        lines = [f"  chunks: {kept_share} chunks to learn from, of a teacher with other tokens"]
        if about.num_ids:
            lines.append(f"    {aligned.projected_sentence(manifest.shard_sets[name].num_tokens)}")
        return lines + _parts(name, manifest)
    kept = f"{about.num_ids} samples" if name == "sampled" else f"top {about.num_ids}, {about.profile}"
    temperatures = " or ".join(f"{one:g}" for one in about.temperatures)
    return [f"  {name}: {kept} a token, at temperature {temperatures}", *_parts(name, manifest)]


def _parts(name: RecordingName, manifest: Manifest) -> list[str]:
    lines = []
    for title, which in (("to train on", name), ("held out", heldout_set(name))):
        if which in manifest.shard_sets:
            lines.append(f"    {title}: {_size(manifest.shard_sets[which])}")
    return lines


def _size(shards: ShardSet) -> str:
    size = f"{shards.num_sequences:,} sequences of {shards.seq_len:,} tokens, {shards.num_tokens:,} in all"
    files = f"{len(shards.shards):,} shards"
    if shards.num_tokens:
        files += f", {shards.num_bytes / shards.num_tokens:.1f} bytes a token"
    return f"{size}; {files}"
