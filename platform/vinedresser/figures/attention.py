"""Figures of attention maps: a figure per module, a panel per head, tokens or seconds on axes."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vinedresser.figures.attention_maps import AttentionMap, Axis

# Inches: a cell of the map, the longest side of a panel, a panel along time, a letter of a label
# and one of the title; between panels, above and next to them.
_CELL, _LONGEST, _TIME, _LETTER, _BOLD = 0.17, 7.5, 4.0, 0.068, 0.085
_GAP, _TITLE, _NAME, _BAR, _TOP = 0.25, 0.26, 0.2, 0.75, 0.28
_PANELS = 4  # in a row, at most
_POINTS = 7.0  # size of labels
_UPRIGHT = 2  # letters that fit over a cell without being turned


@dataclass(frozen=True)
class _Side:
    """Measures and labels of an axis.

    `name` holds the unit; `labels` are empty for a side that is time, `families` are their fonts;
    `length` counts positions, or seconds; a panel is `inches` long along it.
    """

    name: str
    labels: tuple[str, ...]
    families: tuple[str, ...]
    length: float
    inches: float

    @property
    def room(self) -> float:
        """Return the inches of labels perpendicular to the axis."""
        return 0.15 + _LETTER * max(map(_width, self.labels), default=4)

    def is_upright(self, label: str) -> bool:
        """Return true if a label below a panel fits without rotation."""
        return _width(label) <= _UPRIGHT and self.inches >= 0.9 * _CELL * self.length

    @property
    def foot(self) -> float:
        """Return the inches of labels below a panel."""
        return 0.25 if all(map(self.is_upright, self.labels)) else self.room


def attention_figure(found: "AttentionMap", *, note: str = "") -> "Figure":
    """Draw a map: rows attend to columns; the shade grows with the square root of the weight.

    The map has at least one head; the note is appended to the title.
    """
    from matplotlib.figure import Figure

    x, y = _sides(found)
    H = len(found.weights)
    columns = _columns(H)
    title = f"{found.name}: {found.rows.name} attends to {found.columns.name}"
    title += f", {note}" if note else ""
    left, foot = _NAME + y.room, _NAME + x.foot
    width = max(left + columns * (x.inches + _GAP) + _BAR, 0.2 + _BOLD * len(title))
    height = _TOP + -(-H // columns) * (y.inches + _TITLE) + foot
    picture = Figure(figsize=(width, height))
    titles = ["" if math.isnan(v) else f"   diagonality {v:.2f}" for v in found.diagonality]
    for head in range(H):
        line, column = divmod(head, columns)
        right, up = left + column * (x.inches + _GAP), _TOP + (line + 1) * (y.inches + _TITLE)
        axes = picture.add_axes(
            (right / width, 1 - up / height, x.inches / width, y.inches / height)
        )
        _draw(axes, found.weights[head], x, y)
        axes.set_title(f"head {head}{titles[head]}", fontsize=8, pad=3)
        _label(axes, "x", x, is_shown=head + columns >= H)
        _label(axes, "y", y, is_shown=column == 0)
    at = left + columns * (x.inches + _GAP) - 0.05
    _legend(picture, axes, (at / width, foot / height, 0.1 / width, y.inches / height))
    picture.text(0.1 / width, 1 - 0.08 / height, title, fontsize=9, va="top", weight="bold")
    return picture


def _sides(found: "AttentionMap") -> tuple[_Side, _Side]:
    """Return both sides of a panel; cells are squares unless a side is time."""
    _, T, S = found.weights.shape
    cell = min(_CELL, _LONGEST / max(T, S))
    # Room for a head's title above a short sentence.
    width, height = max(1.6, cell * S), max(0.5, cell * T)
    if found.rows.seconds:
        width = height = _TIME
    elif found.columns.seconds:
        width, height = max(_TIME, min(_LONGEST, 0.04 * S)), max(1.0, min(_LONGEST, _CELL * T))
    return _side(found.columns, width), _side(found.rows, height)


def _side(axis: "Axis", inches: float) -> _Side:
    if axis.seconds:
        return _Side(f"{axis.name}, s", (), (), axis.seconds * len(axis.labels), inches)
    labels, families = legible(axis.labels)
    return _Side(axis.name, tuple(labels), tuple(families), len(labels), inches)


def _columns(heads: int) -> int:
    """Return the panels per row: at most four, and a full last row if possible."""
    if heads <= _PANELS:
        return heads
    return next((n for n in range(_PANELS, 2, -1) if heads % n == 0), _PANELS)


def _width(label: str) -> int:
    """Return the letters of a label; those of scripts without spaces are twice as wide."""
    return sum(2 if ord(letter) > 0x2E80 else 1 for letter in label)


def _draw(axes: "Axes", weights_TS: NDArray[np.float32], x: _Side, y: _Side) -> None:
    from matplotlib.colors import PowerNorm

    axes.imshow(
        weights_TS, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), aspect="auto",
        interpolation="nearest", extent=(0, x.length, y.length, 0),
    )  # fmt: skip
    for edge in axes.spines.values():
        edge.set_color("0.7")


def _label(axes: "Axes", which: str, side: _Side, *, is_shown: bool) -> None:
    """Label an axis: tokens in the middle of their cells, as many as are legible; or seconds."""
    own = axes.xaxis if which == "x" else axes.yaxis
    own.set_tick_params(labelsize=_POINTS, length=2, color="0.7", pad=2)
    if not is_shown:
        own.set_ticks([])
        return
    own.set_label_text(side.name, fontsize=8)
    if not side.labels:
        return
    every = max(1, math.ceil(_POINTS / 72 * 1.1 * side.length / side.inches))
    shown = list(range(0, len(side.labels), every))
    own.set_ticks([i + 0.5 for i in shown], [side.labels[i] for i in shown])
    for tick in own.get_ticklabels():
        tick.set_fontfamily(list(side.families))
        tick.set_parse_math(False)  # a dollar is a dollar
        if which == "x" and not side.is_upright(tick.get_text()):
            tick.set_rotation(90)


def _legend(picture: "Figure", axes: "Axes", box: tuple[float, float, float, float]) -> None:
    """Draw the scale of the shades next to the last panel."""
    bar = picture.add_axes(box)
    is_tall = box[3] * picture.get_figheight() > 1
    ticks = [0, 0.01, 0.1, 0.25, 0.5, 1] if is_tall else [0, 0.1, 0.5, 1]
    picture.colorbar(axes.images[0], cax=bar, ticks=ticks)
    bar.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=_POINTS)


def legible(labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return labels that can be drawn here, and their fonts, Matplotlib's own first.

    A letter that no installed font has, or that is none, is written as its code point.
    """
    wanted = {letter for label in labels for letter in label}
    families, missing = ["DejaVu Sans"], wanted - _letters("DejaVu Sans")
    if missing:
        for family in _families():
            if found := missing & _letters(family):
                families.append(family)
                missing -= found
            if not missing:
                break
    missing |= {letter for letter in wanted if not letter.isprintable()}
    table = {ord(letter): f" U+{ord(letter):04X}" for letter in missing}
    return [label.translate(table).strip() for label in labels], families


@functools.cache
def _families() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    # Faces of other weights than regular would be found with a warning.
    names = {e.name for e in fontManager.ttflist if e.weight == 400 and e.style == "normal"}
    # Fonts made to cover many scripts come first.
    return tuple(sorted(names, key=lambda name: ("Noto" not in name, "CJK" not in name, name)))


@functools.cache
def _letters(family: str) -> frozenset[str]:
    """Return the letters of a font's regular face."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    try:
        font = get_font(findfont(FontProperties(family=family), fallback_to_default=False))
    except (ValueError, RuntimeError, OSError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))
