"""Figures of training and pruning runs for the tracking store."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.2)  # inches; 700 x 420 pixels in a browser


def curves(history: Sequence[Mapping[str, float]], *, metric: str, chosen: int) -> "Figure":
    """Draw teacher-forced loss and inferred metric over the steps, with the exported step marked.

    The steps where the two diverge show exposure bias (methods.md 15).
    """
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=_SIZE, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(steps, [e["value"] for e in history], "o-", color="tab:blue")
    right.plot(steps, [e["teacher_forced_loss"] for e in history], "s--", color="tab:orange")
    left.axvline(chosen, color="0.6", linewidth=1)
    left.set_xlabel("optimizer updates (line: exported model)")
    left.set_ylabel(f"inferred dev {metric}", color="tab:blue")
    right.set_ylabel("teacher-forced dev loss, nats per token", color="tab:orange")
    return figure


def heads_against_quality(
    points: Sequence[tuple[float, float]], *, metric: str, whole: tuple[float, float], taken: float
) -> "Figure":
    """Draw open heads against the inferred metric of each pruning trial.

    `points` and `whole`, the model before pruning, are (heads, value); `taken` are the heads of the
    chosen trial.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot([p[0] for p in points], [p[1] for p in points], "o", label="pruning trials")
    axes.plot(*whole, "D", color="tab:orange", label="before pruning")
    chosen = [p for p in points if p[0] == taken]
    ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "color": "tab:green"}
    axes.plot([p[0] for p in chosen], [p[1] for p in chosen], "o", label="taken", **ring)
    axes.set_xlabel("open heads")
    axes.set_ylabel(f"inferred dev {metric}")
    axes.legend()
    return figure
