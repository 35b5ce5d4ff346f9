"""Turn a finished cache that lost shards back into an unfinished one, so that only the lost shards are scored again."""

from __future__ import annotations

import shutil
from pathlib import Path

from capgap.pipeline.cache.cross_check import CROSS_CHECK_NAME
from capgap.pipeline.cache.shards import SCORED_FOLDER, SIDECARS_FOLDER
from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.store.files import sync_folder
from capgap.pipeline.store.quarantine import read_quarantine, write_quarantine
from capgap.pipeline.store.sidecars import write_sidecar
from capgap.schemas.facts import CacheFacts, heldout_set
from capgap.schemas.manifest import MANIFEST_NAME, Manifest, ShardEntry
from capgap.schemas.run_cache import RecordingName


def reopen(folder: Path, manifest: Manifest) -> bool:
    """Restore the facts and sidecars of each shard from the manifest, then remove the manifest.

    The next run finds the whole shards by their digests, as after a kill. A shard in quarantine is not restored, so
    that it is made again in every recording: its digest may have been computed from damaged bytes.

    Returns:
        True if the cache was reopened. False if nothing was done, because the manifest lacks the facts of single
        shards, as the manifest of an import does.
    """
    facts = CacheFacts.model_validate(manifest.facts)
    shards = {name: _all_shards(manifest, name) for name in facts.recordings}
    if any(len(each) != len(facts.scored) for each in shards.values()):
        return False
    quarantined, work = read_quarantine(folder), folder / WORK_FOLDER
    # files that a kill left in the work folder are older than the quarantine
    shutil.rmtree(work, ignore_errors=True)
    for name in (SCORED_FOLDER, SIDECARS_FOLDER):
        (work / name).mkdir(parents=True)
    for index, scored in enumerate(facts.scored):
        entries = [each[index] for each in shards.values()]
        if any(entry.file.path in quarantined for entry in entries):
            continue
        for entry in entries:
            write_sidecar(work / SIDECARS_FOLDER / Path(entry.file.path).with_suffix(".json").name, entry)
        write_sidecar(work / SCORED_FOLDER / f"{index:06d}.json", scored)
    if facts.cross_check is not None:
        write_sidecar(work / CROSS_CHECK_NAME, facts.cross_check)
    (folder / MANIFEST_NAME).unlink()
    sync_folder(folder)
    write_quarantine(folder, {})
    return True


def _all_shards(manifest: Manifest, recording: RecordingName) -> list[ShardEntry]:
    """Return all shards of one recording in the order of the facts: the training shards, then the held-out shards."""
    names = (recording, heldout_set(recording))
    return [shard for name in names if name in manifest.shard_sets for shard in manifest.shard_sets[name].shards]
