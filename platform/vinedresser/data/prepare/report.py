"""The report of a preparation, for the manifest: drops, lengths, padding, leakage, repeats."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vinedresser.config.task import Task
from vinedresser.data.batching.plan import Histogram, plan_cells
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.row import RowCounts
from vinedresser.data.prepare.clean import (
    HELD_OUT_FILE,
    CleanedBlock,
    Findings,
    LineCount,
    hashes_file,
    load_held_out,
)
from vinedresser.data.prepare.encode import LENGTHS, EncodedBlock
from vinedresser.data.prepare.hashing import count_repeats
from vinedresser.errors import DataError

# Token budget that the manifest's padding figures are measured at.
PADDING_TOKENS = 4096
# Lengths of true translations correlate at 0.8 and more; sides that were shifted against each
# other by one line are near 0.
MIN_CORRELATION, MIN_ROWS = 0.3, 100
# Drops that the task requests; the others are losses, which `max_drop_ratio` limits.
_REQUESTED = frozenset({"variant", "excluded", "beyond_train_words"})


class PreparationReport:
    """Counts and measures of all blocks; holds their cells, about a byte per row.

    `encoded` blocks are in split and file order, added once they are encoded.
    """

    def __init__(self, task: Task, corpus: Corpus, cleaned: list[CleanedBlock]) -> None:
        self.encoded: list[EncodedBlock] = []
        self._task, self._corpus, self._cleaned = task, corpus, cleaned

    def counts(self, split: str) -> RowCounts:
        """Return rows read and dropped of a split, so far."""
        total = RowCounts()
        blocks: list[CleanedBlock | EncodedBlock] = [*self._cleaned, *self.encoded]
        for block in blocks:
            if block.split == split:
                total.add(block.counts)
        return total

    def findings(self, split: str) -> Findings:
        """Return the findings of a split."""
        total = Findings()
        for block in self._cleaned:
            if block.split == split:
                total.add(block.findings)
        return total

    def refuse_empty(self) -> None:
        """Refuse a split without a row.

        Raises:
            DataError: with the number of rows read, and the reasons for which they were dropped.
        """
        for split in self._corpus.splits:
            counts = self.counts(split)
            if not counts.rows_out:
                raise DataError(
                    f"{self._task.name}: {split}: 0 of {counts.rows_in:,} pairs left: "
                    f"{counts.reasons() or 'none read'}. Fix: check the files, or raise "
                    "max_source_length and max_target_length"
                )

    def refuse_leakage(self) -> None:
        """Refuse pairs of test in train, where `cleaning.leakage` is `refuse`.

        Raises:
            DataError: with their number and first lines.
        """
        pairs = self.findings("train").pairs.get("test", LineCount())
        if self._task.cleaning.leakage == "refuse" and pairs.rows:
            raise DataError(
                f"{self._task.name}: {pairs.rows:,} train rows are in test, source and target; "
                f"train lines {self._places('train', pairs)}. Fix: cleaning.leakage=drop takes "
                "them out of train, cleaning.leakage=allow leaves them in"
            )

    def _refuse_losses(self) -> None:
        counts = self.counts("train")
        lost = {reason: n for reason, n in counts.dropped.items() if reason not in _REQUESTED}
        total, rows = counts.rows_out + sum(lost.values()), sum(lost.values())
        limit = self._task.cleaning.max_drop_ratio
        if rows > limit * total:
            worst = max(lost, key=lambda reason: lost[reason])
            raise DataError(
                f"{self._task.name}: train: {rows:,} of {total:,} pairs dropped "
                f"({counts.reasons()}), more than cleaning.max_drop_ratio={limit:g} allows; first "
                f"{worst} lines {counts.first_lines[worst][:3]}. Fix: raise the limits, or "
                "cleaning.max_drop_ratio"
            )

    def describe(self, scratch: Path) -> dict[str, Any]:
        """Return the part of the manifest that counts and measures.

        Raises:
            DataError: a split without a row, too much of train dropped, or sides that seem
                shifted; the last two as the task's `cleaning` requests.
        """
        splits = self._corpus.splits
        self.refuse_empty()
        self._refuse_losses()
        lengths = {split: self._lengths(split) for split in splits}
        overlap, notes = dict[str, Any](), list(self._corpus.notes)
        if self._corpus.is_parallel:
            notes += self._alignment(lengths["train"])
            overlap, found = self._overlap(scratch)
            notes += found
        for split in splits:
            if (control := self.findings(split).control).rows:
                notes.append(
                    f"{split}: {control.rows:,} rows hold control characters, first lines "
                    f"{self._places(split, control)}; cleaning.control_characters decides"
                )
        cells, width = self._histogram("train"), self._task.bucket_width
        efficiency = plan_cells(cells, tokens=PADDING_TOKENS).padding_efficiency(cells)
        rows = np.bincount((cells.longest - 1) // width, weights=cells.counts).astype(int)
        shares = {key: round(getattr(efficiency, key), 4) for key in ("source", "target", "both")}
        return {
            "account": {split: self.counts(split).to_json() for split in splits},
            "lengths": lengths,
            "padding_efficiency": {
                "tokens": PADDING_TOKENS,
                "batches": efficiency.batches,
                **shares,
            },
            # Upper edges of train's buckets, in tokens of the longer side, and rows in each.
            "buckets": {
                "edges": [width * (i + 1) for i in range(len(rows))],
                "rows": rows.tolist(),
            },
            "sources": self._corpus.digests,
            "overlap": overlap,
            "shards": {
                split: [e.shard for e in self.encoded if e.split == split and e.shard]
                for split in splits
            },
            "notes": notes,
        }

    def _overlap(self, scratch: Path) -> tuple[dict[str, Any], list[str]]:
        """Return counts of rows that splits share, and notes on them."""
        cleaning, splits, notes = self._task.cleaning, self._corpus.splits, list[str]()
        found, held_out = self.findings("train"), load_held_out(str(scratch / HELD_OUT_FILE))
        is_dropped = cleaning.leakage == "drop"
        for split, count in sorted(found.sources.items()):
            notes.append(
                f"train: {'' if is_dropped else 'warning: '}{count.rows:,} rows "
                f"{'had' if is_dropped else 'have'} a source of {split}, "
                f"{found.pairs.get(split, LineCount()).rows:,} of them its target too; first lines "
                f"{self._places('train', count)}{'; dropped' if is_dropped else ''}"
            )
        # A model that is selected on dev should not be scored on the same rows of test.
        sources, pairs = held_out.shared("dev", "test")
        if sources:
            notes.append(
                f"test: warning: {sources:,} sources are in dev, {pairs:,} of them with their "
                "target"
            )
        overlap: dict[str, Any] = {}
        for split in splits[1:]:
            both, source = (side.get(split, LineCount()) for side in (found.pairs, found.sources))
            overlap[split] = {
                "pairs": both.rows,
                "sources": source.rows,
                "pair_lines": both.lines,
                "train_lines": source.lines,
            }
        train = [block.number for block in self._cleaned if block.split == "train"]
        files = [] if cleaning.dedup else [scratch / hashes_file(number) for number in train]
        overlap["train_repeats"] = count_repeats(files)
        return overlap, notes

    def lengths_table(self) -> pa.Table:
        """Return the rows of `lengths.parquet`, in its order."""
        splits = self._corpus.splits
        sizes = [len(block.cells[0]) for block in self.encoded]
        names = np.repeat([splits.index(block.split) for block in self.encoded], sizes)
        blocks = np.repeat([block.number for block in self.encoded], sizes)
        source, target, count = (
            np.concatenate([block.cells[i] for block in self.encoded]) for i in range(3)
        )
        arrays = [
            pa.DictionaryArray.from_arrays(pa.array(names.astype(np.int32)), pa.array(splits)),
            blocks.astype(np.int32),
            source,
            target,
            count.astype(np.int64),
        ]
        return pa.table(arrays, schema=LENGTHS)

    def _places(self, split: str, count: LineCount) -> str:
        return ", ".join(self._corpus.place(split, line) for line in count.lines)

    def _histogram(self, split: str) -> Histogram:
        total: dict[int, int] = {}
        for block in self.encoded:
            if block.split == split:
                source, target, count = block.cells
                keys = (source.astype(np.int64) << 32) | target
                for key, rows in zip(keys.tolist(), count.tolist(), strict=True):
                    total[key] = total.get(key, 0) + rows
        cells = np.asarray(sorted(total), dtype=np.int64)
        counts = np.asarray([total[key] for key in cells.tolist()], dtype=np.int64)
        return Histogram(cells >> 32, cells & 0xFFFFFFFF, counts)

    def _alignment(self, lengths: dict[str, Any]) -> list[str]:
        correlation = lengths["correlation"]
        if lengths["rows"] < MIN_ROWS or correlation >= MIN_CORRELATION:
            return []
        text = (
            f"source and target lengths correlate at {correlation:.2f} only; are the files "
            "shifted against each other?"
        )
        if self._task.cleaning.strict_alignment:
            raise DataError(
                f"{self._task.name}: train: {text} Fix: align them, or set "
                "cleaning.strict_alignment=false"
            )
        return [f"train: warning: {text}"]

    def _lengths(self, split: str) -> dict[str, Any]:
        cells = self._histogram(split)
        found: dict[str, Any] = {"rows": cells.rows}
        for side, (name, values) in enumerate((("source", cells.source), ("target", cells.target))):
            order, rows = np.argsort(values, kind="stable"), cells.rows
            ends = np.cumsum(cells.counts[order])
            middle = np.searchsorted(ends, [(rows - 1) // 2, rows // 2], "right")
            unknown = sum(block.unknown[side] for block in self.encoded if block.split == split)
            found[name] = {
                "tokens": int((values * cells.counts).sum()),
                "mean": round(float(np.average(values, weights=cells.counts)), 3),
                "median": float(np.mean(values[order][middle])),
                "max": int(values.max()),
                "unknown": unknown,
            }
        # Pearson's; 1 where a side does not vary.
        found["correlation"] = 1.0
        if cells.rows > 1:
            covariance = np.cov(cells.source, cells.target, fweights=cells.counts)
            deviations = np.sqrt(np.diag(covariance))
            if deviations.all():
                found["correlation"] = round(float(covariance[0, 1] / deviations.prod()), 4)
        return found
