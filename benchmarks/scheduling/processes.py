"""Schedulers as processes: two on one store, kills at random points, notices, an unchanged corpus.

The run is a shell script that notes its start and its end, counts up with a file as checkpoint, and
leaves a background process behind. The tick is the real one, with that script for `retrain`.
"""

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from vinedresser.schedule.child import Ended
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import Ledger, Record, State
from vinedresser.schedule.tick import Done, Ticker
from vinedresser.schedule.triggers import PROGRAM, Conditions
from vinedresser.schedule.work import PipelineWork
from vinedresser.workspace.layout import Workspace

START = datetime(2026, 1, 1, tzinfo=UTC)
CANARY = "canary-5f3a9c"
ME = [sys.executable, "-m", "benchmarks.scheduling.processes"]

RUN = r"""
cd "$VINEDRESSER_BENCH"; slot=$VINEDRESSER_SLOT
exec 9> lock; flock -n 9 || echo "overlap $slot" >> evidence
name=$(echo "$slot" | tr -d ':-')
ls space/schedules/bench/slots/$name-*.json > /dev/null 2>&1 && echo "double $slot" >> evidence
sleep 97 9>&- &
n=$(cat "progress-$slot" 2> /dev/null || echo 0)
echo "start $slot $n" >> evidence
while [ $n -lt 5 ]; do n=$((n+1)); sleep 0.3 9>&-; echo $n > "progress-$slot"; done
echo "end $slot" >> evidence
echo '{"verdict": "promoted", "reason": "better"}'
"""


def schedule(folder: Path, **values: Any) -> Schedule:
    """Write a schedule's file and return it."""
    plain = {"name": "bench", "pipeline": "pipelines.demo", "when": {"data": "any"}, **values}
    (folder / "schedule.json").write_text(json.dumps(plain))
    return Schedule.from_json(plain)


def stored(folder: Path) -> list[Record]:
    """Return the stored records of the schedule."""
    ledger = Ledger(Workspace(folder / "space").schedule("bench"))
    return [ledger.record(name) for name in ledger.names()]


def tick(folder: Path) -> None:
    """Tick once, with the script in place of `retrain`."""
    value = Schedule.from_json(json.loads((folder / "schedule.json").read_text()))
    work = PipelineWork(value, folder / "space", words=["/bin/sh", "-c", RUN])
    try:
        Ticker(value, folder / "space", work, source=str(folder / "schedule.json")).tick()
    finally:
        work.after_tick([])


def serve(folder: Path) -> None:
    """Serve the schedule with such ticks."""
    from vinedresser.schedule.serve import Server, served

    value = Schedule.from_json(json.loads((folder / "schedule.json").read_text()))
    each = served([(value, "")], folder / "space")
    Server(each, lambda _: [*ME, "tick", str(folder)]).run()


