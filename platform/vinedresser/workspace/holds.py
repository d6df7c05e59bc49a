"""Holds: shared locks by which readers keep a committed folder while their process lives.

A reader locks the folder's manifest, shared, before it reads anything; the kernel releases the
lock when the process ends, however it ends. Who removes a folder locks it exclusively first, so
that a folder that is being read stays. NFSv4 honours flock between hosts. Where a file system has
no locks, readers read without one, and nothing is removed.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vinedresser.workspace.storage import MANIFEST

# (device, inode) of a manifest -> descriptor with the lock, until the process ends.
_descriptors: dict[tuple[int, int], int] = {}
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def hold(folder: Path) -> None:
    """Keep a committed folder from being removed until this process ends; note its use.

    Waits while the folder is being removed. One that is absent, or that was removed meanwhile, is
    left to the caller, whose first read reports it.
    """
    path = folder / MANIFEST
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        found = path.stat()
        while (found.st_dev, found.st_ino) not in _descriptors:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_LOCKS:
                    raise
                return
            opened = os.fstat(descriptor)
            _descriptors[opened.st_dev, opened.st_ino] = descriptor
            found = path.stat()
        with contextlib.suppress(OSError):  # read-only, or another user's
            os.utime(folder)


@contextlib.contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Give True if no process holds the folder; inside the block none can begin to.

    A folder without a manifest has no readers. Where locks do not exist the answer is False.
    """
    try:
        descriptor = os.open(folder / MANIFEST, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_unread = True
        except OSError:  # held, or no locks
            is_unread = False
        yield is_unread
    finally:
        os.close(descriptor)
