"""Watchdog: detection of ranks that hang and of ranks that are slow.

A rank in a collective operation waits for ever if another rank never enters it. Each rank has a
timer that every update resets; when it expires, the stacks of all threads are written to the run's
folder and the process ends, so that the group can be restarted. The stacks show which rank waited
for which.
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

from vinedresser.training.device import Device
from vinedresser.training.schedule import Due
from vinedresser.workspace.storage import make_folder

# A timer expires no earlier than this many times the longest update so far.
_LONGEST = 10.0
# Ranks expire within this many seconds of each other; none ends before all have written.
_GRACE_SECONDS = 5.0
# In the stack of a rank that waits for the others.
_WAITING = re.compile(r" in (all_reduce|all_gather\w*|broadcast\w*|barrier|backward|report)\b")
_HEAD = "== "


@dataclass(frozen=True)
class Hang:
    """One hang of a run.

    Attributes:
        step: the update (1-based) that never ended.
        ranks: the ranks that were not waiting for others; all of them where that is unknown.
    """

    step: int
    ranks: tuple[int, ...]

    @property
    def text(self) -> str:
        """Ranks for a message: rank 1, or ranks 0 and 1."""
        names = [str(rank) for rank in self.ranks]
        return f"rank {names[0]}" if len(names) == 1 else f"ranks {' and '.join(names)}"


class Watchdog:
    """Timer of one rank, used as a context around all of its updates.

    Does nothing for a run of one worker.
    """

    # Factors of the timeout where more than an update comes before the next reset: 60 s become 10
    # minutes while the group meets for the first time or rank 0 writes a checkpoint, and half an
    # hour, the timeout of torch.distributed, while rank 0 decodes the dev split.
    CHECKPOINT, EVALUATION = 10.0, 30.0

    def __init__(self, folder: Path, device: Device, *, seconds: float) -> None:
        """Args: folder of the stacks, this rank, and the timeout; 0 never expires."""
        self._folder, self._rank, self._seconds = folder, device.rank, seconds
        self._is_on = device.world_size > 1 and seconds > 0
        self._step = 0
        self._deadline = self._last = self._longest = 0.0
        self._was_paused = True
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self._is_on:
            make_folder(self._folder)
            self.reset(0, pause=self.CHECKPOINT)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
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

    def reset(self, step: int, *, pause: float = 1.0) -> None:
        """Reset the timer.

        `step` is the last update that is done; `pause` is a factor of the timeout, above 1 where
        more is done before the next update.
        """
        if not self._is_on:
            return
        now = time.monotonic()
        if not self._was_paused:
            self._longest = max(self._longest, now - self._last)
        self._step, self._last, self._was_paused = step, now, pause > 1
        self._deadline = now + max(self._seconds, _LONGEST * self._longest) * pause

    @classmethod
    def pause_of(cls, due: Due) -> float:
        """Return the factor of the timeout for what is due after an update."""
        return cls.EVALUATION if due.evaluate else cls.CHECKPOINT if due.checkpoint else 1.0

    def _watch(self) -> None:
        """End the process when the timer expires, after its stacks were written."""
        while not self._over.wait(min(1.0, self._seconds / 10)):
            if time.monotonic() > self._deadline + min(_GRACE_SECONDS, self._seconds) / 2:
                with contextlib.suppress(OSError):  # the process ends without stacks too
                    _write_stacks(_stacks(), self._folder, self._rank, self._step + 1)
                time.sleep(min(_GRACE_SECONDS, self._seconds))
                os._exit(1)


def _stacks() -> str:
    """Return the stacks of all threads, the most recent call first.

    Not by faulthandler: it reads running threads without the interpreter's lock and crashed with
    SIGSEGV within 4 dumps next to three busy threads (Python 3.11).
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


def _write_stacks(stacks: str, folder: Path, rank: int, step: int) -> None:
    """Append the stacks to those of the rank at this step, under a line with rank and state."""
    own = [part for part in stacks.split("\nThread ") if "training_steps" in part] or [stacks]
    head = {"rank": rank, "step": step, "waited": bool(_WAITING.search(own[0]))}
    with (folder / f"step-{step:08d}-rank-{rank}.txt").open("a") as stream:
        stream.write(f"{_HEAD}{json.dumps(head)}\n{stacks}\n")
        stream.flush()
        os.fsync(stream.fileno())


def hangs(folder: Path) -> list[Hang]:
    """Return the hangs of a run that were not reported yet, by step."""
    events: dict[tuple[int, int], dict[int, bool]] = {}
    for path in sorted(folder.glob("step-*.txt")):
        lines = [line for line in path.read_text().splitlines() if line.startswith(_HEAD)]
        for number, line in enumerate(lines):
            head = json.loads(line.removeprefix(_HEAD))
            events.setdefault((head["step"], number), {})[head["rank"]] = head["waited"]
    found = []
    for (step, _), waited in sorted(events.items()):
        guilty = tuple(rank for rank, was_waiting in sorted(waited.items()) if not was_waiting)
        found.append(Hang(step, guilty or tuple(sorted(waited))))
    return found


def archive_hangs(folder: Path) -> Path:
    """Rename the folder of stacks, so that they count no more; return its new path."""
    return folder.rename(folder.with_name(f"{folder.name}-{int(time.time())}"))


class StragglerDetector:
    """Comparison of the time that ranks need for their own work: reading and the forward pass.

    Whole updates take equally long on all of them, because fast ranks wait for slow ones.
    """

    # Slow: over 1.5 times the median of the other ranks, by at least 0.1 of an update.
    SLOW, WORTH = 1.5, 0.1
    # Updates per comparison, and consecutive comparisons that must agree: single ones differ by 5
    # times and more on a machine with other load.
    UPDATES, AGREEING = 10, 3

    def __init__(self, device: Device) -> None:
        self._device = device
        self._own: list[float] = []
        self._since = time.perf_counter()
        self._suspects: list[int] = []

    def add(self, own_seconds: float) -> None:
        """Add an update, with the seconds of this rank's own work."""
        self._own.append(own_seconds)

    def compare(self) -> str:
        """Compare the ranks over the updates since the last comparison; a barrier.

        Returns:
            On rank 0, a line with the rank that is slow repeatedly; else "".
        """
        if self._device.world_size == 1 or len(self._own) < self.UPDATES:
            return ""
        now, own = time.perf_counter(), self._own
        update = (now - self._since) / len(own)
        self._own, self._since = [], now
        mine = torch.tensor([statistics.median(own)], dtype=torch.float64)
        if dist.get_backend() == "nccl":
            mine = mine.cuda()
        every = [torch.zeros_like(mine) for _ in range(self._device.world_size)]
        dist.all_gather(every, mine)
        seconds = [float(one) for one in every]
        rank = max(range(len(seconds)), key=seconds.__getitem__)
        usual = statistics.median(seconds[:rank] + seconds[rank + 1 :])
        worth = (seconds[rank] - usual) / update
        if seconds[rank] <= self.SLOW * usual or worth <= self.WORTH:
            self._suspects = []
            return ""
        self._suspects.append(rank)
        # Reported once, not at every log line.
        if self._device.rank or self._suspects[-self.AGREEING :] != [rank] * self.AGREEING:
            return ""
        if self._suspects[-self.AGREEING - 1 : -self.AGREEING] == [rank]:
            return ""
        return (
            f"rank {rank} is slow: {seconds[rank]:.3f} s per update of its own work, "
            f"{seconds[rank] / usual:.1f} times the others, which wait for it; check its machine"
        )
