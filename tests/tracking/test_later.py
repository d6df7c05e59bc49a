"""A run that is opened in a thread: nothing said is lost, nothing waits, errors are told once."""

import threading

import pytest

from vinedresser.errors import ConfigError
from vinedresser.tracking import LaterTracker, MemoryTracker


def test_what_is_said_before_the_run_is_open_comes_first() -> None:
    gate, memory = threading.Event(), MemoryTracker()

    def opening() -> MemoryTracker:
        gate.wait()
        return memory

    later = LaterTracker(opening)
    columns = {"a": [1, 2]}
    later.log({"x": 1.0}, 1)
    later.table(columns, "t.json")
    later.tag({"k": "old"})
    columns["a"].append(3)
    assert not memory.metrics
    gate.set()
    assert later.run_id == "memory"
    later.log({"x": 2.0}, 2)
    later.tag({"k": "new"})
    later.text("words", "w.txt")
    later.close("FINISHED", "done")
    assert memory.metrics == [("x", 1.0, 1), ("x", 2.0, 2)]
    assert memory.artifacts == {"t.json": {"a": [1, 2]}, "w.txt": "words"}
    assert (memory.tags, memory.state, memory.reason) == ({"k": "new"}, "FINISHED", "done")


def test_nothing_is_opened_before_there_is_something_to_say_or_patience_ends() -> None:
    opened = threading.Event()

    def opening() -> MemoryTracker:
        opened.set()
        return MemoryTracker()

    silent = LaterTracker(opening, patience=3600)
    assert not opened.wait(0.05)
    silent.close("KILLED")
    assert opened.is_set()
    opened.clear()
    LaterTracker(opening, patience=0)
    assert opened.wait(10)


def test_an_error_is_raised_by_the_next_word_and_not_by_close() -> None:
    def opening() -> MemoryTracker:
        raise ConfigError("experiment gone was deleted")

    later = LaterTracker(opening)
    with pytest.raises(ConfigError, match="deleted"):
        _ = later.run_id
    with pytest.raises(ConfigError, match="deleted"):
        later.log({"x": 1.0}, 1)
    later.close("FAILED")
