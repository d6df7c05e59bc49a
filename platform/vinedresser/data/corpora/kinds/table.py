"""Tables as a corpus: both sides of a pair in one row of TSV, JSON lines or Parquet."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vinedresser.config.corpus import CorpusConfig, Files, names_of
from vinedresser.config.task import Task
from vinedresser.data.corpora import parquet
from vinedresser.data.corpora.corpus import Corpus, line_of_file, together
from vinedresser.data.corpora.inputs import expand, is_remote, read_range, stamp
from vinedresser.data.corpora.row import Block, Row, RowCounts
from vinedresser.data.corpora.textfile import (
    Facts,
    Span,
    changed,
    half_character,
    inspect_each,
    inspect_text,
    lines_of,
    listed,
    unpacked,
)
from vinedresser.errors import DataError

# A column's name, or its number from 1 as in `cut -f`.
Column = Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)]


class TableCorpus(CorpusConfig):
    """Both sides in one file, one pair per row: TSV, JSON lines or Parquet.

    A TSV whose columns are named has a header line; one whose columns are numbered has none.
    """

    kind: Literal["table"]
    train: Files
    dev: Files
    test: Files | None = None
    source: Column
    target: Column
    # `auto`: Parquet by its first bytes, JSON lines by .jsonl, .ndjson or .json; else TSV.
    format: Literal["auto", "tsv", "jsonl", "parquet"] = "auto"

    def open(self, task: Task) -> "Table":
        """See `CorpusConfig.open`."""
        return Table(self, task)


_JSON_NAMES = (".jsonl", ".ndjson", ".json")
_PACKED_NAMES = (".gz", ".gzip", ".zst", ".zstd")


@dataclass(frozen=True)
class Form:
    """Form of the rows of one file.

    Attributes:
        kind: tsv, jsonl or parquet.
        columns: of source and target: 0-based numbers of a TSV, else names.
        width: columns of each row of a TSV; 0 for others.
        header: lines before the first row.
    """

    kind: str
    columns: tuple[int | str, int | str]
    width: int = 0
    header: int = 0


@dataclass(frozen=True)
class TablePart:
    """Some rows of one file.

    `span` is whole lines, or for Parquet the row group `span.start` of the path; `skip` counts
    header lines at its beginning.
    """

    span: Span
    form: Form
    skip: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.span.count - self.skip

    def cells(self) -> Iterator[tuple[str | None, str | None]]:
        """Yield source and target of each row."""
        source, target = self.form.columns
        if self.form.kind == "parquet":
            yield from parquet.rows(self.span, str(source), str(target))
            return
        for line in self.span.lines()[self.skip :]:
            fields: Any = line.split("\t") if self.form.kind == "tsv" else json.loads(line)
            if self.form.kind == "tsv" and len(fields) != self.form.width:
                raise changed(self.span.name)
            yield fields[source], fields[target]


@dataclass(frozen=True)
class TableBlock(Block):
    """Rows of one or several files.

    `first` is the number of raw rows of the split before it.
    """

    first: int
    parts: tuple[TablePart, ...]

    def rows(self, counts: RowCounts) -> Iterator[Row]:
        """Yield all its rows; a cell without a value counts as empty."""
        counts.rows_in += self.count
        cells = itertools.chain.from_iterable(part.cells() for part in self.parts)
        for line, (source, target) in enumerate(cells, self.first + 1):
            yield Row(source or "", target or "", line)


class Table(Corpus):
    """A `TableCorpus` whose files exist and whose every row has both columns."""

    is_parallel = True

    def __init__(self, corpus: TableCorpus, task: Task) -> None:
        del task
        self._corpus = corpus
        named = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
        self._files = {
            split: expand(names_of(files)) for split, files in named.items() if files is not None
        }
        self.splits = tuple(self._files)
        self._forms: dict[str, Form] = {}
        every = [name for files in self._files.values() for name in files]
        super().__init__(inspect_each(every, self._inspect))

    def _inspect(self, name: str) -> Facts:
        corpus, kind = self._corpus, str(self._corpus.format)
        stamp(name)  # report a file that cannot be opened
        if kind == "auto":
            plain = name.partition("?")[0] if is_remote(name) else name
            for suffix in _PACKED_NAMES:
                plain = plain.removesuffix(suffix)
            kind = "jsonl" if plain.endswith(_JSON_NAMES) else "tsv"
            if read_range(name, 0, 4) == b"PAR1":
                kind = "parquet"
        form = Form(kind, (corpus.source, corpus.target))
        if kind == "parquet":
            facts = parquet.inspect_parquet(name, form.columns)
        elif kind == "tsv":
            form = _form_of_tsv(name, corpus)
            facts = inspect_text(name, partial(_check_tsv, form, corpus))
        else:
            facts = inspect_text(name, partial(_check_jsonl, form))
        if facts.lines <= form.header:
            raise DataError(f"{name}: a header and no row")
        self._forms[name] = form
        return facts

    def content(self) -> Any:
        """Return the columns, and the digests of every split's files."""
        plain = self._corpus.to_json()
        for split in ("train", "dev", "test"):
            plain[split] = [self.digests[name] for name in self._files.get(split, [])]
        plain["format"] = sorted({form.kind for form in self._forms.values()})
        return plain

    def blocks(self, split: str) -> Iterator[TableBlock]:
        """Yield blocks over all files of a split; of Parquet files once they are unpacked."""
        parts = list[TablePart]()
        for name in self._files[split]:
            facts, form = self._facts[name], self._forms[name]
            if form.kind != "parquet":
                spans = facts.spans()
            else:  # a span is a row group
                spans = [Span(facts.copy, name, i, i + 1, n) for i, n in enumerate(facts.counts)]
            headers = [form.header, *[0] * len(spans)]
            parts += [
                TablePart(span, form, skip) for span, skip in zip(spans, headers, strict=False)
            ]
        for number, first, count, chosen in together([part.count for part in parts]):
            yield TableBlock(split, number, count, first, tuple(parts[chosen]))

    def unpack(self, folder: Path) -> None:
        """Unpack archives, and cut Parquet into row groups of one block each."""
        for name, facts in self._facts.items():
            if self._forms[name].kind == "parquet":
                columns = self._forms[name].columns
                self._facts[name] = parquet.regrouped(facts, columns, folder)
            else:
                self._facts[name] = unpacked(facts, folder)

    def place(self, split: str, line: int) -> str:
        """Return the row, with its file where there are several."""
        names = self._files[split]
        files = [(name, self._facts[name].lines - self._forms[name].header) for name in names]
        return line_of_file(files, line)


