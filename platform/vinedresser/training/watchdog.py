"""Watches over ranks that wait for each other: one that hangs (fault T10), one that is slow (T11).

A rank that waits in a collective waits for ever if another never comes. Each rank has a clock that
every update sets back; where it runs out, the stacks of all threads go to the run's folder and the
process ends, so that the group can be started anew. The stacks tell who was waiting for whom.
"""

import contextlib
import json
import os
import re
import statistics
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from vinedresser.workspace.storage import make_folder

# A clock does not run out before so many times the longest update so far.
_LONGEST = 10.0
# Before updates that come after more than an update, patience is so many times as long: 60 s
# become 10 minutes while the group meets for the first time or rank 0 writes a checkpoint, and
# half an hour, which is what torch.distributed waits, while it decodes the dev split.
STORING, JUDGING = 10.0, 30.0
# Ranks notice within so many seconds of each other; none ends before all have written.
_GRACE_SECONDS = 5.0
# In the stack of a rank that waits for the others.
_WAITING = re.compile(r" in (all_reduce|all_gather\w*|broadcast\w*|barrier|backward|report)\b")
_HEAD = "== "


@dataclass(frozen=True)
class Hang:
    """One hang of a run.

    Attributes:
        step: the update (1-based) that never ended.
        ranks: the ranks that were not waiting for others; all of them where that cannot be told.
    """

    step: int
    ranks: tuple[int, ...]

    @property
    def who(self) -> str:
        """For a message: rank 1, or ranks 0 and 1."""
        names = [str(rank) for rank in self.ranks]
        return f"rank {names[0]}" if len(names) == 1 else f"ranks {' and '.join(names)}"


class Clock:
    """The clock of one rank; used around all of its updates.

    Does nothing for a run of one worker.
    """

    def __init__(self, folder: Path, *, rank: int, workers: int, seconds: float) -> None:
        """Args: the run's folder, this rank, how many there are, and 0 to never end a rank."""
        self._folder, self._rank, self._seconds = folder / "hangs", rank, seconds
        self._is_on = workers > 1 and seconds > 0
        self._step = 0
        self._deadline = self._last = self._longest = 0.0
        self._was_long = True
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._is_on:
            make_folder(self._folder)
            self.beat(0, patience=STORING)
            threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_on:
            self._over.set()
            with contextlib.suppress(OSError):
                self._folder.rmdir()

    def beat(self, step: int, *, patience: float = 1.0) -> None:
        """Sets the clock back.

        Args:
            step: the last update that is done.
            patience: how many times as long as usual the next one may take; above 1 where more
                is done before it.
        """
        if not self._is_on:
            return
        now = time.monotonic()
        if not self._was_long:
            self._longest = max(self._longest, now - self._last)
        self._step, self._last, self._was_long = step, now, patience > 1
        self._deadline = now + max(self._seconds, _LONGEST * self._longest) * patience

    def _look(self) -> None:
        """The thread: ends the process after its stacks were written."""
        while not self._over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() > self._deadline + min(_GRACE_SECONDS, self._seconds) / 2:
                with contextlib.suppress(OSError):  # a rank that hangs ends without them too
                    _keep(_stacks(), self._folder, self._rank, self._step + 1)
                time.sleep(min(_GRACE_SECONDS, self._seconds))
                os._exit(1)


def _stacks() -> str:
    """Of all threads, the most recent call first.

    Not by faulthandler: it looks at threads that run, without the interpreter's lock, and ends the
    process with SIGSEGV within 4 dumps beside three busy threads (Python 3.11).
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        lines = [
            f'  File "{call.f_code.co_filename}", line {line} in {call.f_code.co_name}'
            for call, line in traceback.walk_stack(frame)
        ]
        parts.append("\n".join([f"Thread {names.get(ident, ident)}:", *lines]))
    return "\n" + "\n\n".join(parts)


def _keep(stacks: str, folder: Path, rank: int, step: int) -> None:
    """Adds the stacks to those of the rank at this step, under a line that says who waited."""
    own = [part for part in stacks.split("\nThread ") if "training_steps" in part] or [stacks]
    head = {"rank": rank, "step": step, "waited": bool(_WAITING.search(own[0]))}
    with (folder / f"step-{step:08d}-rank-{rank}.txt").open("a") as stream:
        stream.write(f"{_HEAD}{json.dumps(head)}\n{stacks}\n")
        stream.flush()
        os.fsync(stream.fileno())


def hangs(folder: Path) -> list[Hang]:
    """The hangs of a run that were not told yet, by step."""
    events: dict[tuple[int, int], dict[int, bool]] = {}
    for path in sorted((folder / "hangs").glob("step-*.txt")):
        lines = [line for line in path.read_text().splitlines() if line.startswith(_HEAD)]
        for number, line in enumerate(lines):
            head = json.loads(line.removeprefix(_HEAD))
            events.setdefault((head["step"], number), {})[head["rank"]] = head["waited"]
    found = []
    for (step, _), waited in sorted(events.items()):
        guilty = tuple(rank for rank, was_waiting in sorted(waited.items()) if not was_waiting)
        found.append(Hang(step, guilty or tuple(sorted(waited))))
    return found


def forget(folder: Path) -> Path:
    """Moves the stacks of hangs aside, so that they count no more; returns where they are."""
    target = folder / f"hangs-{int(time.time())}"
    (folder / "hangs").rename(target)
    return target


class Pace:
    """Compares how long ranks need for what they do alone: reading and the forward pass.

    Updates themselves take equally long on all of them, because the fast wait for the slow.
    """

    # Over the median of the other ranks, and worth so much of an update.
    SLOW, WORTH = 1.5, 0.1
    # Updates that are compared at a time, and comparisons in a row that must agree: single ones
    # differ by 5 times and more where a machine has other work.
    UPDATES, AGREEING = 10, 3

    def __init__(self, *, rank: int, workers: int) -> None:
        self._rank, self._workers = rank, workers
        self._own: list[float] = []
        self._since = time.perf_counter()
        self._suspects: list[int] = []

    def add(self, own_seconds: float) -> None:
        """Takes an update in, with the seconds of this rank's own work."""
        self._own.append(own_seconds)

    def compare(self) -> str:
        """Over the updates since the last comparison, all ranks together; of too few, none is made.

        Returns:
            On rank 0, a line that names the rank that is slow again; else "".
        """
        if self._workers == 1 or len(self._own) < self.UPDATES:
            return ""
        now, own = time.perf_counter(), self._own
        update = (now - self._since) / len(own)
        self._own, self._since = [], now
        mine = torch.tensor([statistics.median(own)], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            mine = mine.cuda()
        every = [torch.zeros_like(mine) for _ in range(self._workers)]
        dist.all_gather(every, mine)
        seconds = [float(one) for one in every]
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        usual = statistics.median(seconds[:rank] + seconds[rank + 1 :])
        worth = (seconds[rank] - usual) / update
        if seconds[rank] <= self.SLOW * usual or worth <= self.WORTH:
            self._suspects = []
            return ""
        self._suspects.append(rank)
        # Told once, not at every line.
        if self._rank or self._suspects[-self.AGREEING :] != [rank] * self.AGREEING:
            return ""
        if self._suspects[-self.AGREEING - 1 : -self.AGREEING] == [rank]:
            return ""
        return (
            f"rank {rank} is slow: {seconds[rank]:.3f} s an update of its own work, "
            f"{seconds[rank] / usual:.1f} times the others, who wait for it; look at its machine"
        )
