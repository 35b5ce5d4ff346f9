"""Files of a stranger's model that other libraries read: whatever those make of nonsense in them is an error of input.

transformers believes that a configuration holds what its own writer wrote. A list in the place of a dictionary, a
number in the place of a name, brackets thousands deep and a size of zero come out of it as what Python or Rust raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from capgap.schemas.errors import InputError

# No RuntimeError but that of recursion: among them are those of a device and of its memory.
_OF_CONTENTS = (
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    StrictDataclassError,
)


@contextmanager
def contents_of(what: str, where: str | Path, expected: str) -> Iterator[None]:
    """Within it, what a library raises over the contents of a model's files is raised as InputError.

    What it says of files that are missing, and of the network and the machine, is left to the caller.

    Args:
        what: the fault in a few words.
        where: folder or id.
        expected: the files that should hold something else.

    Raises:
        InputError: a file holds what the library cannot use.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, _OF_CONTENTS) or is_of_rust(error)):
            raise
        raise InputError(
            what,
            where=where,
            found=f"{type(error).__name__}: {first_line(error)}",
            expected=expected,
            fix="download the files again, or use another model",
        ) from None


def is_of_rust(error: BaseException) -> bool:
    """Whether the tokenizers library raised it: an Exception of no kind, or a panic, which is no Exception at all."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """What an error says first, or its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # one that announces what follows says nothing by itself
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
