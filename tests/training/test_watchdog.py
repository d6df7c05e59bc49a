"""Ranks that hang and ranks that are slow, in separate processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vinedresser.training.device import Device
from vinedresser.training.watchdog import Watchdog, archive_hangs, hangs


def run(code: str, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


HANG = """
import json, sys, threading, time
from pathlib import Path
from vinedresser.training.device import Device
from vinedresser.training.watchdog import Watchdog

def busy():
    while True:
        json.dumps(list(range(100)))

def training_steps(watchdog, how):
    for step in (1, 2):
        watchdog.reset(step)
    if how == "long":
        watchdog.reset(3, pause=1000)
    elif how == "waits":
        all_reduce()
    time.sleep(2 if how == "long" else 60)

def all_reduce():
    time.sleep(60)

if sys.argv[2] == "sleeps":
    for _ in range(3):
        threading.Thread(target=busy, daemon=True).start()
with Watchdog(Path(sys.argv[1]), Device("cpu", None, 1, 2), seconds=0.2) as watchdog:
    training_steps(watchdog, sys.argv[2])
print("went on")
"""


@pytest.mark.fault("T10")
@pytest.mark.parametrize(("how", "waited"), [("sleeps", False), ("waits", True)])
def test_t10_a_rank_that_hangs_leaves_its_stacks_and_ends(tmp_path: Path, how, waited) -> None:
    done = run(HANG, tmp_path / "hangs", how)
    assert (done.returncode, done.stdout) == (1, "")
    stacks = (tmp_path / "hangs/step-00000003-rank-1.txt").read_text()
    head = json.loads(stacks.splitlines()[0].removeprefix("== "))
    assert head == {"rank": 1, "step": 3, "waited": waited}
    assert "in training_steps" in stacks
    assert stacks.count("in busy") == (0 if waited else 3)
    (hang,) = hangs(tmp_path / "hangs")
    assert (hang.step, hang.text) == (3, "rank 1")
    kept = archive_hangs(tmp_path / "hangs")
    assert [path.name for path in kept.iterdir()] == ["step-00000003-rank-1.txt"]
    assert hangs(tmp_path / "hangs") == []


def test_patience_lets_a_rank_do_more_than_an_update(tmp_path: Path) -> None:
    done = run(HANG, tmp_path / "hangs", "long")
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert not (tmp_path / "hangs").exists()


@pytest.mark.parametrize(("workers", "seconds"), [(1, 60.0), (2, 0.0)])
def test_nobody_is_watched_alone_or_without_a_limit(tmp_path: Path, workers, seconds) -> None:
    device = Device(torch.device("cpu"), None, 0, workers)
    with Watchdog(tmp_path / "hangs", device, seconds=seconds) as watchdog:
        watchdog.reset(1)
    assert list(tmp_path.iterdir()) == []


PACE = """
import sys, time
import torch.distributed as dist
from vinedresser.training.device import Device
from vinedresser.training.watchdog import StragglerDetector

file, rank, slow = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
detector = StragglerDetector(Device("cpu", None, rank, 2))
for step in range(1, 61):
    time.sleep(0.002)
    detector.add(slow if rank == 1 else 1e-3)
    if step % 5 == 0:
        print(detector.compare())
# Else gloo's threads abort the interpreter's end: 8 of 20 times.
dist.destroy_process_group()
"""


@pytest.mark.fault("T11")
@pytest.mark.parametrize(("slow", "told"), [(0.1, True), (1.2e-3, False)])
def test_t11_a_slow_rank_is_named_once_with_its_ratio(tmp_path: Path, slow, told) -> None:
    words = [sys.executable, "-c", PACE, str(tmp_path / "meeting")]
    ranks = [
        subprocess.Popen([*words, str(rank), str(slow)], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0].split("\n") for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    lines = [line for line in said[0] if line]
    assert len(lines) == int(told)
    if told:
        assert lines[0].startswith(
            "rank 1 is slow: 0.100 s per update of its own work, 100.0 times"
        )
    assert not [line for line in said[1] if line]
