"""What is known of a teacher's training."""

from __future__ import annotations

from typing import Any

import pytest

from capgap.pipeline.teacher.trained import training_tokens
from capgap.schemas.manifest import Manifest


@pytest.mark.parametrize(
    ("settings", "totals", "tokens"),
    [
        ({"model": {}, "adapt": None}, {"num_tokens": 4096}, 4096),
        ({"path": "given", "adapt": {"max_tokens": 1024}}, {"num_tokens": 1024}, None),
        ({"path": "given", "adapt": None}, {"num_parameters": 9}, None),
    ],
)
def test_only_of_a_teacher_with_fresh_weights_is_it_known_on_how_much_it_was_trained(
    settings: dict[str, Any], totals: dict[str, Any], tokens: int | None
) -> None:
    made = {"stage": "teacher", "instance": "teacher", "identity": "0", "content": "0", "inputs": {}, "files": ()}
    rest = {"versions": {}, "started": "", "wall_s": 1.0, "command": ()}
    assert training_tokens(Manifest(settings={"teacher": settings}, totals=totals, **made, **rest)) == tokens
