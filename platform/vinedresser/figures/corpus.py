"""Figures and tables of a shard set: lengths, padding by bucket, dropped rows.

Everything is read from the manifest and `lengths.parquet`; no row of text is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from vinedresser.data.batching.plan import Histogram, plan_cells
from vinedresser.data.prepare.encode import LENGTHS_FILE
from vinedresser.data.prepare.report import PADDING_TOKENS
from vinedresser.data.shards import ShardSet
from vinedresser.tracking import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.0, 4.2)  # inches; 700 x 420 pixels in a browser
# Bars of a histogram of lengths, at most.
_BARS = 40


@dataclass(frozen=True)
class LengthBucket:
    """Rows whose longer side lies between two edges.

    Lengths are those of the longer side in tokens (frames), 1-based. Padding efficiency is the
    share of real tokens in its batches, both sides, if it is batched alone; in (0, 1].
    """

    first: int
    last: int
    rows: int
    padding_efficiency: float


def histogram_of(shards: ShardSet, split: str) -> Histogram:
    """Return the lengths of a split's kept rows."""
    table = pq.read_table(shards.folder / LENGTHS_FILE).to_pandas()
    cells = table[table["split"] == split].groupby(["source", "target"])["count"].sum()
    source, target = (
        cells.index.get_level_values(name).to_numpy(np.int64) for name in ("source", "target")
    )
    return Histogram(source, target, cells.to_numpy(np.int64))


def buckets(shards: ShardSet, *, tokens: int) -> list[LengthBucket]:
    """Return the padding efficiency of each bucket of train at a budget of padded tokens."""
    cells, width = histogram_of(shards, "train"), shards.task.bucket_width
    number = (cells.longest - 1) // width
    found = []
    for i in np.unique(number):
        inside = number == i
        own = Histogram(cells.source[inside], cells.target[inside], cells.counts[inside])
        share = plan_cells(own, tokens=tokens).padding_efficiency(own).both
        found.append(LengthBucket(int(i) * width + 1, int(i + 1) * width, own.rows, float(share)))
    return found


def coverage(shards: ShardSet) -> dict[str, dict[str, float]]:
    """Return split -> side -> share of known tokens in percent; ids only."""
    sides = ("target",) if shards.features else ("source", "target")
    return {
        split: {
            side: 100 * (1 - lengths[side]["unknown"] / max(lengths[side]["tokens"], 1))
            for side in sides
        }
        for split, lengths in shards.meta["lengths"].items()
    }


def corpus_figures(shards: ShardSet, *, tokens: int) -> dict[str, "Figure"]:
    """Return file name -> figure: lengths, padding by bucket, rows kept and dropped."""
    return {
        "lengths.png": _lengths(shards),
        "padding.png": _padding(shards, tokens),
        "rows.png": _rows(shards.meta["account"], shards.task.name),
    }


def log_corpus(tracker: Tracker, shards: ShardSet) -> None:
    """Store the account of a run's data and its figures in the run, as `data/...`."""
    keys = ("account", "lengths", "overlap", "notes", "padding_efficiency")
    account = {key: shards.meta[key] for key in keys}
    tracker.text(json.dumps(account, indent=1) + "\n", "data/account.json")
    for name, figure in corpus_figures(shards, tokens=PADDING_TOKENS).items():
        tracker.figure(figure, f"data/{name}")


def _figure() -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def _lengths(shards: ShardSet) -> "Figure":
    """Draw source and target lengths of train; frames and tokens on separate axes."""
    from matplotlib.figure import Figure

    cells = histogram_of(shards, "train")
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = list(figure.subplots(2 if shards.features else 1, squeeze=False).flat)
    unit = "frames" if shards.features else "tokens"
    longest = int(cells.longest.max())
    for side, lengths, color in (
        ("source", cells.source, "tab:blue"),
        ("target", cells.target, "tab:orange"),
    ):
        own = axes[0] if side == "source" else axes[-1]
        kind = unit if side == "source" else "tokens"
        last = int(lengths.max()) if shards.features else longest
        # Equally many lengths per bar.
        width = max(1, -(-last // _BARS))
        own.hist(
            lengths, bins=list(np.arange(0, last + width, width) + 0.5), weights=cells.counts,
            label=f"{side}, {np.average(lengths, weights=cells.counts):.1f} {kind} on average",
            color=color, histtype="stepfilled", alpha=0.45, edgecolor=color,
        )  # fmt: skip
        own.set_xlim(left=0)
    axes[-1].set_xlabel("length in tokens, end of sentence included")
    if shards.features:
        axes[0].set_xlabel("length in frames")
    for own in axes:
        own.set_ylabel("rows of train")
        own.legend()
    axes[0].set_title(f"{shards.task.name}: lengths")
    return figure


def _padding(shards: ShardSet, tokens: int) -> "Figure":
    """Draw rows and padding efficiency by bucket."""
    found = buckets(shards, tokens=tokens)
    figure, axes = _figure()
    middles = [(bucket.first + bucket.last) / 2 for bucket in found]
    width = 0.9 * shards.task.bucket_width
    axes.bar(middles, [bucket.rows for bucket in found], width=width, color="0.8")
    axes.set_xlabel(f"longer side of a pair, classes of {shards.task.bucket_width}")
    axes.set_ylabel("rows of train (bars)")
    right = axes.twinx()
    right.plot(
        middles, [100 * bucket.padding_efficiency for bucket in found], "o-", color="tab:green"
    )
    cells = histogram_of(shards, "train")
    whole = 100 * plan_cells(cells, tokens=tokens).padding_efficiency(cells).both
    right.axhline(whole, color="tab:green", linewidth=1, linestyle=":")
    right.set_ylim(0, 102)
    right.set_ylabel(f"real tokens in batches of {tokens}, % (all: {whole:.1f})", color="tab:green")
    axes.set_title(f"{shards.task.name}: padding efficiency by bucket")
    return figure


def _rows(account: Mapping[str, Any], name: str) -> "Figure":
    """Draw the rows read of each split: kept, and dropped by reason."""
    figure, axes = _figure()
    splits = [split for split in ("train", "dev", "test") if split in account]
    reasons = sorted({reason for split in splits for reason in account[split]["dropped"]})
    left = np.array([account[split]["rows_out"] for split in splits], dtype=float)
    total = np.array([max(account[split]["rows_in"], 1) for split in splits], dtype=float)
    axes.barh(splits, 100 * left / total, color="0.8", label="kept")
    for reason in reasons:
        part = np.array([account[split]["dropped"].get(reason, 0) for split in splits], dtype=float)
        axes.barh(splits, 100 * part / total, left=100 * left / total, label=reason)
        left += part
    axes.set_yticks(range(len(splits)), [f"{s}\n{account[s]['rows_in']:,} in" for s in splits])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("rows, %")
    axes.set_title(f"{name}: rows kept and dropped")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, frameon=False)
    return figure
