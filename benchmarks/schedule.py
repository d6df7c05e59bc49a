"""Schedules: what goes wrong in ten years of ticks, with killed schedulers and dead receivers.

`make bench NAME=schedule`. About 20 minutes on two quiet cores; `ARGS="--ticks 10000 --points 10"`
is a short form. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.scheduling import processes, simulation, week


def main() -> None:
    """Run the parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ticks", type=int, default=100_000)
    parser.add_argument("--restarts", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=1000, help="of the race of two schedulers")
    parser.add_argument("--points", type=int, default=50, help="kills")
    parser.add_argument("--week", action="store_true", help="14 days with real trainings as well")
    parser.add_argument("--only", nargs="*", help="simulation race kills notices unchanged")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    parts: dict[str, Any] = {
        "unchanged": lambda folder: processes.unchanged(folder, 5),
        "notices": lambda folder: processes.notices(folder, 20),
        "race": lambda folder: processes.race(folder, options.slots),
        "kills": lambda folder: processes.kills(folder, options.points),
        "simulation": lambda _: simulation.main(options.ticks, options.restarts),
    }
    if options.week:
        parts["week"] = week.week
    figures: dict[str, Any] = {}
    for name, part in parts.items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="vinedresser-") as folder:
            found = part(Path(folder))
        for key, value in found.items():
            print(f"{name:12} {key:40} {value}", flush=True)
        figures |= found
    print(json.dumps({
        **figures,
        "simulated_ticks": figures.get("ticks"),
        **{
            key: sum(n for name, n in figures.items() if name.endswith(key))
            for key in ("doubles", "overlaps", "unexplained")
        },
    }))  # fmt: skip


if __name__ == "__main__":
    main()
