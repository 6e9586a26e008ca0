"""Reads parquet files that somebody else may have written, in bounded memory.

    for value, row in cells(path, "text"): ...     # one column, row by row
    rows = table(path)                             # all columns, in memory; rows[3] is a dict

Parquet packs: a page of a few bytes can unpack to 2 GB, a dictionary holds a long value once for any number of rows,
and a list of empty lists takes next to nothing. So before pyarrow decodes a row group, the headers of its pages are
read (Thrift's compact protocol, https://parquet.apache.org/docs/file-format/). What they state decides how many rows
are decoded at once, and what is beyond the limits below is refused.
"""

from __future__ import annotations

import bisect
import itertools
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, overload

from gptfast import untrusted

FOOTER_BYTES = 2**22  # in pyarrow's memory 240 times as many
COLUMNS = 2**10
PAGE_BYTES = 2**27  # unpacked, of the largest pages of all columns together
LISTED_VALUES = 2**25  # of a column with lists in it, in one row group
ROWS_AT_ONCE = 64  # fewer where values are long
BATCH_BYTES, BATCH_VALUES = 2**26, 2**20  # of that many rows, decoded
TABLE_BYTES, TABLE_ROWS = 2**29, 2**24  # of a file that is held in memory
HEADER_BYTES = 2**24  # as pyarrow
DATA, DICTIONARY, DATA_2 = 0, 2, 3  # kinds of pages
ABOUT, ENCODINGS = (
    {DATA: 5, DATA_2: 8},
    {DATA: 2, DATA_2: 4},
)  # fields of their headers: what is of this kind, and in it
DELTA_BYTE_ARRAY = 7  # an encoding in which a value repeats the beginning of the one before
# Types of Thrift's compact protocol.
TRUE, FALSE, BYTE, I16, I32, I64, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12
FIXED, BITS = {BYTE: 1, 7: 8, 13: 16}, {I16: 16, I32: 32, I64: 64}
LISTS_OF_FOOTER = {  # of parquet.thrift: schema, row groups, their columns and what is known of these, and others
    (2,): STRUCT, (4,): STRUCT, (5,): STRUCT, (7,): STRUCT, (4, 1): STRUCT, (4, 4): STRUCT, (4, 1, 3, 2): I32,
    (4, 1, 3, 3): BINARY, (4, 1, 3, 8): STRUCT, (4, 1, 3, 13): STRUCT, (4, 1, 3, 16, 2): I64, (4, 1, 3, 16, 3): I64,
    (4, 1, 3, 17, 2): I32,
}  # fmt: skip


class Leaf(NamedTuple):
    """A column as parquet stores it: what is nested has several."""

    number: int
    path: str
    has_lists: bool
    is_bytes: bool  # texts and bytes, of any length
    width: int  # bytes of a value of fixed length, else 0


class Chunk(NamedTuple):
    """Where the pages of a leaf in one row group are."""

    start: int
    size: int
    values: int


class Group(NamedTuple):
    """A row group: a chunk for each leaf."""

    rows: int
    chunks: list[Chunk]


class Pages(NamedTuple):
    """What the pages of a leaf in one row group can unpack to."""

    largest: int  # bytes of the largest data page and the dictionary
    dictionary: int  # bytes of it
    delta: int  # bytes of the largest page whose values repeat parts of others
    values: int  # in all of them


# ---- reading


