"""What a power failure may leave: the operations of a process on files, recorded, and a checker that replays them.

    python power.py LOG RUN.json INSTANCE ...    makes those instances and writes a line for each operation

Recorded are `fsync` (of a file with its digest, of a folder with the names in it), renames and removals. Whatever is
not recorded, writing above all, puts nothing on the disk for certain: not before somebody has called `fsync`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

MANIFEST_NAME, CHECKPOINTS = "manifest.json", "work/checkpoints"

Operation = dict[str, Any]


class Disk:
    """What is on the disk for certain, and which manifests may be there, after each operation."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, int]] = {}
        self._folders: dict[str, int] = {}
        self._digests: dict[int, str] = {}
        self._unsettled: dict[str, set[str]] = {}
        self.manifests: dict[str, list[str]] = {}

    def apply(self, operation: Operation) -> None:
        """Let one operation happen."""
        kind, path = operation["kind"], operation["path"]
        if kind == "sync file":
            self._digests[operation["inode"]] = operation["sha256"]
        elif kind == "sync folder":
            self._names[path], self._folders[path] = operation["names"], operation["inode"]
            self._unsettled.pop(path, None)
            name = f"{path}/{MANIFEST_NAME}"
            if name in self.manifests:
                # the last one that was renamed into its place, or none
                self.manifests[name] = self.manifests[name][-1:] if MANIFEST_NAME in operation["names"] else []
        else:
            self._unsettle(path)
            if kind == "rename":
                self._unsettle(operation["to"])
                if operation["to"].endswith(f"/{MANIFEST_NAME}"):
                    self.manifests.setdefault(operation["to"], []).append(operation["text"])

    def digest_of(self, root: str, path: str) -> str | None:
        """The digest of the file that is at `path` for certain; None where none is. `root` is there for certain."""
        folder, inode = root, self._folders.get(root)
        for name in Path(path).relative_to(root).parts:
            if inode != self._folders.get(folder) or name in self._unsettled.get(folder, ()):
                return None
            inode = self._names.get(folder, {}).get(name)
            if inode is None:
                return None
            folder = f"{folder}/{name}"
        return self._digests.get(inode or 0)

    def _unsettle(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        self._unsettled.setdefault(folder, set()).add(name)


def faults(operations: Iterable[Operation], root: str) -> Iterator[str]:
    """What a power failure after any of the operations would break, in words.

    A manifest that may be on the disk must find every file that it lists there, for certain and as it lists it. A
    checkpoint may go when a later one is there for certain, or the manifest.
    """
    disk = Disk()
    for number, operation in enumerate(operations):
        if operation["kind"] == "remove" and operation["path"].endswith(".ckpt"):
            yield from (f"operation {number}: {fault}" for fault in _lost_checkpoint(disk, root, operation["path"]))
        disk.apply(operation)
        for path, texts in disk.manifests.items():
            folder = path.rpartition("/")[0]
            # whatever happens elsewhere leaves the files of this folder as they were
            if not any(one.startswith(folder) or folder.startswith(one) for one in _touched(operation)):
                continue
            for name, digest in _listed(*texts):
                if disk.digest_of(root, f"{folder}/{name}") != digest:
                    yield f"operation {number}, {operation['kind']} of {operation['path']}: {path} without {name}"


def _touched(operation: Operation) -> set[str]:
    return {operation["path"], operation.get("to", operation["path"])}


@cache
def _listed(*texts: str) -> list[tuple[str, str]]:
    """Name and digest of each file that one of these manifests lists."""
    return [(file["path"], file["sha256"]) for text in texts for file in json.loads(text)["files"]]


def _lost_checkpoint(disk: Disk, root: str, path: str) -> Iterator[str]:
    folder, _, name = path.rpartition("/")
    others = {one for one in disk._names.get(folder, ()) if one.partition("-")[0] == name.partition("-")[0]} - {name}
    manifest = f"{folder.removesuffix(CHECKPOINTS)}{MANIFEST_NAME}"
    kept = [manifest, *(f"{folder}/{other}" for other in others)]
    if not any(disk.digest_of(root, one) for one in kept):
        yield f"{path} goes, and neither a manifest nor another checkpoint is there for certain"


def record(log: Callable[[Operation], None], root: str) -> None:
    """Have every operation of this process on files below `root` logged, before it returns."""
    fsync, replace, rename, unlink, remove, rmdir = os.fsync, os.replace, os.rename, os.unlink, os.remove, os.rmdir

    def full(path: Any, dir_fd: int | None) -> str:
        folder = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        return str(folder / os.fspath(path))

    def below(path: str) -> bool:
        return path == root or path.startswith(f"{root}/")

    def logged_fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        fsync(descriptor)
        path, found = str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor)
        if not below(path):
            return
        if stat.S_ISDIR(found.st_mode):
            names = {entry.name: entry.inode() for entry in os.scandir(path)}
            log({"kind": "sync folder", "path": path, "inode": found.st_ino, "names": names})
        else:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            log({"kind": "sync file", "path": path, "inode": found.st_ino, "sha256": digest})

    def logged_rename(really: Callable[..., None]) -> Callable[..., None]:
        def run(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
            path, to = full(source, src_dir_fd), full(target, dst_dir_fd)
            text = Path(path).read_text() if to.endswith(f"/{MANIFEST_NAME}") else ""
            really(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if below(to):
                log({"kind": "rename", "path": path, "to": to, "text": text})

        return run

    def logged_removal(really: Callable[..., None]) -> Callable[..., None]:
        def run(path: Any, *, dir_fd: int | None = None) -> None:
            name = full(path, dir_fd)
            really(path, dir_fd=dir_fd)
            if below(name):
                log({"kind": "remove", "path": name})

        return run

    os.fsync = logged_fsync
    os.replace, os.rename = logged_rename(replace), logged_rename(rename)
    os.unlink, os.remove, os.rmdir = logged_removal(unlink), logged_removal(remove), logged_removal(rmdir)


def main(log: str, run_file: str, names: list[str]) -> None:
    """Make the instances of these names, with everything that they do recorded."""
    from capgap.pipeline.workflow.carry_out import carry_out
    from capgap.pipeline.workflow.graph import instances
    from capgap.schemas.run_file import RunFile

    run = RunFile.model_validate_json(Path(run_file).read_bytes())
    with Path(log).open("w") as file:
        record(lambda operation: print(json.dumps(operation), file=file, flush=True), str(Path(run.out).parent))
        for instance in instances(run):
            if instance.name in names:
                carry_out(run, instance)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
