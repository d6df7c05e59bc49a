"""One thread that reads ahead, and ends with its consumer."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")

# Items read ahead: at 20 updates per second 0.4 s, the time of the first batch of a new chunk; and
# at most 10 MB of frames.
DEPTH = 8


def prefetched(source: Iterator[_T], *, depth: int = DEPTH) -> Generator[_T, None, None]:
    """Yield the items of an iterator, drawn in a thread that runs up to `depth` items ahead.

    The thread starts when the first item is requested. It ends with the source, with an error, or
    when this generator is closed or collected; the source is closed then. An error of the source is
    raised here, in its place among the items. The source is used by the thread alone from now on.
    """
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="vinedresser-prefetch") as thread:
        waiting = deque(thread.submit(next, source, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, source, end))
                yield item  # type: ignore[misc]  # `end` is not yielded
        finally:
            thread.shutdown(cancel_futures=True)
            close = getattr(source, "close", None)
            if close is not None:
                close()
