"""Display of a training run: a bar on a terminal, else a line every few seconds."""

import contextlib
import itertools
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vinedresser.config import Experiment
from vinedresser.training.listener import Best, Listener, Progress

_log = logging.getLogger(__name__)

Now = Callable[[], float]

# Seconds between two frames of the bar, and between two lines.
_FRAME, _LINE = 0.25, 5.0
# Points over which the speed is measured, a second or more apart.
_POINTS = 60
# Updates, or seconds, before the time left is shown: the first updates took up to five times as
# long as the others.
_SURE_STEPS, _SURE_SECONDS = 5, 20.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 16


@contextlib.contextmanager
def watching(experiment: Experiment, *, console: Console | None = None) -> Iterator[Listener]:
    """Display a run until the block ends: a bar on a terminal, else log lines.

    Text that is written to `sys.stderr` meanwhile appears above the bar, and text to `sys.stdout`
    where that is a terminal too.
    """
    console = console or Console(stderr=True)
    can_draw = console.is_terminal and not console.is_dumb_terminal
    if not (can_draw and console.encoding.startswith("utf")):
        yield LogLines(experiment)
        return
    # No refresh thread: the bar changes only with new progress.
    first = Text("preparing data, model and optimizer", style="dim")
    # Output to a pipe is not redirected.
    both = sys.stdout.isatty()
    with Live(
        first, console=console, auto_refresh=False, transient=True, redirect_stdout=both
    ) as live:
        yield Bar(experiment, lambda frame: live.update(frame, refresh=True))


class TimeLeft:
    """Estimate of the remaining time of a run, from the speed of its last minute.

    Evaluations are added separately, at their mean time so far.
    """

    def __init__(self, now: Now = time.monotonic) -> None:
        self._now = now
        self._points: deque[tuple[float, int]] = deque(maxlen=_POINTS)
        self._first = self._last = Progress(0, 0, 0.0, 0)
        self._evaluating_since: float | None = None
        self._evaluated = self._at = 0.0
        self._evaluations = 0

    def add(self, progress: Progress) -> None:
        """Add the current progress."""
        now = self._now()
        if self._evaluating_since is not None and progress.phase == "training":
            self._evaluated += now - self._evaluating_since
            self._evaluations += 1
            self._evaluating_since = None
        elif progress.phase == "evaluating":
            self._evaluating_since = now
        self._at = now - self._evaluated
        if not self._last.steps:
            self._first = progress
        # The first update is excluded: it allocates and compiles.
        is_due = not self._points or self._at - self._points[-1][0] >= 1
        if progress.step > self._first.step and is_due:
            self._points.append((self._at, progress.step))
        self._last = progress

    @property
    def seconds(self) -> float:
        """Seconds to the end of the run; nan before an estimate is possible."""
        if not self._points:
            return math.nan
        start, first = self._points[0]
        steps, seconds = self._last.step - first, self._at - start
        if steps == 0 or (steps < _SURE_STEPS and seconds < _SURE_SECONDS):
            return math.nan
        per_step = seconds / steps
        per_evaluation = self._evaluated / max(self._evaluations, 1)
        left = self._last.steps - self._last.step
        return left * per_step + self._last.evaluations_left * per_evaluation


class Evaluations(Listener):
    """A log line per evaluation."""

    def __init__(self, experiment: Experiment) -> None:
        self._metric, self._steps = experiment.task.metric, experiment.steps

    def evaluated(self, report: Mapping[str, Any]) -> None:
        """Log the inferred metric, its best value so far and the teacher-forced loss."""
        if f"dev/{self._metric}" in report:
            _log.info(
                "step %.0f/%d  %s %.2f  best %.2f  teacher-forced %.3f nats",
                report["step"], self._steps, self._metric, report[f"dev/{self._metric}"],
                report[f"best/{self._metric}"], report["dev/teacher_forced_loss"],
            )  # fmt: skip

    finished = evaluated


