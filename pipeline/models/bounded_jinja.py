"""Jinja's sandbox with a bound on the work of a rendering, which is counted in steps and so the same on every machine.

A loop iteration is one step, and so is each character that is made or compared. A call, a filter, a test, a comparison,
and each entry of a list that one of them makes are ten steps. Operations that can make much at once are counted before
they run. A filter or a method also costs the length of the text or list that it works on.

    {% for i in range(100000) %}{% for ... %}      iterations         {{ x | replace("a", big) }}, {{ "x" * 10 ** 9 }}
    {% macro m() %}{{ m() }}{% endmacro %}         Python's own bound {% set x = x ~ x %}, {% set x = [x, x] %}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_INTEGER_BITS = 1 << 10
_WORK = 10
_NUMBER = re.compile(r"\d+")
_SIZED = (str, list, tuple, dict, range)
# These look at no entry, so that a template may use them in each iteration of a loop over the same list.
_WITHOUT_READING = frozenset(["length", "count", "first", "last", "default", "d"])
_COMPARING = frozenset(
    ["in", "eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt", "greaterthan"]
)
# Methods whose results are not bounded by anything that is counted: bytes can be multiplied, and a translation may
# write a long text for each character.
_REFUSED_METHODS = {str: ("encode", "translate"), int: ("to_bytes",)}
_MADE, _TURNS = "capgap_made", "capgap_turns"


class OverspentError(Exception):
    """A rendering needs more steps than its budget has."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose renderings spend from a budget of steps; without a budget they are not bounded."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    _left: float = float("inf")

    @classmethod
    def like(cls, other: Any) -> BoundedEnvironment:
        """Return a bounded environment with the options, extensions, filters, tests and globals of another one."""
        made: BoundedEnvironment = cls(
            trim_blocks=other.trim_blocks,
            lstrip_blocks=other.lstrip_blocks,
            extensions=[type(extension) for extension in other.extensions.values()],
            optimized=False,  # otherwise constant expressions are evaluated at compile time, where nothing is counted
            finalize=lambda value: made.made(value),
        )
        made.globals |= {name: value for name, value in other.globals.items() if name not in made.globals}
        # writes as many paragraphs as it is asked for, and no template for conversations needs it
        made.globals.pop("lipsum", None)
        made.filters = {name: made._spending(name, function) for name, function in other.filters.items()}
        made.tests = {name: made._spending(name, function, is_test=True) for name, function in other.tests.items()}
        made.filters |= {_MADE: made.made, _TURNS: made.turns}
        return made

    @contextmanager
    def budget(self, num_steps: int) -> Iterator[None]:
        """Within this context, the environment's templates may spend `num_steps` steps.

        Raises:
            OverspentError: the templates need more steps.
        """
        self._left = num_steps
        try:
            yield
        finally:
            self._left = float("inf")

    def spend(self, num_steps: float) -> None:
        """Take steps from the budget, and raise OverspentError if none are left."""
        # fewer than none, of a negative width for example, must not add to the budget
        self._left -= max(num_steps, 0)
        if self._left < 0:
            raise OverspentError

    def made(self, value: Any) -> Any:
        """Spend the size of a value that was made, and return the value."""
        self.spend(_WORK + (len(value) if type(value) is str else size_of(value, self._left)))
        _require_small(value)
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use an attribute; not where the size of what it makes is unbounded."""
        refused = any(isinstance(obj, owner) and attr in names for owner, names in _REFUSED_METHODS.items())
        return not refused and super().is_safe_attribute(obj, attr, value)

    def turns(self, values: Any) -> Any:
        """Spend the steps of a loop over `values`, and return the values.

        A list stays a list, as `loop.length` and `loop.last` need it. Each value of an iterator costs ten steps.
        """
        if isinstance(values, (list, tuple, dict, str, range)):
            self.spend(len(values))
            return values
        return self._each(values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an arithmetic operation, after spending the size of its result."""
        if operator == "*":
            self.spend(_times(left, right) + _times(right, left))
        elif operator == "+":
            self.spend(size_of(left, self._left) + size_of(right, self._left))
        elif operator == "%" and isinstance(left, str):
            self.spend(_formatted(left, right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.spend(left.bit_length() * max(right, 0))
        made = super().call_binop(context, operator, left, right)
        _require_small(made)
        return made

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template, and spend its cost and the size of its result."""
        # the sandbox wraps str.format into its own function
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, _SIZED):
            self.spend(len(owner))
        if isinstance(owner, str):
            name = getattr(function, "__name__", "")
            if name == "join" and args and not isinstance(args[0], _SIZED):
                args = (list(self._each(args[0])), *args[1:])
            self.spend(_cost(name, owner, args, kwargs))
        return self.made(super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an entry, or a slice, whose size is spent."""
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

    def _spending(self, name: str, function: Callable[..., Any], is_test: bool = False) -> Callable[..., Any]:
        takes_first = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def spending(*args: Any, **kwargs: Any) -> Any:
            value, *further = args[1:] if takes_first else args
            if name == "join" and not isinstance(value, (str, list, tuple)):
                value = list(self._each(value))
                args = (args[0], value, *further) if takes_first else (value, *further)
            if is_test:
                self.spend(size_of([value, *further], self._left) if name in _COMPARING else 0)
            else:
                self.spend(len(value) if isinstance(value, _SIZED) and name not in _WITHOUT_READING else 0)
                self.spend(_cost(name, value, further, kwargs))
            made = function(*args, **kwargs)
            return made if isinstance(made, Iterator) else self.made(made)

        return spending


class _Counting(NodeTransformer):
    """Wraps filters that spend steps around those parts of a template that are neither calls nor filters."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802 (as Jinja calls it)
        _require_small(node.value)
        return node

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
    """Return the size of a value in steps.

    A text has one step per character, a list or object ten per entry plus the sizes of its entries, and any other value
    0. Counting stops above `most`, as nested lists that share their entries can be huge while they are small in memory.
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


def _require_small(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise OverflowError(f"an integer of {value.bit_length()} bits")


def _times(value: Any, count: Any) -> int:
    return size_of(value) * count if isinstance(value, (str, list, tuple)) and isinstance(count, int) else 0


def _formatted(text: str, values: Any) -> int:
    """Return a bound on the size of a formatted text; widths are numbers in it or, for a `*`, among the values."""
    widths = sum(int(number) for number in _NUMBER.findall(text))
    given = values if isinstance(values, tuple) else (values,)
    widths += sum(abs(value) for value in given if isinstance(value, int)) if "*" in text else 0
    return len(text) + widths + (text.count("%") + text.count("{")) * size_of(values)


def _takes_width(text: str) -> bool:
    """Return whether `str.format` would read a width from its arguments, as in `{:{}}`."""
    try:
        return any("{" in spec for _, _, spec, _ in Formatter().parse(text) if spec)
    except ValueError:
        return False  # Python refuses this text too


def _cost(name: str, value: Any, args: Any, kwargs: dict[str, Any]) -> float:
    """Return the steps for the result of a filter or string method, as far as it can be larger than the arguments."""
    given = [*args, *kwargs.values()]
    numbers = sum(abs(one) for one in given if isinstance(one, int))
    longest = max((len(one) for one in given if isinstance(one, str)), default=0)
    if name == "round":
        # some of its methods multiply by 10 to the power of the precision, whatever the value is
        return 4 * numbers + size_of(value) * 10.0 ** min(numbers, 9)
    if name == "sum" and any(isinstance(one, (list, tuple)) for one in given):
        return size_of(value) * (len(value) if isinstance(value, _SIZED) else 1)
    if not isinstance(value, str):
        if name == "join":
            return longest * (len(value) if isinstance(value, (list, tuple)) else 1)
        return numbers * size_of(value) if name == "tojson" else numbers if name in ("batch", "slice") else 1
    match name:
        case "replace" | "join":
            old = given[0] if given and isinstance(given[0], str) else ""
            num_joined = max((len(one) for one in given if isinstance(one, _SIZED)), default=0)
            return len(value) * max(longest, num_joined) if name == "join" else value.count(old) * longest
        case "urlize":
            return len(value) * longest
        case "indent" | "wordwrap" | "expandtabs":
            num_places = value.count("\t" if name == "expandtabs" else "\n") + 1
            return num_places * numbers + (len(value) if name == "wordwrap" else num_places) * longest
        case "center" | "ljust" | "rjust" | "zfill":
            return numbers
        case "format" | "format_map":
            return float("inf") if _takes_width(value) else _formatted(value, tuple(given))
    return 1
