"""What a stranger's manifest calls things is what things can be called."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from capgap.schemas.manifest import FileEntry, InputEntry, Members, ShardEntry, WorkOrder

ORDER = {
    "stage": "train",
    "instance": "train/arm-1.b_\u00e4/seed-0",
    "settings": {},
    "inputs": {},
    "identity": "ab" * 32,
}


def test_a_work_order_of_ours_is_read() -> None:
    assert WorkOrder.model_validate(ORDER).instance == ORDER["instance"]


@pytest.mark.parametrize("name", ["a b", "a\x1b[2J", "$(rm -rf)", "`id`", "a;b", "../a", "a//b", "-a", "", "/a", "a'"])
@pytest.mark.parametrize("field", ["stage", "instance"])
def test_a_name_that_no_stage_or_instance_can_have_is_refused(field: str, name: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){field}.*expected a name"):
        WorkOrder.model_validate(ORDER | {field: name})


@pytest.mark.parametrize("digest", ["../../etc/passwd", "/etc/passwd", "a\x1b", "a b"])
def test_a_digest_that_is_none_is_refused(digest: str) -> None:
    for make in (
        lambda: FileEntry(path="a", num_bytes=1, sha256=digest),
        lambda: InputEntry(path="a", identity=digest, content=""),
        lambda: WorkOrder.model_validate(ORDER | {"identity": digest}),
    ):
        with pytest.raises(ValidationError, match="expected a digest"):
            make()


@pytest.mark.parametrize("path", ["a\x1b[2J.tar", "a\n.tar", "a\u202e.tar"])
def test_a_file_s_path_has_no_control_characters(path: str) -> None:
    with pytest.raises(ValidationError, match="expected one without control characters"):
        FileEntry(path=path, num_bytes=1, sha256="0")


@pytest.mark.parametrize("path", ["a b.tar", "$(id).tar", "-a.tar"])
def test_a_shard_is_called_as_a_shard_can_be(path: str) -> None:
    def entry(path: str) -> Any:
        file = FileEntry(path=path, num_bytes=1, sha256="0")
        return ShardEntry(file=file, num_sequences=0, members=Members())

    assert entry("student/student-000000.tar").file.path
    with pytest.raises(ValidationError, match="expected a name"):
        entry(path)
