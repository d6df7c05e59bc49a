"""The verb `schedule`: what a cheap tick imports, pauses, checks, records, and the metrics."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a verb of `schedule` in this process; return its code, and its JSON or text."""
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VINEDRESSER_WORKSPACE", str(tmp_path / "space"))
    before = signal.getsignal(signal.SIGTERM)

    def command(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["schedule", *words])
        signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return code, json.loads(out) if "--json" in words and out else out + err

    return command


def write(tmp_path: Path, **values: Any) -> None:
    plain = {"name": "nightly", "pipeline": "pipelines.nothing", "every": "* * * * *", **values}
    (tmp_path / "n.json").write_text(json.dumps(plain))


def test_a_failed_slot_and_what_the_verbs_print_of_it(run: Run, tmp_path: Path) -> None:
    write(tmp_path, track=False, when={"data": "any"}, deadline="1s", retries={"pause_after": 1})
    code, records = run("tick", "n.json", "--json")
    assert code == 0
    assert [record["state"] for record in records] == ["failed"]
    code, shown = run("show", "nightly", "--json")
    assert (code, shown["state"], shown["ends"]) == (0, "paused", {"failed": 1})
    (attempt,) = shown["records"][0]["attempts"]
    assert attempt["seconds"] > 0
    assert "slots in a row failed" in shown["reason"]
    assert "failed" in run("show", "nightly")[1]
    assert run("check", "nightly")[0] == 4  # paused by failures
    assert run("resume", "nightly")[0] == 0
    assert run("check", "nightly")[0] == 0
    code, rows = run("ls", "--json")
    assert (code, [row["schedule"] for row in rows]) == (0, ["nightly"])
    assert rows[0]["failures"] == 0


@pytest.mark.parametrize(("codes", "expected"), [([2], 75), ([3], 2)])
def test_the_exit_code_of_a_tick(run: Run, tmp_path: Path, codes: list[int], expected: int) -> None:
    """The pipeline does not exist: 2, unless the slot waits for its repetition."""
    write(tmp_path, when={"data": "any"}, retries={"codes": codes, "backoff": "1h"})
    assert run("tick", "n.json", "--exit-code")[0] == expected


def test_what_other_schedulers_get(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VINEDRESSER_PACKAGES", "my_zoo")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret := "canary-5ecret-value")
    write(tmp_path, interval="6h", every=None)
    for target in ("cron", "systemd", "airflow", "k8s", "rayjob", "raycronjob"):
        code, text = run("emit", "n.json", "image=x", "--target", target)
        assert (code, "my_zoo" in text, secret in text) == (0, True, False)
    words = f"schedule tick {tmp_path / 'n.json'} --workspace {tmp_path / 'space'} --exit-code"
    code, text = run("emit", "n.json")
    assert (code, text.startswith("*/2 * * * * "), words in text) == (0, True, True)
    assert "VINEDRESSER_PACKAGES=my_zoo" in text
    code, text = run("emit", "n.json", "--target", "systemd")
    assert (code, "# vinedresser-nightly.timer\n[Unit]" in text) == (0, True)
    code, text = run("emit", "n.json", "--target", "k8s")
    assert (code, "pass image=registry/vinedresser:tag" in text) == (2, True)
    code, text = run("emit", "n.json", "imag=x", "--target", "k8s")
    assert (code, "did you mean image?" in text) == (2, True)
    write(tmp_path, interval="6h", every=None, run={"image": "from/file:1"})
    code, text = run("emit", "n.json", "namespace=ml", "--target", "k8s", "--into", "made")
    assert (code, text.strip()) == (0, "made/nightly.yaml")
    manifest = (tmp_path / "made/nightly.yaml").read_text()
    for line in ("schedule: 0 */6 * * *", "timeZone: UTC", "image: from/file:1", "namespace: ml"):
        assert line in manifest
    write(tmp_path, interval="7h", every=None)
    code, text = run("emit", "n.json", "image=x", "--target", "k8s")
    assert (code, "no cron expression" in text) == (2, True)
    assert run("emit", "n.json")[0] == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    code, text = run("emit", "n.json")
    assert (code, "the URL holds a password" in text) == (2, True)


def test_pause_and_check(run: Run, tmp_path: Path) -> None:
    write(tmp_path, every="0 0 1 1 *")
    assert run("check", "n.json")[0] == 4  # has never ticked
    assert run("pause", "n.json")[0] == 2
    assert run("tick", "n.json")[0] == 0
    assert run("check", "nightly", "n.json")[0] == 0
    assert run("pause", "nightly", "--reason", "holidays")[0] == 0
    assert run("ls", "--json")[1][0]["state"] == "paused"
    code, text = run("backfill", "nightly", "--from", "2030-01-01", "--to", "2029-01-01")
    assert (code, "expected a span of the past" in text) == (2, True)
    assert run("show", "unknown")[0] == 2


@pytest.mark.fault("P12")
def test_a_tick_without_anything_due_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    write(tmp_path, every="0 0 1 1 *")
    code = (
        "import json, sys, time; from vinedresser.cli import main; started = time.process_time();"
        "code = main(['schedule', 'tick', 'n.json']);"
        "print(json.dumps([code, time.process_time() - started, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ended, seconds, modules = json.loads(done.stdout.splitlines()[-1])
    assert ended == 0
    assert not {"torch", "ray", "mlflow", "optuna"} & set(modules)
    assert seconds < 2


def test_a_served_schedule_ticks_and_has_metrics(tmp_path: Path) -> None:
    write(tmp_path, every=None, interval="1s", when={"data": "any"}, deadline="1s", grace="0s",
          track=False,
          retries={"pause_after": 0})  # fmt: skip
    words = ["schedule", "serve", "n.json", "--port", "0", "-w", str(tmp_path / "space")]
    process = subprocess.Popen(
        [sys.executable, "-m", "vinedresser.cli", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    until, metrics = time.monotonic() + 60, ""
    while 'slots_total{end="failed",schedule="nightly"}' not in metrics or (
        'end="failed",schedule="nightly"} 0.0' in metrics and time.monotonic() < until
    ):
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        time.sleep(0.2)
    with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
        assert answer.read() == b"ok\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    failed = [line for line in metrics.splitlines() if 'end="failed"' in line]
    assert float(failed[0].split()[-1]) >= 1
    assert "vinedresser_schedule_next_slot_timestamp_seconds" in metrics


@pytest.mark.slow
def test_each_slot_is_a_run_of_the_tracking_store(
    run: Run, tmp_path: Path, with_database: Callable[[Path], Path]
) -> None:
    from vinedresser.schedule.record import Ledger
    from vinedresser.tracking import store_for
    from vinedresser.tracking.store import open_client
    from vinedresser.workspace.layout import Workspace

    with_database(tmp_path / "space")
    write(tmp_path, when={"data": "any"}, deadline="1s", retries={"pause_after": 0})
    assert run("tick", "n.json")[0] == 0
    ledger = Ledger(Workspace(tmp_path / "space").schedule("nightly"))
    (name,) = ledger.names()
    assert ledger.folder.tracked(name).exists()
    assert run("track", "nightly")[0] == 0
    client = open_client(store_for(tmp_path / "space", "schedules"))
    experiment = client.get_experiment_by_name("schedules")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.data.tags["vinedresser.verdict"] == "failed"
    assert "deadline" in tracked.data.tags["mlflow.note.content"]
    assert tracked.data.metrics["attempts"] == 1
    assert tracked.info.status == "FAILED"
