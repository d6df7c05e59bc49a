"""Parquet files of a table: inspected before any work, then cut into row groups of one block."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import is_remote, open_raw, open_seekable, stamp, words
from vinedresser.data.corpora.textfile import Facts, Span, listed, refuse_changed
from vinedresser.errors import DataError, MachineError

_TEXT = frozenset({pa.string(), pa.large_string(), pa.string_view()})


def rows(group: Span, source: str, target: str) -> Iterator[tuple[str | None, str | None]]:
    """Yield the cells of two columns in the row group `group.start` of a file."""
    with _reading(group.name):
        file = pq.ParquetFile(group.path, page_checksum_verification=True)
        table = file.read_row_group(group.start, columns=[source, target])
    yield from zip(table[source].to_pylist(), table[target].to_pylist(), strict=True)


def inspect_parquet(name: str, columns: Sequence[int | str]) -> Facts:
    """Read a file's schema and hash it; its rows are read when it is regrouped.

    Raises:
        DataError: it is no whole Parquet file, has no row, or not these columns as text.
    """
    before = stamp(name)
    with open_raw(name) as raw:
        while raw.read():
            pass
    with _reading(name), open_seekable(name) as path:
        file = pq.ParquetFile(path)
        schema, count = file.schema_arrow, file.metadata.num_rows
    for column in columns:
        if column not in schema.names:
            raise DataError(
                f"{name}: no column {column!r}; expected one of {listed(schema.names)}. Fix: "
                "name one of these as `source` and `target`"
            )
        if schema.names.count(column) > 1:
            raise DataError(f"{name}: several columns {column!r}; expected one. Fix: rename them")
        kind = schema.field(column).type
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in _TEXT:
            raise DataError(f"{name}: column {column!r} is {kind}; expected text")
    if not count:
        raise DataError(f"{name}: 0 rows; expected one pair per row")
    facts = Facts(name, count, raw.digest.hexdigest(), before)
    refuse_changed({name: before})
    return facts


def regrouped(facts: Facts, columns: Sequence[int | str], folder: Path) -> Facts:
    """Return a copy of these columns, as text, `BLOCK_ROWS` rows per row group.

    Raises:
        DataError: a page cannot be read, or a cell is no text.
    """
    path = folder / f"{facts.digest[:16]}.{len(list(folder.iterdir()))}.parquet"
    names = list(dict.fromkeys(map(str, columns)))  # one column may be both sides
    schema = pa.schema({name: pa.large_string() for name in names})
    with (
        _reading(facts.name),
        open_seekable(facts.name) as source,
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
    ):
        held, size, done = list[pa.Table](), 0, 0
        file = pq.ParquetFile(source, page_checksum_verification=True)
        for batch in file.iter_batches(row.BLOCK_ROWS, columns=names):
            cells = [batch[name].cast(pa.large_string()) for name in names]
            for name, column in zip(names, cells, strict=True):
                _refuse_no_text(facts.name, name, column, done)
            held.append(pa.table(cells, schema=schema))
            size, done = size + len(batch), done + len(batch)
            while size >= row.BLOCK_ROWS:
                whole = pa.concat_tables(held)
                writer.write_table(whole.slice(0, row.BLOCK_ROWS))
                held = [whole.slice(row.BLOCK_ROWS)]
                size -= row.BLOCK_ROWS
        if size:
            writer.write_table(pa.concat_tables(held))
    return replace(facts, copy=str(path))


def _refuse_no_text(name: str, column: str, cells: pa.Array, before: int) -> None:
    """Refuse text that is not UTF-8 or holds NUL: writers of Parquet need not check it."""
    try:
        cells.validate(full=True)
        has_nul = pc.any(pc.match_substring(cells, "\0")).as_py()
    except pa.ArrowInvalid:
        has_nul = True
    if not has_nul:
        return
    for number, cell in enumerate(cells.cast(pa.large_binary()).to_pylist(), before + 1):
        place = f"{name}: row {number}, column {column!r}"
        try:
            is_bad = "\0" in (cell or b"").decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}, byte {error.start + 1}: invalid UTF-8 byte 0x{cell[error.start]:02x}; "
                "expected UTF-8. Fix: write the file anew from text"
            ) from None
        if is_bad:
            raise DataError(f"{place}: holds NUL; expected text")


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a disk's, also of the copy
            raise
        if isinstance(error, OSError) and is_remote(name):
            raise MachineError(
                f"{name}: the object storage does not answer ({words(error)})"
            ) from None
        # OSError is pyarrow's word for a page that cannot be unpacked.
        raise DataError(f"{name}: not a whole Parquet file ({words(error)})") from None
