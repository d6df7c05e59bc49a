"""Executors of one function over blocks: this process, or Ray tasks. Both write the same bytes."""

import collections
import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

from vinedresser.data.corpora.row import Block
from vinedresser.data.prepare.clean import PrepareJob
from vinedresser.errors import MachineError, VinedresserError

Executor = Literal["auto", "in_process", "ray"]
Connect = Callable[[], contextlib.AbstractContextManager[None]]
_T = TypeVar("_T")

# `auto` uses Ray from this many raw rows on, where Ray runs already and where it must be started.
RAY_ROWS, RAY_START_ROWS = 500_000, 1_000_000
# Ray tasks that wait or run at a time: their descriptions are a few hundred bytes each.
_TASKS_IN_FLIGHT = 1000
# Times that a task is run again after its worker process died.
_MAX_RETRIES = 20


class BlockRunner(Protocol):
    """An executor, see `block_runner`."""

    def __call__(
        self, function: Callable[[Block, PrepareJob], _T], blocks: Sequence[Block], job: PrepareJob
    ) -> Iterator[_T]:
        """Yield function(block, job) of each block, in their order."""
        ...


def in_process(
    function: Callable[[Block, PrepareJob], _T], blocks: Sequence[Block], job: PrepareJob
) -> Iterator[_T]:
    """Run one block after the other, in the memory of one."""
    for block in blocks:
        yield function(block, job)


@contextlib.contextmanager
def block_runner(name: Executor, rows: int, connect: Connect | None) -> Iterator[BlockRunner]:
    """Choose an executor and keep its connection open.

    Args:
        name: `auto` is Ray where there are enough rows for it to pay.
        rows: raw rows of all blocks.
        connect: starts or joins Ray where this process is not connected; without it `auto` is
            this process unless Ray is connected already.
    """
    if name == "auto":
        ray = sys.modules.get("ray")
        is_connected = ray is not None and ray.is_initialized()
        needed = RAY_ROWS if is_connected else RAY_START_ROWS if connect else math.inf
        name = "ray" if rows >= needed else "in_process"
    if name == "in_process":
        yield in_process
        return
    with connect() if connect is not None else contextlib.nullcontext():
        yield with_ray


def with_ray(
    function: Callable[[Block, PrepareJob], _T], blocks: Sequence[Block], job: PrepareJob
) -> Iterator[_T]:
    """Run one Ray task per block; only descriptions and counts travel.

    Raises:
        VinedresserError: as the function raises it.
        MachineError: this process is not connected, or a task failed for another reason.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if not ray.is_initialized():  # the first task would start or join a cluster by itself
        raise MachineError(
            f"{job.out}: this process is not connected to Ray. Fix: connect it first, or "
            'prepare with executor="in_process"'
        )
    try:
        task = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(function)
        stored, waiting = ray.put(job), collections.deque[Any]()
        for block in blocks:
            waiting.append(task.remote(block, stored))
            if len(waiting) >= _TASKS_IN_FLIGHT:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, VinedresserError):
            raise error.cause from None
        raised = re.search(r"^[\w.]*Error: (?!ray\.)(.+)$", str(error), re.MULTILINE)
        reason = raised[1] if raised else type(error).__name__
        raise MachineError(
            f"{job.out}: Ray could not prepare the data: {reason}. "
            'Fix: see the Ray logs, or prepare with executor="in_process"'
        ) from error
