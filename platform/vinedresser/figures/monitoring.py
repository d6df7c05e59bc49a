"""Figures of the readings that a monitor takes while a model trains (methods.md 101-106)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.2)  # inches; 700 x 420 pixels in a browser
# Readings whose median is "early" and "late", at most: single batches differ by factors of 3.
_TAKEN = 5
_EARLY, _LATE = "#9ecae1", "#08519c"
_COLORS = ("tab:red", "tab:orange", "tab:blue", "tab:green", "0.5")


@dataclass(frozen=True)
class Reading:
    """Statistics of one training step.

    Attributes:
        step: 1-based.
        overall: metrics of the whole model, see `health.readings.Readings.take`.
        layers: name -> `gradient_norm`, `gradient_max_abs` (before clipping), `parameter_norm`
            (sqrt(sum p^2), before the update), `update_ratio` (|update| / |weights| of matrices;
            biases start at 0; absent where there is none), and for layers that are called as
            modules `activation_min` and `activation_max`.
        functions: activation functions by place, `encoder.0.feed_forward relu` -> `dead` and
            `units` for a ReLU; `saturated` (a share) for tanh, sigmoid, the gates of a GLU, and
            those of a recurrent layer, `decoder.0.rnn gates`.
        encoder_layers: how many of `layers`, the first ones, are of the encoder.
    """

    step: int
    overall: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]]
    functions: Mapping[str, Mapping[str, float]]
    encoder_layers: int = 0


def gradients_by_layer(history: Sequence[Reading]) -> "Figure":
    """Draw the gradient norm of each layer, early against late in the run (methods.md 106).

    The source's side is on top, the output at the bottom. A bar that is decades shorter than its
    neighbours learns nothing; all early bars far above the late ones are an explosion survived. The
    history has at least one reading with gradients.
    """
    from matplotlib.figure import Figure

    early, late = (
        {
            layer: statistics.median(r.layers[layer].get("gradient_norm", 0.0) for r in part)
            for layer, values in history[0].layers.items()
            if "gradient_norm" in values
        }
        for part in (history[:_TAKEN], history[-_TAKEN:])
    )
    height = max(_SIZE[1], 0.9 + 0.26 * len(early))
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    positions = range(len(early))
    for values, color, shift, part in (
        (early, _EARLY, -0.2, history[:_TAKEN]),
        (late, _LATE, 0.2, history[-_TAKEN:]),
    ):
        first, last = part[0].step, part[-1].step
        label = f"steps {first} to {last}" if first < last else f"step {first}"
        bars = list(values.values())
        axes.barh([p + shift for p in positions], bars, height=0.4, color=color, label=label)
    positive = [v for v in (*early.values(), *late.values()) if v > 0]
    axes.set_xscale("log")
    if positive:
        axes.set_xlim(min(positive) / 3, max(positive) * 3)
    axes.set_yticks(list(positions), list(early))
    axes.invert_yaxis()
    axes.set_xlabel("gradient norm before clipping (median)")
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def readings_over_steps(
    history: Sequence[Reading], *, usual_ratio: tuple[float, float]
) -> "Figure":
    """Draw six panels over the steps: gradients, updates, weights, activations, ReLUs, memory.

    The range of usual update ratios is shaded.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _SIZE[0], 1.6 * _SIZE[1]), layout="constrained")
    (gradients, ratios, weights), (extremes, shares, memory) = figure.subplots(2, 3, sharex=True)
    _by_layer(gradients, history, "gradient_norm", "gradient norm of each layer")
    _by_layer(ratios, history, "update_ratio", "|update| / |weights| of each layer")
    ratios.axhspan(*usual_ratio, color="tab:green", alpha=0.07, linewidth=0)
    _by_layer(weights, history, "parameter_norm", "norm of the weights of each layer")
    steps, lows = _overall(history, "activation_min")
    _, highs = _overall(history, "activation_max")
    extremes.fill_between(steps, lows, highs, color=_EARLY, linewidth=0)
    extremes.plot(steps, lows, color=_LATE, linewidth=1)
    extremes.plot(steps, highs, color=_LATE, linewidth=1)
    extremes.set_title("smallest and largest activation")
    _worst_shares(shares, history)
    memory.plot(*_overall(history, "memory_mb"), color=_EARLY, label="resident")
    memory.plot(*_overall(history, "allocated_mb"), color=_LATE, label="in use")
    memory.set_ylim(0, 1.15 * max([1.0, *_overall(history, "memory_mb")[1]]))
    memory.set_title("memory, MB")
    memory.legend(frameon=False, fontsize="small", ncols=2)
    for axes in figure.axes:
        axes.grid(visible=True, color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (extremes, shares, memory):
        axes.set_xlabel("optimizer updates")
    handles, labels = gradients.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _overall(history: Sequence[Reading], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric of the whole model."""
    found = [(r.step, r.overall[name]) for r in history if name in r.overall]
    return [step for step, _ in found], [value for _, value in found]


def _by_layer(axes: "Axes", history: Sequence[Reading], name: str, title: str) -> None:
    """Draw a line per layer: the encoder blue, the decoder orange, darker towards the output."""
    from matplotlib import colormaps

    layers, middle = list(history[0].layers), history[0].encoder_layers
    for side, shades in ((layers[:middle], "Blues"), (layers[middle:], "Oranges")):
        for i, layer in enumerate(side, 1):
            points = [(r.step, r.layers[layer][name]) for r in history if name in r.layers[layer]]
            axes.plot(
                [step for step, _ in points],
                [value if value > 0 else math.nan for _, value in points],
                color=colormaps[shades](0.35 + 0.6 * i / len(side)),
                linewidth=1.2,
                label=layer,
            )
    axes.set_yscale("log")
    axes.set_title(title)


def _worst_shares(axes: "Axes", history: Sequence[Reading]) -> None:
    """Draw the activation functions with the most dead or saturated units."""
    found: dict[str, list[tuple[int, float]]] = {}
    for reading in history:
        for function, values in reading.functions.items():
            share = values.get("saturated", values.get("dead", 0) / values.get("units", 1))
            found.setdefault(function, []).append((reading.step, 100 * share))
    worst = sorted(found, key=lambda function: -max(share for _, share in found[function]))
    worst = worst[: len(_COLORS)]
    for function, color in zip(worst, _COLORS, strict=False):
        axes.plot(*zip(*found[function], strict=True), color=color, linewidth=1.2, label=function)
    shares = [share for function in worst for _, share in found[function]]
    axes.set_ylim(0, max([1.0, *shares]) * (1.1 + 0.1 * len(worst)))  # room for the legend
    axes.set_title("dead ReLU units and saturated outputs, %")
    if worst:
        axes.legend(frameon=False, fontsize="small")
