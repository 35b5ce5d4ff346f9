"""Turn a finished cache that lost shards back into an unfinished one, so that only those are scored again."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.cache.shards import SCORED_FOLDER, SIDECARS_FOLDER
from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.store.quarantine import write_quarantine
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.manifest import MANIFEST_NAME, Manifest


def reopen(folder: Path, manifest: Manifest) -> bool:
    """Write down of every shard what was known of it before the cache was finished, then take the manifest away.

    Which shards are whole is found by their digests, as after a kill. False, and nothing is done, where the manifest
    says nothing of single shards: an imported cache is imported again.
    """
    facts = CacheFacts.model_validate(manifest.facts)
    scored, sets = facts.scored, manifest.shard_sets
    for recording in facts.recordings:
        own = [sets[one] for one in (recording, heldout_set(recording)) if one in sets]
        if sum(len(shard_set.shards) for shard_set in own) != len(scored):
            return False
    work = folder / WORK_FOLDER
    for name in (SCORED_FOLDER, SIDECARS_FOLDER):
        (work / name).mkdir(parents=True, exist_ok=True)
    for shard_set in sets.values():
        for shard in shard_set.shards:
            name = Path(shard.file.path).with_suffix(".json").name
            write_atomically(work / SIDECARS_FOLDER / name, shard.model_dump_json())
    for index, one in enumerate(scored):
        write_atomically(work / SCORED_FOLDER / f"{index:06d}.json", one.model_dump_json())
    (folder / MANIFEST_NAME).unlink()
    write_quarantine(folder, {})
    return True
