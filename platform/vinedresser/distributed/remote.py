"""Work of one process in a task on the cluster that the user named, in place of this machine."""

import logging
from collections.abc import Callable
from typing import Any

import ray

from vinedresser.errors import VinedresserError

_root = logging.getLogger("vinedresser")


def on_cluster(work: Callable[..., Any], *args: Any, cpus: int) -> Any:
    """Run a function in a task; return its result, and log here what it logs there.

    Args:
        work: a function of a module that the nodes have.
        args: of the function; paths among them must be valid on all nodes.
        cpus: number of CPUs that the task reserves.

    Raises:
        VinedresserError: of the function.
    """
    task: Any = ray.remote(num_cpus=cpus, max_retries=2)(_logged)
    try:
        result, lines = ray.get(task.remote(work, args))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, VinedresserError):
            raise error.cause from None
        raise
    for level, text in lines:
        _root.log(level, "%s", text)
    return result


class _Lines(logging.Handler):
    """Keeps level and text of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def _logged(work: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[tuple[int, str]]]:
    """Return the result of a function and the lines that it logs; runs in the task."""
    kept = _Lines()
    _root.addHandler(kept)
    _root.setLevel(logging.INFO)
    try:
        return work(*args), kept.lines
    finally:
        _root.removeHandler(kept)
