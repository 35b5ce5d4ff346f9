from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.conftest import ROOT

_TABLE = re.compile(r"\| event \| when \| fields \|\n\|[-|]+\|\n((?:\|.*\|\n)+)")
# By function, the place among its arguments at which it takes the name of an event.
_NAMED_AT = {"event": 0, "log": 0, "_last": 1}
# A log record that no call of these made, of another package for example, has this name.
_OF_OTHERS = {"log"}


def _documented() -> set[str]:
    table = _TABLE.search((ROOT / "docs" / "operations.md").read_text())
    assert table
    return {name for row in table[1].splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def _logged() -> Iterator[str]:
    """Yield the name of each event that the code logs under a constant name."""
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            place = _NAMED_AT.get(name or "")
            if place is not None and len(node.args) > place:
                argument = node.args[place]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value


def test_the_table_of_events_has_every_event_of_the_code_and_no_other() -> None:
    logged = set(_logged())
    assert len(logged) > 40, "events are logged by calls that this test does not recognize"
    assert _documented() - _OF_OTHERS == logged
