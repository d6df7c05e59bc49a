"""Two executors of one block function: in this process, or as Ray tasks. The same bytes."""

import contextlib
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from vinedresser.data.corpora.row import Block
from vinedresser.data.prepare.encode import BlockJob, Encoded, encode_block
from vinedresser.errors import MachineError

Executor = Literal["auto", "in_process", "ray"]

# `auto` takes Ray from this many raw rows on. A dataset costs 9 s and 8 CPU-s even where Ray runs
# already, and starting it 10 s more; each million pairs 24 s on two cores, in process 50 s.
RAY_ROWS, RAY_START_ROWS = 500_000, 1_000_000

Connect = Callable[[], contextlib.AbstractContextManager[None]]


def run_blocks(
    blocks: Sequence[Block], job: BlockJob, name: Executor, connect: Connect | None = None
) -> Iterator[Encoded]:
    """`encode_block` of each block, in whatever order they end.

    Args:
        blocks: of all splits.
        job: see `BlockJob`.
        name: `auto` is Ray where there is enough to do for it to pay.
        connect: starts or joins a Ray where this process has none; without it `auto` stays here.
    """
    rows = sum(block.count for block in blocks)
    if name == "auto":
        name = "ray" if rows >= _needed(can_connect=connect is not None) else "in_process"
    if name == "in_process":
        yield from in_process(blocks, job)
        return
    with connect() if connect is not None else contextlib.nullcontext():
        yield from with_ray(blocks, job)


def _needed(*, can_connect: bool) -> float:
    """Rows from which Ray pays, as things are."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return RAY_ROWS
    return RAY_START_ROWS if can_connect else math.inf


def in_process(blocks: Sequence[Block], job: BlockJob) -> Iterator[Encoded]:
    """One block after the other, in the memory of one."""
    for block in blocks:
        yield encode_block(block, job)


def with_ray(blocks: Sequence[Block], job: BlockJob) -> Iterator[Encoded]:
    """One task a block. Half a CPU each: tasks that take every CPU starve Ray Data's reads.

    Only descriptions go to the workers and only counts come back, in any order.

    Raises:
        MachineError: this process is not connected, or a task failed; with its own reason.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    if not ray.is_initialized():  # Ray Data would join whatever cluster it finds on this machine
        raise MachineError(
            f"{job.out}: this process is not connected to Ray. Fix: connect it first, or "
            'prepare with executor="in_process"'
        )
    items = [{"index": index} for index in range(len(blocks))]
    encode: Callable[..., Any] = _encode_items  # Ray's own types know no keyword arguments
    try:
        with _quiet_ray_data():
            encoded = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                encode,
                batch_size=None,
                fn_kwargs={"blocks": list(blocks), "job": job},
                num_cpus=0.5,
            )
            for answer in encoded.iter_rows():
                yield Encoded.from_text(answer["encoded"])
    except RayError as error:
        raise MachineError(
            f"{job.out}: Ray could not write the shards: {_reason(error)}. "
            'Fix: see the Ray logs, or prepare with executor="in_process"'
        ) from error


def _encode_items(
    batch: dict[str, Any], *, blocks: Sequence[Block], job: BlockJob
) -> dict[str, Any]:
    return {"encoded": [encode_block(blocks[index], job).to_text() for index in batch["index"]]}


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Datasets made inside draw no bars; the caller's context comes back."""
    from ray.data import DataContext

    with warnings.catch_warnings():  # its own defaults set three names that it calls deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.execution_options.verbose_progress = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)  # else four lines a dataset: its plan, its log, its time
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """A worker's own error out of the traceback that Ray makes of it: one line."""
    raised = re.search(r"^[\w.]*Error: (?!ray\.)(.+)$", str(error), re.MULTILINE)
    return raised[1] if raised else type(error).__name__
