r"""A UTF-8 text file: checked whole before any work, then read in parts by any process.

A line ends at "\n" alone. Python's `splitlines` also breaks at U+2028, \x0b, \x85 and others, which
shifts one side of a parallel corpus against the other without an error.
"""

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import (
    Codec,
    Stamp,
    codec_of,
    is_remote,
    lines_in,
    open_raw,
    read_range,
    stamp,
)
from vinedresser.errors import DataError, MachineError
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.storage import read_json, user_cache, write_file

# Smaller files are inspected in 0.2 s.
REMEMBERED_BYTES = 64 << 20
# Raised when the same file would give other facts.
_INSPECTION = 1
# A disk's clock advances in steps of a few seconds at worst.
_SETTLED_NS = 10_000_000_000
# Problems of a corpus that one error lists.
MAX_LISTED = 20
_BOM = b"\xef\xbb\xbf"
# `surrogateescape` maps each undecodable byte to one of these; valid UTF-8 cannot contain them.
_BAD_BYTE = re.compile("[\udc80-\udcff]")
_HALF = re.compile("[\ud800-\udfff]")
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
    """Findings of one pass over a whole file.

    Attributes:
        name: the file.
        lines: number of lines, the last one with or without a line feed.
        digest: SHA-256 in hex of its bytes as stored.
        stamp: of the file when it was read.
        notes: harmless oddities, one line each.
        marks: byte offsets into the text: of line 0 (behind a byte order mark), of each
            `BLOCK_ROWS`-th line after it, and of the end.
        codec: its compression.
        copy: the unpacked copy to read from; "" for none.
    """

    name: str
    lines: int
    digest: str
    stamp: Stamp
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


# (number of the first of some whole lines, the lines) -> `LINE:COLUMN: problem` of each bad line.
Check = Callable[[int, bytes], Iterable[str]]


