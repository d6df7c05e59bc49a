"""Processes of runs: sessions end as a whole, at the deadline and when the tick is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vinedresser.schedule.child import Command, Ended, allowed_environment, run

# A child that starts a grandchild, which ignores SIGTERM; the process ids go to a file.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    grandchild = subprocess.Popen([sys.executable, __file__, "1", "2"])
    pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {grandchild.pid}")
time.sleep(60)
"""


def command(folder: Path, *words: str, deadline: float = 30, grace: float = 0.3) -> Command:
    return Command(
        [sys.executable, *words], dict(os.environ), folder / "out", folder / "log", deadline, grace
    )


def execute(made: Command, stop: str = "") -> Ended:
    return run(made, began=lambda _: None, stop=lambda: stop)


def living(pids: str) -> list[int]:
    found = []
    for pid in map(int, pids.split()):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_for(path: Path) -> str:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return path.read_text()


def test_output_log_code_and_cost(tmp_path: Path) -> None:
    code = "import sys; print('{}'); print('oh', file=sys.stderr); sum(range(10**7)); sys.exit(75)"
    ended = execute(command(tmp_path, "-c", code))
    assert (ended.code, ended.stopped) == (75, "")
    assert ended.cpu_seconds > 0.05
    assert (tmp_path / "out").read_text() == "{}\n"
    assert (tmp_path / "log").read_text() == "oh\n"


@pytest.mark.fault("P08")
def test_a_session_ends_at_its_deadline_with_all_its_processes(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    made = command(tmp_path, str(tmp_path / "family.py"), str(tmp_path / "pids"), deadline=2)
    ended = execute(made)
    assert ended.code == -signal.SIGKILL  # SIGTERM is ignored
    assert "deadline" in ended.stopped
    assert living((tmp_path / "pids").read_text()) == []


def test_a_polite_process_has_its_grace(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "open(sys.argv[1], 'w').write('x'); time.sleep(60)"
    )
    made = command(tmp_path, "-c", code, str(tmp_path / "ready"), grace=30)
    ready = tmp_path / "ready"
    ended = run(made, began=lambda _: None, stop=lambda: "enough" if ready.exists() else "")
    assert (ended.code, ended.stopped) == (75, "enough")
    assert ended.seconds < 20


@pytest.mark.fault("P09")
def test_a_session_ends_with_its_tick(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    tick = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_child import command
from vinedresser.schedule.child import run
folder = Path({str(tmp_path)!r})
run(command(folder, str(folder / "family.py"), str(folder / "pids")),
    began=lambda name: None, stop=lambda: "")
"""
    parent = subprocess.Popen([sys.executable, "-c", tick])
    pids = wait_for(tmp_path / "pids")
    assert len(living(pids)) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while living(pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert living(pids) == []


@pytest.mark.fault("P14")
def test_a_run_sees_no_other_variables_than_those_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLACK_WEBHOOK", "MY_TOKEN", "PATHOLOGY", "OTHER"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://x")
    found = allowed_environment(["OTHER"])
    assert [name for name, value in found.items() if value == "canary"] == ["OTHER"]
    assert {"PATH", "MLFLOW_TRACKING_URI"} <= set(found)