def _form_of_tsv(name: str, corpus: TableCorpus) -> Form:
    """Return the columns of a TSV: numbers as they are, names out of its first line."""
    try:
        first = next(lines_of(name), "")
    except DataError:
        first = ""  # `inspect_text` reports the problem
    fields = first.split("\t")
    wanted = (corpus.source, corpus.target)
    if isinstance(wanted[0], int) and isinstance(wanted[1], int):
        return Form("tsv", (wanted[0] - 1, wanted[1] - 1), len(fields))
    places = []
    for column in wanted:
        if isinstance(column, int):
            places.append(column - 1)
        elif fields.count(column) > 1:
            raise DataError(
                f"{name}:1:1: several columns {column!r}; expected one. Fix: number the columns "
                "from 1, without the header line"
            )
        elif column in fields:
            places.append(fields.index(column))
        else:
            raise DataError(
                f"{name}:1:1: no column {column!r}; expected a header line with it, found "
                f"{listed(fields)}. Fix: name one of these, or number the columns from 1"
            )
    return Form("tsv", (places[0], places[1]), len(fields), header=1)


def _check_tsv(form: Form, corpus: TableCorpus, number: int, text: bytes) -> Iterable[str]:
    need = max(int(column) for column in form.columns) + 1
    for line, cells in enumerate(text.removesuffix(b"\n").split(b"\n"), number):
        tabs = cells.count(b"\t")
        if tabs + 1 == form.width >= need:
            continue
        column = len(b"\t".join([*cells.split(b"\t"), b""][: form.width])) + 1
        yield (
            f"{line}:{min(column, len(cells) + 1)}: {tabs + 1} columns; expected "
            f"{max(form.width, need)}, tab-separated, with source {corpus.source!r} and target "
            f"{corpus.target!r}"
        )


def _check_jsonl(form: Form, number: int, text: bytes) -> Iterable[str]:
    for line, raw in enumerate(text.removesuffix(b"\n").split(b"\n"), number):
        if problem := _problem_of_json(raw, form):
            yield f"{line}:{problem}"


def _problem_of_json(raw: bytes, form: Form) -> str:
    """Return `column: problem` of a line of JSON, or ""."""
    wanted = f"expected an object with the keys {form.columns[0]!r} and {form.columns[1]!r}"
    try:
        found = json.loads(raw)
    except json.JSONDecodeError as error:
        return f"{error.colno}: not JSON ({error.msg}); {wanted}"
    except (RecursionError, ValueError) as error:
        # Python turns no number of more than 4,300 digits into an integer.
        is_deep = isinstance(error, RecursionError)
        return f"1: {'nested too deeply' if is_deep else 'a number of too many digits'}; {wanted}"
    if not isinstance(found, dict):
        return f"1: {type(found).__name__}; {wanted}"
    for key in form.columns:
        value = found.get(str(key), ...)
        if value is ...:
            return f"1: no key {key!r}, found {listed(found)}; {wanted}"
        if value is not None and not isinstance(value, str):
            return f"1: {key!r} is {type(value).__name__}; expected text"
        if half := half_character(value or ""):
            column = max(1, raw.lower().find(b"\\u" + half[1][2:].lower().encode()) + 1)
            return (
                f"{column}: {key!r}, character {half[0]}: {half[1]} is half a character; expected "
                "text that UTF-8 can hold"
            )
        if "\0" in (value or ""):
            return f"1: {key!r} holds NUL; expected text"
    return ""
