"""Turn the errors that libraries raise over nonsense in a given model's files into an InputError.

transformers assumes that a configuration has the form that its own writer gives it. Where a list takes the place of a
dictionary, a number takes that of a name, brackets nest thousands deep, or a size is zero, it raises some error of
Python or Rust.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from capgap.schemas.errors import InputError

# RecursionError is the only RuntimeError here, as other ones come from a device or its memory.
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
    """Within this context, raise InputError for what a library raises over the contents of a model's files.

    Errors about missing files, the network and the machine are left to the caller.

    Args:
        what: the fault in a few words.
        where: the model's folder or id.
        expected: what the files should hold.

    Raises:
        InputError: a file has contents that the library cannot use.
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
    """Return whether the tokenizers library raised the error: a plain Exception, or a panic, which is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # a first line that ends with a colon says nothing without the next one
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
