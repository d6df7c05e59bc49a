"""Does a killed run end in the bits of one that nobody killed, and what does a checkpoint cost?

`make bench NAME=resume`; about 10 minutes on two cores. 100 runs of tiny models of the whole zoo
die by SIGKILL at random moments: after a random time, around a random update, while a checkpoint,
a bundle or an outcome is written, while dev is decoded. Each is run again (and killed again, up to
four times), until it ends; then every loss of every attempt, every evaluation and all final tensors
are compared, bit for bit, with the uninterrupted run. 10 more kills go through Ray Train with two
gloo workers. Exit code 1 if anything differs.
"""

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# One thread, so that no pool has to survive a fork and sums have one order.
os.environ["OMP_NUM_THREADS"] = "1"

from kills import forms, nursery, overhead, through_ray

MAX_KILLS_A_RUN = 4
_KINDS, _WEIGHTS = ["time", "step", "checkpoints", "decode", "end"], [40, 25, 20, 10, 5]


@dataclass
class Tally:
    """What came of one form.

    Attributes:
        kills: attempts that died.
        again: updates that were taken more than once.
        losses: lines of updates compared, of all attempts.
        runs: that were killed and ended.
        identical: kills of those runs that ended as if nobody had killed them.
    """

    kills: int = 0
    again: int = 0
    losses: int = 0
    runs: int = 0
    identical: int = 0

    def add(self, deaths: int, whole: nursery.Trace, found: nursery.Trace, name: str) -> None:
        """Takes in a run that died so often, and says where it differs."""
        differing = nursery.differences(whole, found)
        for line in differing[:3]:
            print(f"{name}: {line}", flush=True)
        lines = sum(map(len, found.lines.values()))
        self.kills, self.runs = self.kills + deaths, self.runs + 1
        self.losses, self.again = self.losses + lines, self.again + lines - len(found.lines)
        self.identical += 0 if differing else deaths


def drawn(draw: random.Random, whole: nursery.Whole, done: int) -> nursery.Moment:
    """A random moment of what is left of a run after `done` of its updates."""
    steps = forms.SETTLED["steps"]
    left = max(0.1, 1 - done / steps)
    kind = draw.choices(_KINDS, _WEIGHTS)[0]
    if kind == "time":
        return draw.uniform(0, whole.seconds * (0.3 + 0.7 * left))
    if kind == "step":
        name = draw.choice(["gradient", "updated", "yielded"])
        return f"{name}@{draw.randint(min(done + 1, steps), steps)}", 1
    if kind == "end":
        room = draw.choice(["bundle", "outcome"])
        return room, draw.randint(1, whole.counts[room])
    return kind, draw.randint(1, max(1, int(whole.counts[kind] * left)))


def killed(
    job: nursery.Job, draw: random.Random, whole: nursery.Whole, at_most: int
) -> Iterator[str]:
    """Runs until it ends; what kind of moment each death came at."""
    code, died = -9, 0
    while code:
        at = drawn(draw, whole, nursery.read_trace(job.trace).last)
        code = nursery.attempt(job, at if died < at_most else None)
        if code:
            died += 1
            yield at[0].partition("@")[0] if isinstance(at, tuple) else "time"


