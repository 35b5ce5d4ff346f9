"""Messages name the command by which an extra is had, as capgap was installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import distribution
from typing import Any

import pytest

from capgap.pipeline.store.extras import adding, command

_GIT = {"url": "https://forge.example/us/capgap", "vcs_info": {"vcs": "git", "commit_id": "3f1c"}}


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"url": "file:///srv/my%20clone", "dir_info": {"editable": True}}, "-e /srv/my clone[ray]"),
        ({"url": "file:///srv/clone", "dir_info": {}}, "/srv/clone[ray]"),
        (_GIT, "capgap[ray] @ git+https://forge.example/us/capgap@3f1c"),
        (
            _GIT | {"subdirectory": "tools/kd"},
            "capgap[ray] @ git+https://forge.example/us/capgap@3f1c#subdirectory=tools/kd",
        ),
        (
            {"url": "file:///w/capgap-1-py3-none-any.whl", "archive_info": {}},
            "capgap[ray] @ file:///w/capgap-1-py3-none-any.whl",
        ),
    ],
)
def test_an_extra_is_added_from_where_capgap_came_from(origin: dict[str, Any] | None, said: str) -> None:
    words = shlex.split(command(origin, "ray").strip("`"))
    assert words[:2] == ["pip", "install"] and " ".join(words[2:]) == said


def test_a_package_index_is_never_asked_for_the_name_alone() -> None:
    assert command(None, "ray") == "`pip install '.[ray]'` in capgap's clone"


def test_the_command_is_that_of_the_capgap_that_runs() -> None:
    origin = distribution("capgap").read_text("direct_url.json")
    assert adding("eval") == command(json.loads(origin) if origin else None, "eval")
