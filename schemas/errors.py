"""The exceptions for every error that a user can cause.

The command line turns a :class:`CapgapError` into one line on stderr and the class's exit code: 2 for what the user can
correct in the run file or its inputs, 3 for the machine, 4 for damaged data. A message says what is wrong, where, what
was found, what was expected, and what to do about it. It contains no credential and no control character.
"""

from __future__ import annotations

from collections.abc import Sequence

from capgap.schemas.printable import fit_to_show


class CapgapError(Exception):
    """Base class of all errors that a user can cause and correct.

    Args:
        what: the fault in a few words.
        where: the setting, file or record at fault, as the user knows it.
        found: the value or state that is there now.
        expected: the value or state that should be there.
        fix: what to do, as an instruction.
    """

    exit_code = 2
    already_said = False

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self._one_line())

    def _one_line(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        if self.found is not None:
            text += f"; found {self.found}"
        if self.expected is not None:
            text += f"{';' if self.found is None else ','} expected {self.expected}"
        if self.fix is not None:
            text += f"; {self.fix}"
        return fit_to_show(" ".join(text.split()))


class SettingError(CapgapError):
    """A setting of the run file or a flag cannot be used."""


class SettingsError(SettingError):
    """Several settings cannot be used; the message has one line for each.

    Args:
        problems: one error for each setting.
    """

    def __init__(self, problems: Sequence[SettingError]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, problems)))

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class InputError(CapgapError):
    """A file, folder, document or model that a stage reads cannot be used."""


class BadRecordError(InputError):
    """One record of a source cannot be used. The other records can, so that it may be skipped."""


class MismatchError(CapgapError):
    """Two inputs do not fit together, for example two tokenizers, or a cache and its corpus."""


class CorruptError(CapgapError):
    """Bytes on disk differ from what the manifest says about them."""

    exit_code = 4


class MachineError(CapgapError):
    """The machine lacks something: a package, disk space, a free device, the network."""

    exit_code = 3