def kill_below_ray(folder: Path, kills: int, seed: int) -> dict[str, Tally]:
    """Kills runs in place until there were so many; a tally for each form."""
    draw, tallies = random.Random(seed), {name: Tally() for name in forms.FORMS}  # noqa: S311
    moments: Counter[str] = Counter()
    shards = {kind: forms.corpus(folder / kind, kind) for kind in ("symbols", "bpe")}
    wholes: dict[str, nursery.Whole] = {}
    for number in itertools.count():
        left = kills - sum(tally.kills for tally in tallies.values())
        if not left:
            break
        name = [*forms.FORMS][number % len(forms.FORMS)]
        data, place = shards[forms.FORMS[name][0]], folder / f"run-{number}"
        config = forms.experiment(name, data.task)
        if name not in wholes:
            trace = folder / f"whole-{number}"
            wholes[name] = nursery.whole_run(
                nursery.Job(config, data.folder, folder / f"whole-run-{number}", trace)
            )
        place.mkdir()
        job = nursery.Job(config, data.folder, place, place / "trace")
        deaths = [*killed(job, draw, wholes[name], min(MAX_KILLS_A_RUN, left))]
        if deaths:
            moments.update(deaths)
            tallies[name].add(len(deaths), wholes[name].trace, nursery.read_trace(job.trace), name)
    print("killed at: " + ", ".join(f"{name} {count}" for name, count in moments.most_common()))
    return tallies


def show(tallies: dict[str, Tally]) -> Tally:
    """Prints a table and answers the sum."""
    print(f"{'':40}{'kills':>7}{'runs':>6}{'identical':>11}{'losses':>8}{'re-run':>8}")
    whole = Tally()
    for name, tally in tallies.items():
        for key, value in vars(tally).items():
            setattr(whole, key, getattr(whole, key) + value)
        print(_row(name, tally))
    print(_row("all", whole), flush=True)
    return whole


def _row(name: str, t: Tally) -> str:
    return f"{name:40}{t.kills:7}{t.runs:6}{t.identical:11}{t.losses:8}{t.again:8}"


def boundaries(plan: Path) -> None:
    """Runs that are each killed at given moments in turn: a JSON line each; for the tests."""
    wanted = json.loads(plan.read_text())
    wholes: dict[str, nursery.Trace] = {}
    for case in wanted["cases"]:
        folder = Path(wanted["folder"]) / case["name"]
        folder.mkdir(parents=True)
        config, shards = case["experiment"], Path(wanted["shards"])
        key = json.dumps(config, sort_keys=True)
        if key not in wholes:
            job = nursery.Job(config, shards, folder / "whole", folder / "whole-trace")
            wholes[key] = nursery.whole_run(job).trace
        job = nursery.Job(config, shards, folder / "killed", folder / "trace")
        codes, reached = [], []
        for moment in case["moments"]:
            codes.append(nursery.attempt(job, tuple(moment)))
            reached.append(nursery.read_trace(job.trace).last)
        codes.append(nursery.attempt(job))
        found = nursery.read_trace(job.trace)
        answer = {
            "name": case["name"],
            "codes": codes,
            "reached": reached,
            "again": sorted(index for index, lines in found.lines.items() if len(lines) > 1),
            "steps": len(found.lines),
            "differences": nursery.differences(wholes[key], found),
            "left": sorted(p.relative_to(folder).as_posix() for p in folder.rglob(".*")),
        }
        print(json.dumps(answer), flush=True)


def main() -> int:
    """Kills, compares, measures; prints tables and a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ray-kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boundaries", type=Path, help="a plan of kills, as tests write them")
    parser.add_argument("--driver", type=Path, help="a run that is a driver of Ray")
    arguments = parser.parse_args()
    for plan, do in ((arguments.boundaries, boundaries), (arguments.driver, through_ray.drive)):
        if plan is not None:
            do(plan)
            return 0
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        below = show(kill_below_ray(folder, arguments.kills, arguments.seed))
        print(f"{time.monotonic() - began:.0f} s\n", flush=True)
        through = through_ray.kill(folder / "ray", arguments.ray_kills, arguments.seed)
        costs = overhead.measure(folder / "overhead")
    kills = below.kills + through["kills"]
    identical = below.identical + through["identical"]
    figures = {
        "kills": kills,
        "identical": identical,
        "checkpoint_overhead": max(cost["share"] for cost in costs.values()),
        "below_ray": vars(below),
        "through_ray": through,
        "overhead": costs,
    }
    print(json.dumps(figures))
    return 0 if identical == kills else 1


if __name__ == "__main__":
    sys.exit(main())
