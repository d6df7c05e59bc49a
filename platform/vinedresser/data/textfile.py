r"""A UTF-8 text file: checked whole before any work, then streamed in constant memory.

Only "\n" ends a line. Python's `splitlines` also breaks at U+2028, \x0b, \x85 and others, which
shifts one side of a parallel corpus against the other without an error.
"""

import hashlib
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    (b"\x1f\x8b", "gzip", "gunzip -k {0}"),
    (b"PK\x03\x04", "zip", "unzip {0}"),
    (b"BZh", "bzip2", "bunzip2 -k {0}"),
    (b"\xfd7zXZ", "xz", "unxz -k {0}"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unzstd {0}"),
)


@dataclass(frozen=True)
class Facts:
    """What a whole pass over a file found.

    Attributes:
        path: the file.
        lines: how many, the last one with or without a line feed.
        digest: SHA-256 in hex of its bytes.
        stamp: size in bytes and modification time in ns; differs once the file was touched.
        notes: harmless oddities, one line each.
    """

    path: Path
    lines: int
    digest: str
    stamp: tuple[int, int]
    notes: tuple[str, ...]


def inspect(path: Path) -> Facts:
    """Reads a file once, strictly.

    Raises:
        DataError: missing, unreadable, not a plain file, empty, another encoding, or a line that
            is not UTF-8 or holds NUL: up to 20 such places, one a line, and their total.
    """
    before = _stamp(path)
    digest, problems, lines, lone = hashlib.sha256(), _Problems(path), 0, 0
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            _refuse_foreign(path, head)
            stream.seek(0)
            for lines, line in enumerate(stream, 1):
                digest.update(line)
                problems.look(lines, line)
                if b"\r" in line:
                    lone += line.removesuffix(b"\n").removesuffix(b"\r").count(b"\r")
    except OSError as error:
        raise DataError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    problems.refuse()
    notes = [f"{path}: byte order mark stripped"] * head.startswith(_BOM)
    notes += [f"{path}: {lone} carriage returns inside lines kept as text"] * (lone > 0)
    facts = Facts(path, lines, digest.hexdigest(), before, tuple(notes))
    refuse_changed([facts])
    return facts


def inspect_all(paths: Sequence[Path]) -> dict[Path, Facts]:
    """`inspect` for several files; the problems of all are reported together."""
    facts, problems = {}, []
    for path in dict.fromkeys(paths):
        try:
            facts[path] = inspect(path)
        except DataError as error:
            problems.append(str(error.args[0]))
    if problems:
        raise DataError("\n".join(problems))
    return facts


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file that `inspect` has passed, without their ends and without a mark."""
    try:
        with path.open("rb") as stream:
            for index, line in enumerate(stream):
                text = line.removesuffix(b"\n").removesuffix(b"\r")
                yield (text if index else text.removeprefix(_BOM)).decode()
    except UnicodeDecodeError:
        raise _changed(path) from None


def refuse_changed(facts: Sequence[Facts]) -> None:
    """Refuses files that were touched since they were inspected.

    Raises:
        DataError: naming the first such file.
    """
    for fact in facts:
        if _stamp(fact.path) != fact.stamp:
            raise _changed(fact.path)


def _changed(path: Path) -> DataError:
    return DataError(f"{path}: changed while it was being read; run again when it is complete")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise DataError(f"{path}: {reason}; expected a UTF-8 text file") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a plain file"
        raise DataError(f"{path}: {kind}; expected a UTF-8 text file")
    if not found.st_size:
        raise DataError(f"{path}: empty file; expected one sentence a line")
    return found.st_size, found.st_mtime_ns


def _refuse_foreign(path: Path, head: bytes) -> None:
    for magic, name, fix in _FOREIGN:
        if head.startswith(magic):
            raise DataError(
                f"{path}: looks like {name}; expected UTF-8 text. Fix: {fix.format(path)}"
            )
    # ASCII text in UTF-16 without a mark has NUL in every other byte.
    if len(head) >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > 0.7 * len(head) / 2:
        fix = f"iconv -f UTF-16LE -t UTF-8 {path} > {path}.utf8"
        raise DataError(f"{path}: looks like UTF-16 or binary; expected UTF-8 text. Fix: {fix}")


@dataclass
class _Problems:
    """Bad places of one file: the first 20 in words, all of them counted."""

    path: Path
    total: int = 0
    texts: list[str] = field(default_factory=list)

    def look(self, number: int, line: bytes) -> None:
        try:
            line.decode()
        except UnicodeDecodeError:
            self._add_bad_bytes(number, line)
        if b"\0" in line:
            at = f"{self.path}:{number}:{line.index(0) + 1}"
            self._add(f"{at}: NUL byte; expected text. Fix: tr -d '\\000'")

    def _add_bad_bytes(self, number: int, line: bytes) -> None:
        text = line.decode(errors="surrogateescape")
        for bad in _BAD_BYTE.finditer(text):
            if len(self.texts) >= MAX_PROBLEMS:
                self.total += 1
                continue
            column = len(text[: bad.start()].encode(errors="surrogateescape"))
            self._add(
                f"{self.path}:{number}:{column + 1}: invalid UTF-8 byte 0x{line[column]:02x}; "
                f"expected UTF-8. Fix: iconv -f LATIN1 -t UTF-8 {self.path} > {self.path}.utf8"
            )

    def _add(self, text: str) -> None:
        self.total += 1
        if len(self.texts) < MAX_PROBLEMS:
            self.texts.append(text)

    def refuse(self) -> None:
        if self.total > len(self.texts):
            self.texts.append(f"{self.path}: {self.total} such places in all")
        if self.texts:
            raise DataError("\n".join(self.texts))
