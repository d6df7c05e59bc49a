"""How a run looks while it trains: a bar at the foot of a terminal, else a line now and then."""

import contextlib
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vinedresser.training.progress import Best, Progress, Tell

Now = Callable[[], float]

# Seconds between two pictures of the bar, and between two lines.
_FRAME, _LINE = 0.25, 5.0
# Speed is that of the last minute: so many points, a second or more apart.
_POINTS = 60
# Before so many updates, unless they take so long, nothing is said of the end: the first ones were
# seen to take five times what the others do.
_SURE_STEPS, _SURE_SECONDS = 5, 20.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK = 16


@contextlib.contextmanager
def watching(say: Callable[[str], None], *, console: Console | None = None) -> Iterator[Tell]:
    """Shows what it is told until the block ends: a bar on a terminal, else lines through `say`.

    Above the bar appears what is written to `sys.stderr` meanwhile, and to `sys.stdout` where that
    is a terminal too.
    """
    console = console or Console(stderr=True)
    can_draw = console.is_terminal and not console.is_dumb_terminal
    if not (can_draw and console.encoding.startswith("utf")):
        yield Lines(say)
        return
    # Without a thread of its own: there is something new to draw only when something was told.
    first = Text("data, model and optimizer are made ready", style="dim")
    # What goes into a pipe stays what it is.
    both = sys.stdout.isatty()
    with Live(
        first, console=console, auto_refresh=False, transient=True, redirect_stdout=both
    ) as live:
        yield Bar(lambda picture: live.update(picture, refresh=True))


class Clock:
    """How long a run will still take, from the speed of its last minute.

    Evaluations are counted by themselves, at the mean time of those that were seen.
    """

    def __init__(self, now: Now = time.monotonic) -> None:
        self._now = now
        self._points: deque[tuple[float, int]] = deque(maxlen=_POINTS)
        self._first = self._last = Progress(0, 0, 0.0, 0)
        self._judging_since: float | None = None
        self._judged = self._at = 0.0
        self._evaluations = 0

    def see(self, progress: Progress) -> None:
        """Takes in where the run is now."""
        now = self._now()
        if self._judging_since is not None and progress.phase == "training":
            self._judged += now - self._judging_since
            self._evaluations += 1
            self._judging_since = None
        elif progress.phase == "evaluating":
            self._judging_since = now
        self._at = now - self._judged
        if not self._last.steps:
            self._first = progress
        # The first update allocates and compiles: the clock starts after it.
        is_due = not self._points or self._at - self._points[-1][0] >= 1
        if progress.step > self._first.step and is_due:
            self._points.append((self._at, progress.step))
        self._last = progress

    @property
    def seconds_left(self) -> float:
        """To the end of the run; nan before anything can be said."""
        if not self._points:
            return math.nan
        start, first = self._points[0]
        steps, seconds = self._last.step - first, self._at - start
        if steps == 0 or (steps < _SURE_STEPS and seconds < _SURE_SECONDS):
            return math.nan
        a_step = seconds / steps
        an_evaluation = self._judged / max(self._evaluations, 1)
        left = self._last.steps - self._last.step
        return left * a_step + self._last.evaluations_left * an_evaluation


class Lines:
    """A plain line at log lines, five seconds apart or more."""

    def __init__(self, say: Callable[[str], None], *, now: Now = time.monotonic) -> None:
        self._say, self._now, self._clock = say, now, Clock(now)
        self._said = now() - _LINE

    def __call__(self, progress: Progress) -> None:
        """Takes in where the run is, and says it where it is time."""
        self._clock.see(progress)
        if progress.loss is None or self._now() - self._said < _LINE:
            return
        self._said = self._now()
        said = [
            f"step {progress.step}/{progress.steps}",
            f"epoch {_epoch(progress.epoch)}",
            f"loss {progress.loss:.2f}",
            f"{quantity(progress.tokens_per_second or 0)} tok/s",
            _eta(self._clock.seconds_left),
            _best(progress.best),
        ]
        self._say("  ".join(part for part in said if part))


class Bar:
    """Two lines: how far it is, and how it goes."""

    def __init__(
        self, show: Callable[[RenderableType], None], *, now: Now = time.monotonic
    ) -> None:
        self._show, self._now, self._clock = show, now, Clock(now)
        self._shown = -math.inf
        self._losses: list[float] = []
        self._rate = 0.0
        self._phase = ""

    def __call__(self, progress: Progress) -> None:
        """Takes in where the run is; draws four times a second at most."""
        self._clock.see(progress)
        if progress.loss is not None:
            self._losses.append(progress.loss)
            self._rate = progress.tokens_per_second or 0.0
        now = self._now()
        if now - self._shown >= _FRAME or progress.phase != self._phase:
            self._shown, self._phase = now, progress.phase
            self._show(self._picture(progress))

    def _picture(self, progress: Progress) -> RenderableType:
        far = Table.grid(padding=(0, 1), expand=True)
        far.add_column(ratio=1)
        far.add_column(no_wrap=True)
        is_judged = progress.phase == "evaluating"
        eta = "evaluating" if is_judged else _eta(self._clock.seconds_left) or "ETA -:--"
        # Columns of fixed widths, so that the bar does not tremble.
        total = str(progress.steps)
        where = Text(f"{progress.step:>{len(total)}}/{total}  epoch {_epoch(progress.epoch):<4} ")
        where.append(f"{eta:<10}", style="bold")
        bar = ProgressBar(total=progress.steps, completed=progress.step)
        far.add_row(bar, where)
        return Group(far, self._how(progress))

    def _how(self, progress: Progress) -> Text:
        """Loss with its curve, speed, best; what has no room is cut off."""
        how = Text(no_wrap=True, overflow="ellipsis")
        if not self._losses:
            return how.append("the first loss comes with the first log line", style="dim")
        how.append(f"loss {self._losses[-1]:.2f} ", style="cyan")
        how.append(sparkline(self._losses), style="cyan dim")
        how.append(f"  {quantity(self._rate)} tok/s")
        if progress.best:
            how.append("  ").append(_best(progress.best), style="green")
        return how


def sparkline(values: Sequence[float], width: int = _SPARK) -> str:
    """A curve in one line of at most `width` characters, each the mean of its share of values."""
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
    """Three digits: 987, 11.2k, 1.05M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(max(value / size, 1))))
            return f"{value / size:.{digits}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """1:32, 2:05:10, 3d 04h."""
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
