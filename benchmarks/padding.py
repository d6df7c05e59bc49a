"""Padding on Multi30k German-English: real / padded tokens of this order and of peers' samplers.

`make bench NAME=padding`, half a minute, no timing in it: the figures are exact. Peers' samplers
are written anew here from their published rules; each gets the lengths as ours does, end of
sentence counted on both sides, and the budget counts sentences x longest side.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.corpora.multi30k import multi30k
from vinedresser.data.batching.plan import Ints, PaddingEfficiency, arrange
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import prepare

BUDGETS = (4096, 2048)
BATCHES = list[Ints]
Sampler = Callable[[Ints, Ints, int], BATCHES]


def shuffled(count: int) -> Ints:
    """The rows in the one random order that all peers start from."""
    return np.random.default_rng(0).permutation(count)


def filled(rows: Iterable[int], longest: Ints, budget: int) -> BATCHES:
    """Rows in their order; a batch takes rows as long as it stays within the budget."""
    batches: list[list[int]] = [[]]
    top = 0
    for row in rows:
        top = max(top, int(longest[row]))
        if batches[-1] and top * (len(batches[-1]) + 1) > budget:
            batches.append([])
            top = int(longest[row])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches if batch]


def joeynmt(source: Ints, target: Ints, budget: int) -> BATCHES:
    """Shuffled; a batch is closed by the row with which it reaches or passes the budget."""
    batches: BATCHES = []
    batch: list[int] = []
    top = 0
    # Its lengths count the begin of the target, too.
    for row in shuffled(len(source)):
        batch.append(row)
        top = max(top, int(source[row]), int(target[row]) + 1)
        if top * len(batch) >= budget:
            batches.append(np.array(batch))
            batch, top = [], 0
    return [*batches, np.array(batch)] if batch else batches


def of_mean(source: Ints, target: Ints, budget: int) -> int:
    """Sentences of a batch of fixed size that hold the budget on average."""
    return int(budget / np.maximum(source, target).mean())


def hf_default(source: Ints, target: Ints, budget: int) -> BATCHES:
    """Shuffled, a fixed number of sentences."""
    size = of_mean(source, target, budget)
    rows = shuffled(len(source))
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def hf_grouped(source: Ints, target: Ints, budget: int) -> BATCHES:
    """`group_by_length`: shuffled, up to 50 batches at a time sorted by falling input length."""
    size = of_mean(source, target, budget)
    rows = shuffled(len(source))
    mega = max(1, min(50, len(rows) // (4 * size))) * size
    parts = [rows[at : at + mega] for at in range(0, len(rows), mega)]
    rows = np.concatenate([part[np.argsort(-source[part], kind="stable")] for part in parts])
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def fairseq(source: Ints, target: Ints, budget: int) -> BATCHES:
    """Shuffled, sorted by target, then stably by source."""
    rows = shuffled(len(source))
    rows = rows[np.argsort(target[rows], kind="stable")]
    rows = rows[np.argsort(source[rows], kind="stable")]
    return filled(rows.tolist(), np.maximum(source, target), budget)


def opennmt(source: Ints, target: Ints, budget: int, *, pool: int) -> BATCHES:
    """Pools of so many shuffled rows, each sorted by (source, target)."""
    rows = shuffled(len(source))
    batches: BATCHES = []
    for at in range(0, len(rows), pool):
        part = rows[at : at + pool]
        part = part[np.lexsort((target[part], source[part]))]
        batches += filled(part.tolist(), np.maximum(source, target), budget)
    return batches


def full_sort(source: Ints, target: Ints, budget: int) -> BATCHES:
    """Sorted by (target, source)."""
    rows = np.lexsort((source, target))
    return filled(rows.tolist(), np.maximum(source, target), budget)


def ours(source: Ints, target: Ints, budget: int, *, order: str) -> BATCHES:
    """The platform's own, by its name in `batch.order`."""
    return arrange(source, target, tokens=budget, order=order)


SAMPLERS: dict[str, Sampler] = {
    "random, token budget": partial(ours, order="random"),
    "JoeyNMT, token batches": joeynmt,
    "HF default, fixed sentences": hf_default,
    "HF group_by_length": hf_grouped,
    "OpenNMT-py, pool 2,048": partial(opennmt, pool=2048),
    "OpenNMT-py, pool 262,144": partial(opennmt, pool=262_144),
    "fairseq": fairseq,
    "full sort (target, source)": full_sort,
    "vinedresser bucket_by_source": partial(ours, order="bucket_by_source"),
    "vinedresser alternating_max": partial(ours, order="alternating_max"),
}


def padding_efficiency(source: Ints, target: Ints, batches: list[Ints]) -> PaddingEfficiency:
    """Return the share of real tokens in some batches, row by row; all 1 for no batches."""
    sides = (source, target)
    real = [sum(int(side[rows].sum()) for rows in batches) for side in sides]
    padded = [sum(len(rows) * int(side[rows].max()) for rows in batches) for side in sides]
    shares = [r / p if p else 1.0 for r, p in zip(real, padded, strict=True)]
    both = sum(real) / sum(padded) if batches else 1.0
    return PaddingEfficiency(shares[0], shares[1], both, len(batches))


def lengths() -> tuple[Ints, Ints]:
    """Source and target lengths of Multi30k's train split, as training reads them."""
    with tempfile.TemporaryDirectory() as root:
        split = load_split(prepare(multi30k(), Path(root), executor="in_process"), "train")
        return split.source_lengths, split.target_lengths


def main() -> None:
    """Prints a table a budget, and the figures as JSON."""
    source, target = lengths()
    longest = np.maximum(source, target)
    figures: dict[str, float] = {"over_budget": 0}
    for budget in BUDGETS:
        # Sorted by the longer side and filled: no way to form batches needs fewer.
        fewest = len(filled(np.argsort(longest, kind="stable").tolist(), longest, budget))
        print(f"\n{len(source):,} pairs, {budget} padded tokens a batch; fewest batches: {fewest}")
        print(
            f"{'':<30}{'source':>8}{'target':>8}{'both':>8}{'batches':>9}{'over':>6}{'largest':>9}"
        )
        for name, sampler in SAMPLERS.items():
            batches = sampler(source, target, budget)
            assert sorted(np.concatenate(batches)) == list(range(len(source)))
            found = padding_efficiency(source, target, batches)
            sizes = np.array([len(rows) * longest[rows].max() for rows in batches])
            over = int((sizes > budget).sum())
            shares = f"{found.source:>8.3f}{found.target:>8.3f}{found.both:>8.3f}"
            print(f"{name:<30}{shares}{found.batches:>9}{over:>6}{sizes.max():>9,}")
            if name == "vinedresser alternating_max":
                figures[f"efficiency_{budget}"] = round(found.both, 4)
                figures[f"batches_{budget}_vs_fewest"] = round(found.batches / fewest, 4)
            if name.startswith("vinedresser"):
                figures["over_budget"] += over
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
