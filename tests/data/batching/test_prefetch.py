import gc
import threading
import time

import pytest

from vinedresser.data.batching.prefetch import prefetched
from vinedresser.errors import DamagedError


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("vinedresser-prefetch")]


def counting(log, stop=10**9):
    try:
        for i in range(stop):
            log.append(i)
            yield i
    finally:
        log.append("closed")


def until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_the_same_items_in_the_same_order(depth):
    log = []
    assert list(prefetched(counting(log, 50), depth=depth)) == list(range(50))
    assert log[-1] == "closed"
    assert threads() == []


def test_it_reads_ahead_as_far_as_it_may():
    log = []
    items = prefetched(counting(log), depth=4)
    assert log == []
    assert next(items) == 0
    # One is out, four wait.
    until(lambda: len(log) == 5)
    time.sleep(0.05)
    assert len(log) == 5
    items.close()


@pytest.mark.parametrize("end", ["close", "collect", "raise"])
def test_the_thread_ends_with_its_consumer(end):
    log = []
    items = prefetched(counting(log), depth=2)
    assert [next(items), next(items)] == [0, 1]
    (thread,) = threads()
    if end == "close":
        items.close()
    elif end == "raise":
        with pytest.raises(ZeroDivisionError):
            items.throw(ZeroDivisionError())
    else:
        del items
        gc.collect()
    assert not thread.is_alive()
    assert log[-1] == "closed"


def test_an_error_comes_after_the_items_before_it():
    def failing():
        yield 1
        yield 2
        raise DamagedError("train-00003.parquet: unreadable")

    items = prefetched(failing())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(DamagedError, match="train-00003"):
        next(items)
    assert threads() == []