class Runs:
    """Runs that note themselves in a file, for the race of two schedulers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def conditions(self, _state: State, _now: datetime) -> Conditions:
        """All are met."""
        return Conditions("met", "")

    def run(self, record: Record, *, began: Callable[[str], None], stop: Callable[[], str]) -> Done:
        """Note the slot."""
        began("elsewhere.0~1~1")
        with (self._folder / "evidence").open("a") as stream:
            stream.write(f"start {record.name}\n")
        return Done(Ended(0, stop(), 0.0, 0.0, 0.0), {"verdict": "kept"})

    def event(self, event: str, name: str, content: Any) -> None:
        """None is sent."""


def race_one(folder: Path, slots: int) -> None:
    """Tick at each slot as soon as the one before has ended, as another process does."""
    value = Schedule.from_json(json.loads((folder / "schedule.json").read_text()))
    last, moment = START + timedelta(hours=slots), [START]
    one = Ticker(value, folder / "space", Runs(folder), clock=lambda: moment[0])
    while (state := one.ledger.state()) is None or state.through < last or state.open:
        if state is not None:
            moment[0] = state.through + timedelta(hours=not state.open)
        one.tick()


def race(folder: Path, slots: int) -> dict[str, Any]:
    """Two schedulers on one store: each slot has one run."""
    schedule(folder, interval="1h")
    words = [*ME, "race", str(folder), str(slots)]
    processes = [subprocess.Popen(words) for _ in range(2)]
    codes = [process.wait() for process in processes]
    starts = Counter((folder / "evidence").read_text().splitlines())
    records = [r for r in stored(folder) if r.slot > START]
    return {
        "race_slots": len(records),
        "race_runs": sum(starts.values()),
        "race_doubles": sum(n - 1 for n in starts.values()),
        "race_unexplained": sum(not (r.attempts or r.reason) for r in records),
        "race_codes": codes,
    }


def _family(folder: Path) -> dict[str, list[psutil.Process]]:
    """Return the living processes of the benchmark, except this one: tick, serve, and run."""
    found: dict[str, list[psutil.Process]] = {"tick": [], "serve": [], "run": []}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("VINEDRESSER_BENCH") == str(folder)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                verbs = [verb for verb in ("tick", "serve") if verb in process.cmdline()[:4]]
                found[verbs[0] if verbs else "run"].append(process)
    return found


def kills(folder: Path, points: int) -> dict[str, Any]:
    """Kill the scheduler and its ticks at random points; then let the last slot end."""
    schedule(folder, interval="4s", grace="1s", retries={"pause_after": 0})
    environment = {**os.environ, "VINEDRESSER_BENCH": str(folder)}
    draw, orphans, slowest = random.Random(1), 0, 0.0  # noqa: S311
    process = subprocess.Popen([*ME, "serve", str(folder)], env=environment)
    done = 0
    while done < points:
        time.sleep(draw.uniform(0.5, 6))
        is_serve, family = done % 2 == 0, _family(folder)
        if not (is_serve or len(family["tick"]) == 1):
            continue
        # Everything that must die with the victim: all, or the run of the one tick.
        victim = psutil.Process(process.pid) if is_serve else family["tick"][0]
        dying = [*family["run"], *(family["tick"] if is_serve else ())]
        victim.kill()
        killed = time.monotonic()
        _, left = psutil.wait_procs(dying, timeout=10)
        orphans += sum(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in left)
        slowest = max(slowest, time.monotonic() - killed)
        if is_serve:
            process.wait()
            process = subprocess.Popen([*ME, "serve", str(folder)], env=environment)
        done += 1
    time.sleep(20)
    process.send_signal(signal.SIGTERM)
    process.wait()
    time.sleep(10)
    lines = (folder / "evidence").read_text().splitlines()
    kinds = Counter(line.split()[0] for line in lines)
    records = stored(folder)
    continued = [r for r in records if len(r.attempts) > 1]
    resumed = [line for line in lines if line.startswith("start") and not line.endswith(" 0")]
    return {
        "kill_points": done,
        "kill_doubles": kinds["double"],
        "kill_overlaps": kinds["overlap"],
        "kill_runs": kinds["start"],
        "kill_slots_interrupted": len(continued),
        "kill_slots_continued_to_a_good_end": sum(r.state == "promoted" for r in continued),
        "kill_runs_from_a_checkpoint": len(resumed),
        "kill_unexplained": sum(not (r.attempts or r.reason) for r in records),
        "orphans_after_10_s": orphans,
        "slowest_end_seconds": round(slowest, 2),
        "left_after_stop": sum(map(len, _family(folder).values())),
    }


def receiver() -> Iterator[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """Yield the URL of a webhook and the events that it has got, with their times."""
    got: list[tuple[float, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((time.time(), json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log no request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{CANARY}", got
    server.shutdown()


def notices(folder: Path, slots: int) -> dict[str, Any]:
    """Send the events of some slots to a receiver that answers and to one that never does."""
    import socket

    schedule(folder, interval="1s", notify=[
        {"on": ["promoted"], "url_env": "ALIVE"}, {"on": ["promoted"], "url_env": "DEAD"},
    ])  # fmt: skip
    made = receiver()
    url, got = next(made)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}/{CANARY}"
        environment = {
            **os.environ, "VINEDRESSER_BENCH": str(folder), "ALIVE": url, "DEAD": dead,
        }  # fmt: skip
        output = b""
        for _ in range(slots):
            done = subprocess.run([*ME, "tick", str(folder)], env=environment, check=True,
                                  capture_output=True)  # fmt: skip
            output += done.stdout + done.stderr
            time.sleep(1)
    next(made, None)
    ended = {r.name: r.ended.timestamp() for r in stored(folder) if r.ended}
    delays = [at - ended[event["name"]] for at, event in got]
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return {
        "notice_events": sum(r.state == "promoted" for r in stored(folder)),
        "notices_received": len(got),
        "notice_doubles": len(got) - len({event["id"] for _, event in got}),
        "notice_slowest_seconds": round(max(delays, default=0.0), 2),
        "canary_found": (files + output).count(CANARY.encode()),
    }


def unchanged(folder: Path, repeats: int) -> dict[str, Any]:
    """Time `vinedresser schedule tick` for a slot that is due while no file has changed."""
    pairs = {}
    for split in ("train", "dev"):
        for side in ("source", "target"):
            (folder / f"{split}.{side}").write_text("a b c\n" * 1000)
        pairs[split] = {side: f"{split}.{side}" for side in ("source", "target")}
    task = {"name": "t", "corpus": pairs, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    (folder / "task.json").write_text(json.dumps(task))
    value = schedule(
        folder, pipeline="pipelines.translation", overrides={"task": str(folder / "task.json")},
        interval="1s", when={"data": "changed"},
    )  # fmt: skip
    work = PipelineWork(value, folder / "space")
    now = datetime.now(UTC)
    ledger = Ledger(Workspace(folder / "space").schedule("bench"))
    begin = State(since=now, through=now)
    found = work.conditions(begin, now)
    ledger.change(lambda _: begin.change(data=found.data))
    walls, words = [], [*PROGRAM, "schedule", "tick", str(folder / "schedule.json"), "--json"]
    for _ in range(repeats):
        time.sleep(1)
        began = time.monotonic()
        done = subprocess.run([*words, "-w", str(folder / "space")], capture_output=True,
                              text=True, check=True)  # fmt: skip
        walls.append(time.monotonic() - began)
        states = {record["state"] for record in json.loads(done.stdout)}
        if "unchanged" not in states:
            sys.exit(f"expected an unchanged slot, found {states}: {done.stderr}")
    code = (
        "import sys, resource; from vinedresser.cli import main;"
        f"main({[*words[3:], '-w', str(folder / 'space')]!r});"
        "print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules],"
        "resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    last = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, cpu = last.stdout.splitlines()[-1].rsplit(" ", 1)
    return {
        "tick_unchanged_seconds": round(statistics.median(walls), 2),
        "tick_unchanged_slowest": round(max(walls), 2),
        "tick_unchanged_cpu_seconds": float(cpu),
        "tick_unchanged_heavy_imports": heavy,
    }


if __name__ == "__main__":
    verb, at, *rest = sys.argv[1:]
    if verb == "race":
        race_one(Path(at), int(rest[0]))
    else:
        {"tick": tick, "serve": serve}[verb](Path(at))
