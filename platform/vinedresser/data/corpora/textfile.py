r"""A UTF-8 text file: checked whole before any work, then read in parts by any process.

Only "\n" ends a line. Python's `splitlines` also breaks at U+2028, \x0b, \x85 and others, which
shifts one side of a parallel corpus against the other without an error.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import (
    Codec,
    RawFile,
    codec_of,
    head_of,
    lines_in,
    open_raw,
    pieces_of,
    read_range,
    stamp,
    unpack,
)
from vinedresser.errors import DataError

MAX_PROBLEMS = 20
_BOM = b"\xef\xbb\xbf"
# `surrogateescape` maps each undecodable byte to one of these; valid UTF-8 cannot contain them.
_BAD_BYTE = re.compile("[\udc80-\udcff]")
# First bytes -> what the file is, and the command that makes text of it. UTF-32 before UTF-16,
# whose mark it begins with.
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32", "iconv -f UTF-32 -t UTF-8 {0} > {0}.utf8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "iconv -f UTF-32 -t UTF-8 {0} > {0}.utf8"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > {0}.utf8"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 {0} > {0}.utf8"),
    (b"PK\x03\x04", "zip", "unzip {0}"),
    (b"BZh", "bzip2", "bunzip2 -k {0}"),
    (b"\xfd7zXZ", "xz", "unxz -k {0}"),
    (b"PAR1", "Parquet", "name it in a corpus of `kind: table`"),
)


@dataclass(frozen=True)
class Facts:
    """What a whole pass over a file found.

    Attributes:
        name: the file.
        lines: how many, the last one with or without a line feed.
        digest: SHA-256 in hex of its bytes as they lie there.
        stamp: size in bytes and modification time in ns; differs once the file was touched.
        notes: harmless oddities, one line each.
        marks: byte offsets into the text: of line 0 (behind a byte order mark), of each
            `BLOCK_ROWS`-th line after it, and of the end.
        codec: how it is compressed.
        copy: the unpacked copy to read from, where there is one.
    """

    name: str
    lines: int
    digest: str
    stamp: tuple[int, int]
    notes: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()
    codec: Codec | None = None
    copy: str = ""

    @property
    def counts(self) -> list[int]:
        """Lines between neighbouring marks."""
        step = row.BLOCK_ROWS
        return [min(step, self.lines - at) for at in range(0, self.lines, step)]

    def spans(self) -> list["Span"]:
        """Return the text between neighbouring marks."""
        return [
            Span(self.copy or self.name, self.name, start, end, count)
            for start, end, count in zip(
                self.marks[:-1], self.marks[1:], self.counts, strict=True
            )
        ]  # fmt: skip


@dataclass(frozen=True)
class Span:
    """Whole lines of a file.

    Attributes:
        path: where the text is read from.
        name: the file that the user named.
        start: byte offset of the first line.
        end: byte offset behind the last one.
        count: lines.
    """

    path: str
    name: str
    start: int
    end: int
    count: int

    def lines(self) -> list[str]:
        """Return the lines, without their ends.

        Raises:
            DataError: the file is not what it was when it was inspected.
        """
        try:
            text = read_range(self.path, self.start, self.end).decode()
        except UnicodeDecodeError:
            raise changed(self.name) from None
        lines = text.split("\n")
        if text.endswith("\n"):
            lines.pop()
        if len(lines) != self.count:
            raise changed(self.name)
        return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


# Takes the number of the first of some whole lines, and them; says what is wrong with a line.
Check = Callable[[int, bytes], Iterable[str]]


def inspect(name: str, check: Check | None = None) -> Facts:
    """Read a file once, strictly.

    Args:
        name: path or URI.
        check: a further look at some lines, from that number on.

    Raises:
        DataError: missing, unreadable, not a plain file, empty, another encoding, a truncated
            archive, or a line that is not UTF-8 or holds NUL: up to 20 such places, one a line,
            and their total.
    """
    before = stamp(name)
    head = head_of(name)
    codec = codec_of(head)
    scan = _Scan(name, check)
    with open_raw(name) as raw:
        for text in _whole_lines(raw, codec, name):
            scan.take(text)
    scan.problems.refuse()
    if not scan.size:
        raise DataError(f"{name}: nothing in the {codec} archive; expected one sentence a line")
    notes = [f"{name}: byte order mark stripped"] * (scan.marks[0] > 0)
    notes += [f"{name}: {scan.lone} carriage returns inside lines kept as text"] * (scan.lone > 0)
    notes += [f"{name}: {scan.boms} byte order marks inside the text kept"] * (scan.boms > 0)
    # A full last part has put a mark at the end already.
    marks = (*scan.marks[: -(-scan.lines // row.BLOCK_ROWS)], scan.size)
    facts = Facts(name, scan.lines, raw.digest.hexdigest(), before, tuple(notes), marks, codec)
    refuse_changed([facts])
    return facts


def _whole_lines(raw: RawFile, codec: Codec | None, name: str) -> Iterator[bytes]:
    """Yield the content in pieces that end with a line feed, but for the last."""
    parts: list[bytes] = []
    is_first = True
    for piece in pieces_of(raw, codec):
        if is_first:
            _refuse_foreign(name, piece[:4096])
            is_first = False
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*parts, piece[:cut]])
            parts = []
        if cut < len(piece):
            parts.append(piece[cut:])
    if parts:
        yield b"".join(parts)


def inspect_all(names: Sequence[str], check: Check | None = None) -> dict[str, Facts]:
    """Inspect several files and report the problems of all together."""
    facts, problems = {}, []
    for name in dict.fromkeys(names):
        try:
            facts[name] = inspect(name, check)
        except DataError as error:
            problems.append(str(error.args[0]))
    if problems:
        raise DataError("\n".join(problems))
    return facts


def lines_of(name: str | Path) -> Iterator[str]:
    """Yield the lines of an inspected file, without their ends and without a mark."""
    try:
        for index, line in enumerate(lines_in(str(name))):
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            yield (text if index else text.removeprefix(_BOM)).decode()
    except UnicodeDecodeError:
        raise changed(str(name)) from None


def unpacked(facts: Facts, folder: Path) -> Facts:
    """Return the same file, to be read from an unpacked copy in the folder if it is compressed."""
    if facts.codec is None or facts.copy:
        return facts
    path = folder / f"{facts.digest[:16]}.txt"
    if not path.exists():
        unpack(facts.name, path)
    return Facts(**{**vars(facts), "copy": str(path)})


def refuse_changed(facts: Iterable[Facts]) -> None:
    """Refuse files that were touched since they were inspected.

    Raises:
        DataError: naming the first such file.
    """
    for fact in facts:
        if stamp(fact.name) != fact.stamp:
            raise changed(fact.name)


def changed(name: str) -> DataError:
    """Return the error of a file that was touched between inspection and reading."""
    return DataError(f"{name}: changed while it was being read; run again when it is complete")


def listed(names: Iterable[object]) -> str:
    """Return the first eight names of what was found, for an error."""
    return ", ".join(repr(str(name)[:30]) for name in itertools.islice(names, 8)) or "none"


def parting(source: Facts, target: Facts) -> int:
    """Return the 1-based line near which two files of different line counts part ways.

    Up to it lengths agree line by line, behind it with the other side moved by the difference of
    the counts: the line where the sum of |log length ratios| is least. 8 bytes a line.
    """
    one, other = (_log_lengths(fact) for fact in (source, target))
    if len(one) < len(other):
        one, other = other, one
    shift, count = len(one) - len(other), len(other)
    before = np.abs(one[:count] - other - np.median(one[:count] - other))
    moved = one[shift:] - other
    behind = np.abs(moved - np.median(moved))
    costs = np.append(0, np.cumsum(before)) + np.append(np.cumsum(behind[::-1])[::-1], 0)
    return int(costs.argmin()) + 1


def _log_lengths(facts: Facts) -> NDArray[np.float64]:
    return np.log1p(np.fromiter(map(len, lines_in(facts.name)), np.float64, facts.lines))


def _refuse_foreign(name: str, head: bytes) -> None:
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            raise DataError(
                f"{name}: looks like {what}; expected UTF-8 text. Fix: {fix.format(name)}"
            )
    # ASCII text in UTF-16 without a mark has NUL in every other byte.
    if len(head) >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > 0.7 * len(head) / 2:
        fix = f"iconv -f UTF-16LE -t UTF-8 {name} > {name}.utf8"
        raise DataError(f"{name}: looks like UTF-16 or binary; expected UTF-8 text. Fix: {fix}")


@dataclass
class _Scan:
    """A running count over the pieces of a file."""

    name: str
    check: Check | None
    lines: int = 0
    size: int = 0
    lone: int = 0
    boms: int = 0
    marks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.problems = _Problems(self.name)

    def take(self, text: bytes) -> None:
        """Scan some whole lines, one by one only where something is wrong with them."""
        start = len(_BOM) if not self.size and text.startswith(_BOM) else 0
        if not self.marks:
            self.marks.append(start)
        try:
            text.decode()
            is_good = 0 not in text
        except UnicodeDecodeError:
            is_good = False
        if not is_good:
            for number, line in enumerate(text.split(b"\n"), self.lines + 1):
                self.problems.look(number, line)
        elif self.check is not None:
            self.problems.add_all(self.check(self.lines + 1, text[start:]))
        if b"\r" in text:
            self.lone += text.count(b"\r") - text.count(b"\r\n") - text.endswith(b"\r")
        self.boms += text.count(_BOM) - (start > 0)
        self._mark(text)
        self.size += len(text)

    def _mark(self, text: bytes) -> None:
        step = row.BLOCK_ROWS
        ends = text.count(b"\n")
        done = self.lines + ends + (not text.endswith(b"\n"))
        if (self.lines + ends) // step > self.lines // step:
            after = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
            at = np.arange(step - self.lines % step, ends + 1, step)
            self.marks += (self.size + after[at - 1]).tolist()
        self.lines = done


@dataclass
class _Problems:
    """Bad places of one file: the first 20 in words, all of them counted."""

    name: str
    total: int = 0
    texts: list[str] = field(default_factory=list)

    def look(self, number: int, line: bytes) -> None:
        try:
            line.decode()
        except UnicodeDecodeError:
            self._add_bad_bytes(number, line)
        if b"\0" in line:
            at = f"{self.name}:{number}:{line.index(0) + 1}"
            self.add(f"{at}: NUL byte; expected text. Fix: tr -d '\\000'")

    def _add_bad_bytes(self, number: int, line: bytes) -> None:
        text = line.decode(errors="surrogateescape")
        for bad in _BAD_BYTE.finditer(text):
            if len(self.texts) >= MAX_PROBLEMS:
                self.total += 1
                continue
            column = len(text[: bad.start()].encode(errors="surrogateescape"))
            self.add(
                f"{self.name}:{number}:{column + 1}: invalid UTF-8 byte 0x{line[column]:02x}; "
                f"expected UTF-8. Fix: iconv -f LATIN1 -t UTF-8 {self.name} > {self.name}.utf8"
            )

    def add(self, text: str) -> None:
        self.total += 1
        if len(self.texts) < MAX_PROBLEMS:
            self.texts.append(text)

    def add_all(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.add(f"{self.name}:{text}")

    def refuse(self) -> None:
        if self.total > len(self.texts):
            self.texts.append(f"{self.name}: {self.total} such places in all")
        if self.texts:
            raise DataError("\n".join(self.texts))
