"""Figures that belong to a run in the tracking store."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vinedresser.model import is_of_encoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vinedresser.health.monitors import Reading

_SIZE = (7.0, 4.2)  # inches; 700 x 420 pixels in a browser


def curves(history: Sequence[Mapping[str, float]], *, metric: str, chosen: int) -> "Figure":
    """Teacher-forced loss and inferred metric over the steps, the shipped step marked.

    Where the two part ways is exposure bias (methods.md 15).

    Args:
        history: entries with step, value and teacher_forced_nats.
        metric: name of the value.
        chosen: step of the model that ships.
    """
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=_SIZE, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(steps, [e["value"] for e in history], "o-", color="tab:blue")
    right.plot(steps, [e["teacher_forced_nats"] for e in history], "s--", color="tab:orange")
    left.axvline(chosen, color="0.6", linewidth=1)
    left.set_xlabel("optimizer updates (line: the model that ships)")
    left.set_ylabel(f"inferred dev {metric}", color="tab:blue")
    right.set_ylabel("teacher-forced dev loss, nats a token", color="tab:orange")
    return figure


def heads_against_quality(
    points: Sequence[tuple[float, float]], *, metric: str, whole: tuple[float, float], taken: float
) -> "Figure":
    """Open heads against the inferred metric of each pruning trial.

    Args:
        points: (heads, value) a trial.
        metric: name of the value.
        whole: the same of the model before pruning.
        taken: heads of the chosen trial.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot([p[0] for p in points], [p[1] for p in points], "o", label="pruning trials")
    axes.plot(*whole, "D", color="tab:orange", label="before pruning")
    chosen = [p for p in points if p[0] == taken]
    axes.plot(
        [p[0] for p in chosen],
        [p[1] for p in chosen],
        "o",
        markersize=14,
        markerfacecolor="none",
        color="tab:green",
        label="taken",
    )
    axes.set_xlabel("open heads")
    axes.set_ylabel(f"inferred dev {metric}")
    axes.legend()
    return figure


# Readings that "early" and "late" are medians of, at most: single batches differ by factors of 3.
_TAKEN = 5
_EARLY, _LATE = "#9ecae1", "#08519c"
_COLORS = ("tab:red", "tab:orange", "tab:blue", "tab:green", "0.5")
# What most runs stay within; beyond it the symptom `update_ratio` speaks.
_USUAL_RATIO = (1e-5, 1e-1)


