"""Jinja's sandbox with a bound on the work of a rendering, which is counted and so the same on every machine.

A step is a turn of a loop and each character that is made or compared; a call, a filter, a test, a comparison, and each
entry of a list that one of them makes, are ten. What would make much at once is counted before it is made.

    {% for i in range(100000) %}{% for ... %}      turns              {{ x | replace("a", big) }}, {{ "x" * 10 ** 9 }}
    {% macro m() %}{{ m() }}{% endmacro %}         Python's own bound {% set x = x ~ x %}, {% set x = [x, x] %}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_INTEGER_BITS = 1 << 10
_WORK = 10
_NUMBER = re.compile(r"\d+")
_MADE, _TURNS = "capgap_made", "capgap_turns"


class OverspentError(Exception):
    """A rendering does more than it may."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose renderings spend from a budget of steps; without one they spend as they like."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    _left: float = float("inf")

    @classmethod
    def like(cls, other: Any) -> BoundedEnvironment:
        """One with the options, extensions, filters, tests and globals of another."""
        made: BoundedEnvironment = cls(
            trim_blocks=other.trim_blocks,
            lstrip_blocks=other.lstrip_blocks,
            extensions=[type(extension) for extension in other.extensions.values()],
            optimized=False,  # what is constant would be worked out while the template is read, without a bound
            finalize=lambda value: made.made(value),
        )
        made.globals |= {name: value for name, value in other.globals.items() if name not in made.globals}
        made.filters = {name: made._spending(name, function) for name, function in other.filters.items()}
        made.tests = {name: made._spending(name, function) for name, function in other.tests.items()}
        made.filters |= {_MADE: made.made, _TURNS: made.turns}
        return made

    @contextmanager
    def budget(self, num_steps: int) -> Iterator[None]:
        """Within it the environment's templates may do so many steps.

        Raises:
            OverspentError: they do more.
        """
        self._left = num_steps
        try:
            yield
        finally:
            self._left = float("inf")

    def spend(self, num_steps: float) -> None:
        """Take steps from the budget."""
        self._left -= num_steps
        if self._left < 0:
            raise OverspentError

    def made(self, value: Any) -> Any:
        """The value, its size spent."""
        self.spend(_WORK + (len(value) if type(value) is str else size_of(value, self._left)))
        return value

    def turns(self, values: Any) -> Any:
        """The values of a loop, a step each; a list stays one, for a loop's length and its last turn."""
        if isinstance(values, (list, tuple, dict, str, range)):
            self.spend(len(values))
            return values
        return self._each(values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's arithmetic, its result spent before it is made."""
        if operator == "*":
            self.spend(_times(left, right) + _times(right, left))
        elif operator == "+":
            self.spend(size_of(left, self._left) + size_of(right, self._left))
        elif operator == "%" and isinstance(left, str):
            self.spend(_formatted(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.spend(left.bit_length() * max(right, 0))
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > _MAX_INTEGER_BITS:
            raise OverflowError(f"an integer of {made.bit_length()} bits")
        return made

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Jinja's call of whatever a template calls."""
        # the sandbox puts a function of its own around str.format
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            self.spend(_cost(getattr(function, "__name__", ""), owner, args, kwargs))
        return self.made(super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An entry, or a part, whose size is spent."""
        found = super().getitem(obj, argument)
        return self.made(found) if isinstance(argument, slice) else found

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counting().visit(tree)
        return tree

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(_WORK)
            yield value

    def _spending(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_first = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def spending(*args: Any, **kwargs: Any) -> Any:
            value, *further = args[1:] if takes_first else args
            if name == "join" and not isinstance(value, (str, list, tuple)):
                value = list(self._each(value))
                args = (args[0], value, *further) if takes_first else (value, *further)
            self.spend(_cost(name, value, further, kwargs))
            made = function(*args, **kwargs)
            return made if isinstance(made, Iterator) else self.made(made)

        return spending


class _Counting(NodeTransformer):
    """Puts what spends around the parts of a template that are neither calls nor filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _TURNS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        self.generic_visit(node)
        node.nodes = [_filtered(part, _MADE) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        self.generic_visit(node)
        node.expr = _filtered(node.expr, _MADE)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, _MADE)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        return _filtered(self.generic_visit(node), _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        return _filtered(self.generic_visit(node), _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        self.generic_visit(node)
        return _filtered(node, _MADE) if node.ctx == "load" else node


def size_of(value: Any, most: float = float("inf")) -> int:
    """Characters of a text; of a list or an object ten for each entry, and what is in them; 0 of anything else.

    Counting ends above `most`: lists that hold one another many times are small in memory alone.
    """
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left and total <= most:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, (list, tuple, dict, set, frozenset)):
            total += _WORK * len(one)
            left += [*one, *one.values()] if isinstance(one, dict) else one
    return total


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _times(value: Any, count: Any) -> int:
    return size_of(value) * count if isinstance(value, (str, list, tuple)) and isinstance(count, int) else 0


def _formatted(text: str, values: Any) -> int:
    """Widths are numbers in the text or, for a star, among the values."""
    widths = sum(int(number) for number in _NUMBER.findall(text))
    given = values if isinstance(values, tuple) else (values,)
    widths += sum(value for value in given if isinstance(value, int)) if "*" in text else 0
    return len(text) + widths + (text.count("%") + text.count("{")) * size_of(values)


def _cost(name: str, value: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """What a filter, or a method of a text, may make of its arguments, as far as that is more than it was given."""
    given = [*args, *kwargs.values()]
    numbers = sum(abs(one) for one in given if isinstance(one, int))
    longest = max((len(one) for one in given if isinstance(one, str)), default=0)
    if not isinstance(value, str):
        if name == "join":
            return longest * (len(value) if isinstance(value, (list, tuple)) else 1)
        return numbers * size_of(value) if name == "tojson" else numbers if name in ("batch", "slice") else 1
    match name:
        case "replace" | "join":
            old = given[0] if given and isinstance(given[0], str) else ""
            return (len(value) if name == "join" else value.count(old)) * longest
        case "indent" | "wordwrap" | "expandtabs":
            num_places = value.count("\t" if name == "expandtabs" else "\n") + 1
            return num_places * numbers + (len(value) if name == "wordwrap" else num_places) * longest
        case "center" | "ljust" | "rjust" | "zfill":
            return numbers
        case "format" | "format_map":
            return _formatted(value, tuple(given))
    return 1
