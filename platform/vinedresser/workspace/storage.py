"""Storage: the few operations that a workspace needs, and their POSIX implementation.

`Storage` is what an object store can offer too: whole files, conditional writes, and folders that
appear at once because their manifest is written last. Locks, leases and histories use nothing else.
"""

import contextlib
import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from vinedresser.errors import MachineError
from vinedresser.workspace.layout import CacheFolder

MANIFEST = "manifest.json"
_FIXES = {
    errno.ENOSPC: "the disk is full; free space and run the same command again",
    errno.EDQUOT: "the quota is used up; free space and run the same command again",
    errno.EROFS: "the file system is read-only; name another workspace",
    errno.EACCES: "permission denied; name another workspace or change its owner",
    errno.EPERM: "operation not permitted; name another workspace or change its owner",
    errno.EIO: "the disk reports an input/output error; name another disk",
    errno.EFBIG: "the file size limit (ulimit -f) is too small; raise it",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EEXIST: "a file is in the way; move it or name another workspace",
    errno.ENOTDIR: "a file is in the way; move it or name another workspace",
    errno.ESTALE: "the mount was lost (stale handle); run the same command again",
}
# Names a folder on a local disk of each node, for copies of shards.
NODE_CACHE = "VINEDRESSER_CACHE"
# A conditional write takes milliseconds; who holds its guard for longer is stuck.
_GUARD_SECONDS = 30.0


class Storage(Protocol):
    """Operations on files and committed folders."""

    def read(self, path: Path) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def write(self, path: Path, content: bytes) -> None:
        """Write a file; a reader sees the old content or the new."""

    def replace(self, path: Path, content: bytes | None, *, expected: bytes | None) -> bool:
        """Write a file if its content is `expected`; return whether it was. None is no file."""

    def publish(self, staging: Path, target: Path) -> bool:
        """Make a local folder with its manifest visible as `target`, once and whole.

        Returns:
            False if the target exists already; it is left as it is.
        """


class PosixStorage:
    """A file system that all processes see at the same path.

    Conditional writes are guarded by flock, which NFSv4 honours between hosts.
    """

    def read(self, path: Path) -> bytes | None:
        """Return the content of a file; None if there is none."""
        with disk_errors(path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def write(self, path: Path, content: bytes) -> None:
        """Write a file by renaming it into place."""
        with disk_errors(path):
            make_folder(path.parent)
            write_whole(path, content)

    def replace(self, path: Path, content: bytes | None, *, expected: bytes | None) -> bool:
        """Write a file if its content is `expected`; deleting one needs no space on the disk."""
        guard = path.with_name(f".{path.name.lstrip('.')}.guard")
        with disk_errors(path):
            make_folder(path.parent)
            try:
                # Of the permissions of the folder: filelock does not apply the umask.
                mode = path.parent.stat().st_mode & 0o666
                with FileLock(guard, timeout=_GUARD_SECONDS, mode=mode):
                    is_expected = self.read(path) == expected
                    if is_expected and content is None:
                        path.unlink(missing_ok=True)
                    elif is_expected:
                        self.write(path, content or b"")
                    return is_expected
            except Timeout:
                raise MachineError(
                    f"{guard}: held for {_GUARD_SECONDS:.0f} s; end the process that holds it"
                ) from None

    def publish(self, staging: Path, target: Path) -> bool:
        """Rename a folder of the same file system into place."""
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return False
        force_to_disk(target.parent)
        return True


POSIX: Storage = PosixStorage()


def follow_mode(folder: Path) -> None:
    """Give what this process writes the permissions that a workspace's folder has, if it exists.

    A folder with `chmod 2775` is shared by its group. A private Ray starts its processes with a
    umask of 077.
    """
    with contextlib.suppress(OSError):
        os.umask(~folder.stat().st_mode & 0o077)


def node_cache() -> CacheFolder | None:
    """Return the folder on a local disk that the user has named for this node."""
    named = os.environ.get(NODE_CACHE)
    return CacheFolder(Path(named)) if named else None


def user_cache() -> CacheFolder:
    """Return the user's folder for what can be made again: bundles, inspections of corpora."""
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())
    base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return node_cache() or CacheFolder(Path(base) / "vinedresser")


def force_to_disk(path: Path) -> None:
    """Force a file or the names in a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it into place; disk errors pass as they are."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        force_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a disk into one line with a fix; other errors pass.

    The file that the error names is blamed, unless it is a part of what is being written.

    Raises:
        MachineError: no space, no permission, a read-only or failing disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FIXES:
            raise
        named = error.filename if isinstance(error.filename, str) else ""
        blamed = named if named and not named.startswith(f"{target.parent}/") else str(target)
        raise MachineError(f"{blamed}: {_FIXES[error.errno]}") from error


def make_folder(folder: Path) -> None:
    """Make a folder with its parents, unless it exists.

    Raises:
        MachineError: a file is in the way, or the disk refuses.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write one file so that readers see the old content or the new, never a part of it."""
    POSIX.write(path, content.encode() if isinstance(content, str) else content)


def parsed(content: bytes | None) -> Any:
    """Return the JSON value of a file's content; None if it is absent or not JSON."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(content or b"null")
    return None


def parsed_object(content: bytes | None) -> dict[str, Any]:
    """Return the JSON object of a file's content; empty if it is absent or not an object."""
    found = parsed(content)
    return found if isinstance(found, dict) else {}


def read_json(path: Path) -> Any:
    """Return the JSON value of a file; None if it is absent or not JSON.

    Raises:
        MachineError: the file cannot be read.
    """
    return parsed(POSIX.read(path))