class LogLines(Evaluations):
    """A log line per closed metrics window, at least five seconds apart."""

    def __init__(self, experiment: Experiment, *, now: Now = time.monotonic) -> None:
        super().__init__(experiment)
        self._now, self._left, self._logged = now, TimeLeft(now), now() - _LINE

    def progress(self, progress: Progress) -> None:
        """Log the progress if a line is due."""
        self._left.add(progress)
        if progress.loss is None or self._now() - self._logged < _LINE:
            return
        self._logged = self._now()
        parts = [
            f"step {progress.step}/{progress.steps}",
            f"epoch {_epoch(progress.epoch)}",
            f"loss {progress.loss:.2f}",
            f"{quantity(progress.tokens_per_second or 0)} tok/s",
            _eta(self._left.seconds),
            _best(progress.best),
        ]
        _log.info("%s", "  ".join(part for part in parts if part))


class Bar(Evaluations):
    """Two lines at the bottom of a terminal: progress, and loss with speed."""

    def __init__(
        self,
        experiment: Experiment,
        show: Callable[[RenderableType], None],
        *,
        now: Now = time.monotonic,
    ) -> None:
        super().__init__(experiment)
        self._show, self._now, self._left = show, now, TimeLeft(now)
        self._shown = -math.inf
        self._losses: list[float] = []
        self._rate = 0.0
        self._phase = ""

    def progress(self, progress: Progress) -> None:
        """Draw the progress, at most four times per second."""
        self._left.add(progress)
        if progress.loss is not None:
            self._losses.append(progress.loss)
            self._rate = progress.tokens_per_second or 0.0
        now = self._now()
        if now - self._shown >= _FRAME or progress.phase != self._phase:
            self._shown, self._phase = now, progress.phase
            self._show(self._frame(progress))

    def _frame(self, progress: Progress) -> RenderableType:
        position = Table.grid(padding=(0, 1), expand=True)
        position.add_column(ratio=1)
        position.add_column(no_wrap=True)
        is_evaluating = progress.phase == "evaluating"
        eta = "evaluating" if is_evaluating else _eta(self._left.seconds) or "ETA -:--"
        # Fixed column widths keep the bar at the same position.
        total = str(progress.steps)
        label = Text(f"{progress.step:>{len(total)}}/{total}  epoch {_epoch(progress.epoch):<4} ")
        label.append(f"{eta:<10}", style="bold")
        bar = ProgressBar(total=progress.steps, completed=progress.step)
        position.add_row(bar, label)
        # Cut off on a narrow terminal.
        quality = Text(no_wrap=True, overflow="ellipsis")
        if self._losses:
            quality.append(f"loss {self._losses[-1]:.2f} ", style="cyan")
            quality.append(sparkline(self._losses), style="cyan dim")
            quality.append(f"  {quantity(self._rate)} tok/s")
            if progress.best:
                quality.append("  ").append(_best(progress.best), style="green")
        else:
            quality.append("the first loss appears after the first log interval", style="dim")
        return Group(position, quality)


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """Return a one-line curve of at most `width` characters, each a mean of values."""
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BLOCKS) - 1) / ((high - low) or 1.0)
    return "".join(
        _BLOCKS[round((value - low) * scale)] if math.isfinite(value) else "?" for value in values
    )


def quantity(value: float) -> str:
    """Format a number with three digits: 987, 11.2k, 1.05M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(max(value / size, 1))))
            return f"{value / size:.{digits}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Format seconds as 1:32, 2:05:10 or 3d 04h."""
    whole = round(seconds)
    if whole >= 100 * 3600:
        return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _epoch(epoch: float) -> str:
    return f"{epoch:.2f}" if epoch < 1 else f"{epoch:.1f}"


def _eta(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"ETA {duration(seconds)}"


def _best(best: Best | None) -> str:
    return f"best {best.metric} {best.value:.2f} (step {best.step})" if best else ""
