"""The demo's chain with three seeds, each in a workspace of its own: quality, size, parity, time.

`make bench NAME=demo`; about 12 minutes on two cores. `ARGS="1 2"` names other seeds.
"""

import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path

from pipelines.demo import PIPELINE
from vinedresser.pipeline import retrain

FIGURES = (
    "finalist_per",
    "pruned_per",
    "heads_kept",
    "teacher_forced_loss",
    "parity_max_abs",
    "seconds",
)


def main() -> None:
    """Print a table, one row per seed, then mean, standard deviation and all values as JSON."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logging.getLogger("vinedresser").setLevel(logging.INFO)
    seeds = [int(word) for word in sys.argv[1:]] or [1, 2, 3]
    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(retrain(PIPELINE.override({"seed": seed}), Path(folder)).to_json())
        print(f"seed {seed}: " + ", ".join(f"{key} {rows[-1][key]}" for key in FIGURES))
    table = {key: [row[key] for row in rows] for key in FIGURES}
    for key, values in table.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{key:20} mean {statistics.mean(values):.4g}, sd {spread:.2g}")
    print(json.dumps({"seeds": seeds, "heads_total": rows[0]["heads_total"], **table}))


if __name__ == "__main__":
    main()
