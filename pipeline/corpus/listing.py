"""Lists the sources and cuts them into units; every process of a stage finds the same list.

    sources --> files, with sizes and versions --> parts: byte ranges of lines, row groups, whole files
            --> units of about `corpus.unit_bytes`, each of which is made independently

Only file sizes and the footers of Parquet files are read for the list. A part of a file of lines is a range of bytes,
and it holds the lines that begin within this range.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.corpus.amounts import source_texts
from capgap.pipeline.corpus.bad_records import in_section
from capgap.pipeline.corpus.files import BUILTIN, places_by_source
from capgap.pipeline.corpus.formats import Span
from capgap.pipeline.corpus.kinds import LINE_SUFFIXES, Place, is_packed, kind_of
from capgap.pipeline.corpus.places import state_of
from capgap.pipeline.corpus.records import fields_read
from capgap.pipeline.corpus.sources import builtin_bytes
from capgap.pipeline.corpus.tables import row_groups
from capgap.pipeline.store import is_url
from capgap.schemas.base import Entry
from capgap.schemas.errors import InputError
from capgap.schemas.run_corpus import CorpusSettings


class ListedFile(Entry):
    """One file of the sources."""

    path: str
    """Path, URL, or the name of the builtin text."""

    source: int
    """Number of the source that names the file."""

    num_bytes: int
    """Size in bytes at the time of listing."""

    version: str
    """Modification time or tag of the content at the time of listing; empty if there is none."""

    @property
    def place(self) -> Place:
        """Path or URL of the file, or the name of the builtin text."""
        return self.path if self.path == BUILTIN or is_url(self.path) else Path(self.path)

    def require_same(self) -> None:
        """Raise InputError if the file is gone, or if its size or version changed since it was listed."""
        if self.path == BUILTIN:
            return
        num_bytes, version = state_of(self.place, fresh=True)
        if (num_bytes, version) != (self.num_bytes, self.version):
            raise InputError(
                "the file changed since the sources were listed",
                where=self.path,
                found=f"{num_bytes:,} bytes" if num_bytes != self.num_bytes else "another time of modification",
                expected=f"{self.num_bytes:,} bytes" if num_bytes != self.num_bytes else "the same",
                fix="make the corpus again with --remake corpus when the file is finished",
            )


class FilePart(Entry):
    """What a unit reads of one file."""

    file: int
    """Number of the file in the listing."""

    num_bytes: int
    """Size of the part in bytes, by which units are filled and progress is counted."""

    start: int | None = None
    """First byte of a file of lines, or row group of a Parquet file; None if the file is read whole."""

    end: int = 0
    """Byte or row group at which the part ends; it is not part of it."""

    first_row: int = 0
    """Number of rows before the part in a Parquet file."""

    @property
    def span(self) -> Span | None:
        """The part of the file as a `Span`; None for a whole file."""
        return None if self.start is None else Span(self.start, self.end, self.first_row)


class Listing(Entry):
    """All text that a corpus reads."""

    files: tuple[ListedFile, ...]
    """All files, in the order of the sources."""

    units: tuple[tuple[FilePart, ...], ...]
    """What each unit reads, in the order in which the units stand in the corpus."""

    shares: tuple[float, ...]
    """For each source, the share of its documents that is taken, from 0 to 1."""

    @property
    def unit_bytes(self) -> list[int]:
        """The size of each unit in bytes."""
        return [sum(part.num_bytes for part in unit) for unit in self.units]

    def source_of(self, unit: int) -> int:
        """Return the number of a unit's source; in a mixture, all files of a unit are of one source."""
        return self.files[self.units[unit][0].file].source


def list_units(settings: CorpusSettings) -> Listing:
    """List the files of the sources, and cut them into units.

    Raises:
        InputError: a source names nothing, a file of an unknown kind, or a damaged Parquet file; or two sources of a
            mixture name the same text.
        MachineError: the client for a URL is not installed.
    """
    files: list[ListedFile] = []
    # each source of a mixture has units of its own; a plain list of sources is read as one source
    units: list[list[list[FilePart]]] = [[]]
    room = 0
    places = places_by_source(settings)
    for number, (_, source) in enumerate(settings.named_sources):
        fields = fields_read(source.text_field or settings.text_field, settings.messages_field)
        if settings.mixture and number:
            units.append([])
            room = 0
        for place in places[number]:
            files.append(_listed(place, number))
            for part in _parts(len(files) - 1, files[-1], fields, settings.unit_bytes, room):
                if room <= 0:
                    units[-1].append([])
                    room = settings.unit_bytes
                units[-1][-1].append(part)
                room -= part.num_bytes
    is_weighed = any(source.weight is not None for _, source in settings.named_sources)
    shares = source_texts(settings)[1] if is_weighed else [1.0] * len(settings.named_sources)
    return Listing(files=tuple(files), units=tuple(map(tuple, _mixed(units))), shares=tuple(shares))


def _listed(place: Place, source: int) -> ListedFile:
    if place == BUILTIN:
        num_bytes, version = builtin_bytes(), ""
    else:
        num_bytes, version = state_of(place)
    return ListedFile(path=str(place), source=source, num_bytes=num_bytes, version=version)


def _parts(number: int, file: ListedFile, fields: tuple[str, ...], most: int, room: int) -> Iterator[FilePart]:
    kind = kind_of(file.place)
    if kind in LINE_SUFFIXES and not is_packed(file.place) and file.num_bytes > max(room, 0):
        start = 0
        while start < file.num_bytes:
            end = min(file.num_bytes, start + (room if room > 0 else most))
            yield FilePart(file=number, num_bytes=end - start, start=start, end=end)
            start, room = end, 0
    elif kind == ".parquet":
        first_row = 0
        try:
            groups = row_groups(file.place, fields)
        except InputError as error:
            raise in_section(error, "corpus") from None
        for group, (num_rows, num_bytes) in enumerate(groups):
            yield FilePart(file=number, num_bytes=num_bytes, start=group, end=group + 1, first_row=first_row)
            first_row += num_rows
    else:
        yield FilePart(file=number, num_bytes=file.num_bytes)


def _mixed(units: list[list[list[FilePart]]]) -> list[list[FilePart]]:
    """Order the units so that those of each source are spread evenly, and any beginning of the corpus is mixed too."""
    places = [
        ((number + 0.5) / len(own), source, unit) for source, own in enumerate(units) for number, unit in enumerate(own)
    ]
    return [unit for _, _, unit in sorted(places, key=lambda one: one[:2])]
