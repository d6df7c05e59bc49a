"""One thread that reads ahead, and ends when its consumer does."""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Items read ahead: at 20 updates a second 0.4 s, what a new window's first batch takes; and
# 10 MB at the most, of frames.
DEPTH = 8
# Seconds between two looks of a full or empty queue at whether the other side is still there.
_PATIENCE = 0.1


@dataclass(frozen=True)
class _End:
    """The last thing in a queue: the source is at its end, or failed."""

    error: BaseException | None


def prefetched(source: Iterator[T], *, depth: int = DEPTH) -> Generator[T, None, None]:
    """Yield the items of an iterator, drawn in a thread that runs up to `depth` items ahead.

    The thread starts with the first item that is asked for. It ends with the source, with an
    error, or when this generator is closed or collected; then it has closed the source, too. What
    the source raises is raised here, in its place among the items.

    Args:
        source: used by the thread alone from now on.
        depth: items that wait at most, >= 1.
    """
    items: queue.Queue[T | _End] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(
        target=_fill, args=(source, items, stop), name="vinedresser-prefetch", daemon=True
    )
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()


def _fill(source: Iterator[T], items: "queue.Queue[T | _End]", stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in source:
            if not _put(items, item, stop):
                break
    except BaseException as raised:  # noqa: BLE001 - the consumer's to handle, whatever it is
        error = raised
    try:
        close = getattr(source, "close", None)
        if close is not None:
            close()
    finally:
        _put(items, _End(error), stop)


def _put(items: "queue.Queue[T | _End]", item: T | _End, stop: threading.Event) -> bool:
    """Wait for room; False when the consumer has gone."""
    while not stop.is_set():
        try:
            items.put(item, timeout=_PATIENCE)
        except queue.Full:
            continue
        return True
    return False