class NoColumn(Exception):
    """A file has no column of the name that was asked for, but `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def cells(path: str | Path, name: str, first: int = 0) -> Iterator[tuple[Any, int]]:
    """Yields (value, row) of the column `name`, from row `first` on.

    Raises NoColumn, OSError, and ValueError or one of pyarrow's errors for what cannot be read.
    """
    with _opened(path) as (file, parquet):
        names = parquet.schema_arrow.names
        if name not in names:
            raise NoColumn(names)
        leaves = [leaf for leaf in _leaves(parquet) if leaf.path.partition(".")[0] == name or leaf.path == name]
        if [leaf.path for leaf in leaves] != [name] or leaves[0].has_lists:
            raise ValueError(f"{name} is no text but {str(parquet.schema_arrow.field(name).type)[:80]}")
        row = 0
        for number, group in enumerate(_groups(file, len(parquet.schema))):
            if row + group.rows <= first:
                row += group.rows
                continue
            for batch in parquet.iter_batches(_rows_at_once(file, group, leaves), [number], [name]):
                for value in batch.column(0):
                    if row >= first:
                        yield value.as_py(), row
                    row += 1


class Table(Sequence[dict[str, Any]]):
    """The rows of a file: a row becomes objects of Python's when it is asked for."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = [batch for batch in batches if len(batch)]
        self._ends = list(itertools.accumulate(map(len, self._batches)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        number = bisect.bisect_right(self._ends, i)
        batch = self._batches[number]
        (row,) = batch.slice(i - self._ends[number] + len(batch), 1).to_pylist()
        return dict(row)


def table(path: str | Path) -> Table:
    """Returns all rows of a file. Raises OSError, and ValueError or one of pyarrow's errors for what cannot be read."""
    import pyarrow

    with _opened(path) as (file, parquet):
        leaves, schema, rows = _leaves(parquet), parquet.schema_arrow, parquet.metadata.num_rows
        if rows > TABLE_ROWS:
            raise ValueError(f"it has {rows:,} rows, where {TABLE_ROWS:,} are the most")
        # A row can have any number of values in a list, so each different one is decoded once, until they are counted.
        once = [leaf.path for leaf in leaves if leaf.has_lists and leaf.is_bytes]
        counted = _parquet(file, metadata=parquet.metadata, read_dictionary=once)
        batches: list[Any] = []
        held = 0
        for number, group in enumerate(_groups(file, len(parquet.schema))):
            for batch in counted.iter_batches(_rows_at_once(file, group, leaves), [number]):
                _check_objects(batch.columns)
                batches += pyarrow.Table.from_batches([batch]).cast(schema).to_batches()
                held += sum(column.nbytes for column in batches[-1].columns)
                if held > TABLE_BYTES:
                    raise ValueError(f"it unpacks to more than {TABLE_BYTES:,} bytes, which are held in memory")
        return Table(batches)


def count(path: str | Path) -> int:
    """Returns the number of rows that a file states; raises what `table` raises."""
    if os.path.getsize(path) == 0:  # as left by a writer without rows
        return 0
    with _opened(path) as (_, parquet):
        return int(parquet.metadata.num_rows)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[BufferedReader, Any]]:
    """Opens a file: its bytes, and as a pyarrow.parquet.ParquetFile."""
    with untrusted.opened(path) as file:
        _footer(file)
        parquet = _parquet(file)
        if not 0 < parquet.metadata.num_columns <= COLUMNS:
            raise ValueError(f"it has {parquet.metadata.num_columns:,} columns, where {COLUMNS:,} are the most")
        yield file, parquet


def _parquet(file: BufferedReader, **more: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(f"/dev/fd/{file.fileno()}", pre_buffer=False, buffer_size=2**20, **more)


def _leaves(parquet: Any) -> list[Leaf]:
    columns = [parquet.schema.column(i) for i in range(len(parquet.schema))]
    return [
        Leaf(i, each.path, each.max_repetition_level > 0, each.physical_type == "BYTE_ARRAY", max(each.length or 0, 0))
        for i, each in enumerate(columns)
    ]


# ---- limits


def _rows_at_once(file: BufferedReader, group: Group, leaves: Sequence[Leaf]) -> int:
    """Returns how many rows of a group may be decoded at once. Raises ValueError where even one would be too much."""
    unpacked = longest = 0
    for leaf in leaves:
        chunk = group.chunks[leaf.number]
        pages = _pages(file, chunk)
        unpacked += pages.largest
        value = max(pages.delta, leaf.width)  # bytes that one can have; those in a data page are counted as its bytes
        if not leaf.has_lists:
            longest += max(value, pages.dictionary)
            continue
        values = max(pages.values, chunk.values)
        if values > LISTED_VALUES:
            raise ValueError(f"{leaf.path} has {values:,} values in a row group, where {LISTED_VALUES:,} are the most")
        if value * values > BATCH_BYTES:
            raise ValueError(f"{leaf.path} can unpack to {value * values:,} bytes, where {BATCH_BYTES:,} are the most")
    if max(unpacked, longest) > PAGE_BYTES:
        raise ValueError(f"pages of it unpack to {max(unpacked, longest):,} bytes, where {PAGE_BYTES:,} are the most")
    return max(1, min(ROWS_AT_ONCE, BATCH_BYTES // max(longest, 1)))


def _check_objects(columns: Sequence[Any]) -> None:
    """Raises ValueError for rows that would take too much memory unpacked, as objects of Python's."""
    values, size = map(sum, zip(*[_objects(column) for column in columns], strict=True))
    for found, most, unit in ((values, BATCH_VALUES, "values"), (size, BATCH_BYTES, "bytes")):
        if found > most:
            raise ValueError(f"up to {ROWS_AT_ONCE} rows of it have {found:,} {unit}, where {most:,} are the most")


def _objects(array: Any) -> tuple[int, int]:
    """Returns how many values an array has, those in its lists and fields included, and the bytes of their text."""
    import pyarrow
    from pyarrow import compute, types

    kind, parts = array.type, list[Any]()
    if isinstance(array, pyarrow.ExtensionArray):
        return _objects(array.storage)
    if types.is_struct(kind):
        parts = array.flatten()
    elif types.is_map(kind):
        parts = [array.keys, array.items]  # of the whole buffer; a batch that was just decoded has no other
    elif types.is_nested(kind):
        parts = [compute.list_flatten(array)]
    if types.is_dictionary(kind) and not types.is_primitive(kind.value_type):
        lengths = compute.fill_null(compute.binary_length(array.dictionary), 0).cast("int64")
        size = compute.sum(lengths.take(array.indices)).as_py() or 0
    else:
        size = array.nbytes if not parts else 0
    counts = [_objects(part) for part in parts]
    return len(array) + sum(values for values, _ in counts), size + sum(size for _, size in counts)


# ---- what the footer and the headers of pages state


def _groups(file: BufferedReader, leaves: int) -> list[Group]:
    """Returns the row groups of a file. Raises ValueError if their chunks are not one for each leaf.

    pyarrow's own objects for them end the process where some statistics are damaged.
    """
    footer = _footer(file)
    try:
        fields = Fields(footer, (I32, I64), LISTS_OF_FOOTER).struct()
        groups = [Group(group[3], [_chunk(column[3]) for column in group[1]]) for group in fields[4]]
    except (LookupError, TypeError, RecursionError):
        raise ValueError("its footer is damaged") from None
    if any(len(group.chunks) != leaves or group.rows < 0 or min(map(min, group.chunks)) < 0 for group in groups):
        raise ValueError("the row groups of its footer are damaged")
    return groups


def _chunk(about: dict[int, Any]) -> Chunk:
    start, dictionary = about[9], about.get(11, 0)
    return Chunk(dictionary if 0 < dictionary < start else start, about[7], about[5])


def _footer(file: BufferedReader) -> bytes:
    size = os.fstat(file.fileno()).st_size
    file.seek(-min(8, size), os.SEEK_END)
    length, end = struct.unpack("<I4s", file.read().rjust(8, b"\0"))
    if end != b"PAR1":
        raise ValueError("it does not end as a parquet file")
    if length > min(FOOTER_BYTES, size - 8):
        raise ValueError(f"its footer has {length:,} bytes, where {min(FOOTER_BYTES, size - 8):,} are the most")
    file.seek(-8 - length, os.SEEK_END)
    return file.read(length)


def _pages(file: BufferedReader, chunk: Any) -> Pages:
    """Reads the headers of the pages of a leaf in one row group. Raises ValueError if they are damaged."""
    at, end = chunk.start, chunk.start + chunk.size
    largest = dictionary = delta = seen = 0
    while at < end and seen < chunk.values:
        header, length = _header(file, at)
        kind, unpacked, packed = (_stated(header, number, at) for number in (1, 2, 3))
        at += length + packed
        if kind == DICTIONARY:
            dictionary = max(dictionary, unpacked)
            continue
        largest = max(largest, unpacked)
        if kind in ENCODINGS:
            about, encoding = header.get(ABOUT[kind]), ENCODINGS[kind]
            if not isinstance(about, dict):
                raise ValueError(f"the header of the page before byte {at:,} is damaged")
            seen += _stated(about, 1, at)
            if _stated(about, encoding, at) == DELTA_BYTE_ARRAY:
                delta = max(delta, unpacked)
    return Pages(largest + dictionary, dictionary, delta, seen)


def _stated(fields: dict[int, Any], number: int, at: int) -> int:
    """Returns a number of a page's header that must be there and cannot be negative."""
    value = fields.get(number)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"the header of the page at byte {at:,} is damaged")
    return value


def _header(file: BufferedReader, at: int) -> tuple[dict[int, Any], int]:
    """Returns the fields of the header of the page at a byte of a file, by their numbers, and its length in bytes."""
    size = 2**9
    while True:
        file.seek(at)
        content = file.read(size)
        try:
            fields = Fields(content, (I32,), {})
            return fields.struct(), fields.at
        except IndexError:  # it is longer
            if size >= HEADER_BYTES or len(content) < size:
                raise ValueError(f"there is no page at byte {at:,}") from None
            size *= 8
        except RecursionError:
            raise ValueError(f"the header of the page at byte {at:,} is nested too deep") from None


class Fields:
    """Reads a structure of Thrift's compact protocol just as Thrift's C++ does; IndexError where the bytes end before.

    `kinds`: of numbers to take. `lists`: of what the lists are that C++ knows, by the fields that lead to them.
    """

    def __init__(self, content: bytes, kinds: Sequence[int], lists: Mapping[tuple[int, ...], int]) -> None:
        self.content, self.kinds, self.lists, self.at = content, kinds, lists, 0

    def struct(self, path: tuple[int, ...] = ()) -> dict[int, Any]:
        """Returns its numbers, structures and known lists of structures, by field.

        A field of another kind than the one that is expected is passed over. Raises ValueError where C++ would not go
        by what the bytes say: it merges a structure that comes twice, and reads a list as what it should be of.
        """
        fields: dict[int, Any] = {}
        number = 0
        while byte := self._byte():
            kind, step = byte & 15, byte >> 4
            number = number + step if step else self._number(I16)
            here = (*path, number)
            value: Any = None
            if kind in self.kinds:
                value = self._number(kind)
            elif kind == STRUCT:
                value = self.struct(here)
            elif kind == LIST and here in self.lists:
                count, of = self._list()
                if of != self.lists[here] and count:
                    raise ValueError("a list of its footer is not what it should be of")
                if of == STRUCT:
                    value = [self.struct(here) for _ in range(count)]
                else:
                    self._skip_all(count, of)
            else:
                self._skip(kind)
            if value is not None:
                if number in fields:
                    raise ValueError("a field of its footer or of a page is there twice")
                fields[number] = value
        return fields

    def _list(self) -> tuple[int, int]:
        """Returns how many values a list has, and of which kind."""
        byte = self._byte()
        return self._varint() if byte >> 4 == 15 else byte >> 4, byte & 15

    def _skip_all(self, count: int, kind: int) -> None:
        """Passes over values in a list or map, where a truth has a byte of its own."""
        for _ in range(count):
            self._skip(BYTE if kind in (TRUE, FALSE) else kind)

    def _skip(self, kind: int) -> None:
        if kind in (TRUE, FALSE):
            return
        if kind in FIXED:
            self.at += FIXED[kind]
        elif kind in BITS:
            self._varint()
        elif kind == BINARY:
            length = self._varint()
            self.at += length
        elif kind in (LIST, SET):
            self._skip_all(*self._list())
        elif kind == MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            for _ in range(size):
                self._skip_all(1, kinds >> 4)
                self._skip_all(1, kinds & 15)
        elif kind == STRUCT:
            self.struct()
        else:
            raise ValueError("the header of a page is damaged")

    def _byte(self) -> int:
        byte = self.content[self.at]
        self.at += 1
        return byte

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("the header of a page is damaged")

    def _number(self, kind: int) -> int:
        """Returns a signed number, of which no more than the bits of its kind count."""
        value = self._varint() & (2 ** BITS[kind] - 1)
        return value >> 1 ^ -(value & 1)