def gradients_by_layer(history: Sequence["Reading"]) -> "Figure":
    """Gradient norm of each layer, early against late in the run (methods.md 106).

    The source's side is on top, the output at the bottom. A bar that is decades shorter than its
    neighbours learns nothing; all early bars far above the late ones are an explosion survived.

    Args:
        history: at least one reading with gradients.
    """
    from matplotlib.figure import Figure

    early, late = _early_and_late(history, "gradient_norm")
    layers = [layer for layer in history[0].layers if layer in early]
    height = max(_SIZE[1], 0.9 + 0.26 * len(layers))
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    positions = range(len(layers))
    for values, color, shift, (first, last) in (
        (early, _EARLY, -0.2, _span(history[:_TAKEN])),
        (late, _LATE, 0.2, _span(history[-_TAKEN:])),
    ):
        bars = [values[layer] for layer in layers]
        label = f"steps {first} to {last}" if first < last else f"step {first}"
        axes.barh([p + shift for p in positions], bars, height=0.4, color=color, label=label)
    positive = [v for v in (*early.values(), *late.values()) if v > 0]
    axes.set_xscale("log")
    if positive:
        axes.set_xlim(min(positive) / 3, max(positive) * 3)
    axes.set_yticks(list(positions), layers)
    axes.invert_yaxis()
    axes.set_xlabel("gradient norm before clipping (median)")
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def monitors_over_steps(history: Sequence["Reading"]) -> "Figure":
    """Six panels over the steps: gradients, updates, weights, activations, ReLUs, memory.

    Args:
        history: at least one reading.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _SIZE[0], 1.6 * _SIZE[1]), layout="constrained")
    (gradients, ratios, weights), (ends, shares, memory) = figure.subplots(2, 3, sharex=True)
    _by_layer(gradients, history, "gradient_norm", "gradient norm of each layer")
    _by_layer(ratios, history, "update_ratio", "|update| / |weights| of each layer")
    ratios.axhspan(*_USUAL_RATIO, color="tab:green", alpha=0.07, linewidth=0)
    _by_layer(weights, history, "parameter_norm", "norm of the weights of each layer")
    _range_of_activations(ends, history)
    _shares(shares, history)
    memory.plot(*_of_all(history, "memory_mb"), color=_EARLY, label="resident")
    memory.plot(*_of_all(history, "allocated_mb"), color=_LATE, label="in use")
    memory.set_ylim(0, 1.15 * max([1.0, *_of_all(history, "memory_mb")[1]]))
    memory.set_title("memory, MB")
    memory.legend(frameon=False, fontsize="small", ncols=2)
    for axes in figure.axes:
        axes.grid(visible=True, color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (ends, shares, memory):
        axes.set_xlabel("optimizer updates")
    handles, labels = gradients.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _span(history: Sequence["Reading"]) -> tuple[int, int]:
    return history[0].step, history[-1].step


def _early_and_late(
    history: Sequence["Reading"], name: str
) -> tuple[dict[str, float], dict[str, float]]:
    early, late = (
        {
            layer: statistics.median(r.layers[layer].get(name, 0.0) for r in part)
            for layer, values in history[0].layers.items()
            if name in values
        }
        for part in (history[:_TAKEN], history[-_TAKEN:])
    )
    return early, late


def _of_all(history: Sequence["Reading"], name: str) -> tuple[list[int], list[float]]:
    found = [(r.step, r.overall[name]) for r in history if name in r.overall]
    return [step for step, _ in found], [value for _, value in found]


def _by_layer(axes: "Axes", history: Sequence["Reading"], name: str, title: str) -> None:
    """A line a layer: the encoder's blue, the decoder's orange, darker towards the output."""
    from matplotlib import colormaps

    layers = list(history[0].layers)
    sides = [[la for la in layers if is_of_encoder(la) == is_source] for is_source in (True, False)]
    for layer in layers:
        side, shades = (
            sides[not is_of_encoder(layer)],
            "Blues" if is_of_encoder(layer) else "Oranges",
        )
        points = [(r.step, r.layers[layer][name]) for r in history if name in r.layers[layer]]
        color = colormaps[shades](0.35 + 0.6 * (side.index(layer) + 1) / len(side))
        axes.plot(
            [step for step, _ in points],
            [value if value > 0 else math.nan for _, value in points],
            color=color,
            linewidth=1.2,
            label=layer,
        )
    axes.set_yscale("log")
    axes.set_title(title)


def _range_of_activations(axes: "Axes", history: Sequence["Reading"]) -> None:
    steps, lows = _of_all(history, "activation_min")
    _, highs = _of_all(history, "activation_max")
    axes.fill_between(steps, lows, highs, color=_EARLY, linewidth=0)
    axes.plot(steps, lows, color=_LATE, linewidth=1)
    axes.plot(steps, highs, color=_LATE, linewidth=1)
    axes.set_title("smallest and largest activation")


def _shares(axes: "Axes", history: Sequence["Reading"]) -> None:
    """The places with the most dead or saturated units."""
    found: dict[str, list[tuple[int, float]]] = {}
    for reading in history:
        for place, values in reading.places.items():
            share = values.get("saturated", values.get("dead", 0) / values.get("units", 1))
            found.setdefault(place, []).append((reading.step, 100 * share))
    worst = sorted(found, key=lambda place: -max(share for _, share in found[place]))
    worst = worst[: len(_COLORS)]
    for place, color in zip(worst, _COLORS, strict=False):
        axes.plot(*zip(*found[place], strict=True), color=color, linewidth=1.2, label=place)
    shares = [share for place in worst for _, share in found[place]]
    axes.set_ylim(0, max([1.0, *shares]) * (1.1 + 0.1 * len(worst)))  # room for the legend
    axes.set_title("dead ReLU units and saturated outputs, %")
    if worst:
        axes.legend(frameon=False, fontsize="small")