def inspect_text(name: str, check: Check | None = None) -> Facts:
    """Read a file once, strictly.

    `check` is a further check of some lines.

    Raises:
        DataError: missing, unreadable, not a plain file, empty, another encoding, a truncated
            archive, or a line that is not UTF-8 or holds NUL: up to 20 such places, one per line,
            and their total.
    """
    before, codec, step = stamp(name), codec_of(name), row.BLOCK_ROWS
    marks, problems = list[int](), list[str]()
    lines = size = lone = boms = total = 0
    with open_raw(name) as raw:
        for text in _whole_lines(raw.pieces()):
            start = 0
            if not size:
                _refuse_foreign(name, text[:4096])
                start = len(_BOM) if text.startswith(_BOM) else 0
                marks.append(start)
            try:
                text.decode()
                is_good = 0 not in text
            except UnicodeDecodeError:
                is_good = False
            if not is_good:  # line by line only where a line is bad
                for number, line in enumerate(text.split(b"\n"), lines + 1):
                    found, bad = _problems_of_bytes(name, number, line, MAX_LISTED - len(problems))
                    problems += found
                    total += bad
            elif check is not None:
                found = [f"{name}:{problem}" for problem in check(lines + 1, text[start:])]
                problems += found[: MAX_LISTED - len(problems)]
                total += len(found)
            if b"\r" in text:
                lone += text.count(b"\r") - text.count(b"\r\n") - text.endswith(b"\r")
            boms += text.count(_BOM) - (start > 0)
            ends = text.count(b"\n")
            if (lines + ends) // step > lines // step:
                after = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
                at = np.arange(step - lines % step, ends + 1, step)
                marks += (size + after[at - 1]).tolist()
            lines += ends + (not text.endswith(b"\n"))
            size += len(text)
    refuse(problems, name, total)
    if not size:
        raise DataError(f"{name}: nothing in the {codec} archive; expected one sentence a line")
    notes = [f"{name}: byte order mark stripped"] * (marks[0] > 0)
    notes += [f"{name}: {lone} carriage returns inside lines kept as text"] * (lone > 0)
    notes += [f"{name}: {boms} byte order marks inside the text kept"] * (boms > 0)
    # A full last part has put a mark at the end already.
    ends_of_parts = (*marks[: -(-lines // step)], size)
    digest = raw.digest.hexdigest()
    refuse_changed({name: before})
    return Facts(name, lines, digest, before, tuple(notes), ends_of_parts, codec)


def _whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield content in pieces that end with a line feed, except the last."""
    parts: list[bytes] = []
    for piece in pieces:
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*parts, piece[:cut]])
            parts = []
        if cut < len(piece):
            parts.append(piece[cut:])
    if parts:
        yield b"".join(parts)


def _problems_of_bytes(name: str, number: int, line: bytes, room: int) -> tuple[list[str], int]:
    """Return at most `room` texts of what is not UTF-8 text in a line, and their number."""
    text, problems = line.decode(errors="surrogateescape"), list[str]()
    bad = list(_BAD_BYTE.finditer(text))
    for found in bad[:room]:
        column = len(text[: found.start()].encode(errors="surrogateescape"))
        problems.append(
            f"{name}:{number}:{column + 1}: invalid UTF-8 byte 0x{line[column]:02x}; expected "
            f"UTF-8. Fix: iconv -f LATIN1 -t UTF-8 {name} > {name}.utf8"
        )
    if (at := line.find(0) + 1) and len(problems) < room:
        problems.append(f"{name}:{number}:{at}: NUL byte; expected text. Fix: tr -d '\\000'")
    return problems, len(bad) + (at > 0)


def inspect_each(names: Iterable[str], inspect: Callable[[str], Facts]) -> dict[str, Facts]:
    """Inspect several files and report the problems of all together."""
    facts, problems = {}, []
    for name in dict.fromkeys(names):
        try:
            facts[name] = inspect(name)
        except DataError as error:
            problems.append(str(error.args[0]))
    if problems:
        raise DataError("\n".join(problems))
    return facts


def inspect_all(names: Iterable[str]) -> dict[str, Facts]:
    """Inspect several text files and report the problems of all together."""
    return inspect_each(names, _remembered)


def _remembered(name: str) -> Facts:
    """Inspect a text file, or return what was found in a large one that is the same file still.

    The same is a file of the same path, inode, size, and times of change to the nanosecond; of an
    object in storage, size and time alone. A file that changed in the last seconds is not
    remembered: the clock of a disk may stand still meanwhile.
    """
    size, changed_ns = stamp(name)
    if size < REMEMBERED_BYTES:
        return inspect_text(name)
    found = None if is_remote(name) else Path(name).stat()
    identity = [found.st_ino, found.st_ctime_ns] if found else []
    path = name if is_remote(name) else str(Path(name).resolve())
    key = digest_of([_INSPECTION, path, size, changed_ns, identity, row.BLOCK_ROWS])
    stored = user_cache().inspections / f"{key}.json"
    with contextlib.suppress(MachineError, TypeError, KeyError):
        plain = read_json(stored)
        if plain:
            lists = {key: tuple(plain[key]) for key in ("stamp", "notes", "marks")}
            return Facts(**{**plain, **lists, "name": name})
    facts = inspect_text(name)
    last = max(changed_ns, found.st_ctime_ns if found else 0)
    if time.time_ns() - last > _SETTLED_NS:
        with contextlib.suppress(MachineError, OSError):  # the next command inspects again
            write_file(stored, json.dumps(asdict(facts)))
    return facts


def refuse(problems: Sequence[str], name: str = "", total: int = 0) -> None:
    """Refuse with the first 20 problems, one per line, and their number.

    Raises:
        DataError: there is a problem.
    """
    if problems:
        count = max(total, len(problems))
        summary = f"{name}: {count} such places in all".removeprefix(": ")
        more = [summary] * (count > MAX_LISTED)
        raise DataError("\n".join([*problems[:MAX_LISTED], *more]))


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
        with open_raw(facts.name) as raw, path.open("wb") as out:
            out.writelines(raw.pieces())
    return replace(facts, copy=str(path))


def refuse_changed(stamps: Mapping[str, Stamp]) -> None:
    """Refuse files that changed since they were inspected, or are gone.

    Raises:
        DataError: naming the first such file.
    """
    for name, before in stamps.items():
        try:
            is_same = stamp(name) == before
        except DataError:
            is_same = False
        if not is_same:
            raise changed(name)


def changed(name: str) -> DataError:
    """Return the error of a file that changed between inspection and reading."""
    return DataError(f"{name}: changed while it was being read; run again when it is complete")


def half_character(text: str) -> tuple[int, str] | None:
    """Return place (from 1) and code point of the first half of a surrogate pair; None without.

    UTF-8 cannot hold it, but JSON can name it.
    """
    found = _HALF.search(text)
    return (found.start() + 1, f"U+{ord(found[0]):04X}") if found else None


def listed(names: Iterable[object]) -> str:
    """Return the first eight names of what was found, for an error."""
    return ", ".join(repr(str(name)[:30]) for name in itertools.islice(names, 8)) or "none"


def parting(source: Facts, target: Facts) -> int:
    """Return the 1-based line near which two files of different line counts part ways.

    Before it lengths agree line by line, after it with the other side moved by the difference of
    the counts: the line where the sum of |log length ratios| is least. 8 bytes per line.
    """
    one, other = (
        np.log1p(np.fromiter(map(len, lines_in(facts.name)), np.float64, facts.lines))
        for facts in (source, target)
    )
    if len(one) < len(other):
        one, other = other, one
    shift, count = len(one) - len(other), len(other)
    before = np.abs(one[:count] - other - np.median(one[:count] - other))
    moved = one[shift:] - other
    behind = np.abs(moved - np.median(moved))
    costs = np.append(0, np.cumsum(before)) + np.append(np.cumsum(behind[::-1])[::-1], 0)
    return int(costs.argmin()) + 1


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
