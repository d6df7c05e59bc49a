"""Garbage collection: what stays, what goes, and readers meanwhile."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.random_workspace import RandomWorkspace
from vinedresser.cli import main
from vinedresser.gc import Entry, Retention, collect
from vinedresser.registry.gate import Gate
from vinedresser.registry.registration import register
from vinedresser.tracking import initialise, store_for
from vinedresser.tracking.store import open_client
from vinedresser.workspace.commit import commit, is_committed, verify
from vinedresser.workspace.holds import hold
from vinedresser.workspace.layout import RunFolder, SweepFolder, Workspace
from vinedresser.workspace.lease import leased

# More by `make bench NAME=gc`.
STATES = int(os.environ.get("GC_STATES", "40"))


@settings(max_examples=STATES)
@given(st.integers(0, 2**64))
def test_nothing_that_is_needed_is_removed(seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        state = RandomWorkspace(Workspace(Path(folder)), random.Random(seed))
        before = state.files()
        planned = collect(state.space, state.keep, state.registered, is_dry=True)
        assert state.files() == before
        with state.readers():
            entries = collect(state.space, state.keep, state.registered)
            lost = {path for path in before if not path.exists()}
            reasons = {path: why for path, why in state.needed.items() if not path.exists()}
            assert not lost, reasons
            assert {p: c for p, c in before.items() if p.is_file() and p.read_bytes() != c} == {}
            removed = {entry.path for entry in entries if not entry.is_kept}
            assert not any(path.exists() for path in removed)
            assert removed <= {entry.path for entry in planned if not entry.is_kept}
            again = collect(state.space, state.keep, state.registered)
            assert not [entry for entry in again if not entry.is_kept]


def bundle_at(folder: Path, size: int = 1000, **experiment: Any) -> Path:
    with commit(folder) as staging:
        (staging.path / "experiment.json").write_text(json.dumps(experiment))
        (staging.path / "weights.safetensors").write_bytes(os.urandom(size))
    return folder


def by_name(entries: list[Entry]) -> dict[str, tuple[bool, str]]:
    return {entry.path.name: (entry.is_kept, entry.reason) for entry in entries}


def test_trials_outside_of_the_best_go(tmp_path: Path) -> None:
    space, trials = Workspace(tmp_path), []
    for number, state in enumerate(["complete"] * 4 + ["pruned"]):
        run = RunFolder(space.runs / f"t{number}-{number:012x}")
        run.path.mkdir(parents=True)
        if state == "complete":
            bundle_at(run.bundle)
            run.outcome.write_text("{}")
        trials.append({"number": number, "state": state, "run": run.name})
    sweep = SweepFolder(space.sweeps / "s-000000000000")
    sweep.path.mkdir(parents=True)
    # Best first; the worst of the complete is on the Pareto front.
    sweep.outcome.write_text(json.dumps({"trials": trials, "front": [3]}))
    entries = collect(space, Retention(top=2), {})
    found = by_name(entries)
    assert found["t0-000000000000"] == (True, "trial 0 of s-000000000000, rank 1")
    assert found["t2-000000000002"] == (
        False, "trial 2 of s-000000000000, not among the best 2",
    )  # fmt: skip
    left = sorted(path.name[:2] for path in space.runs.iterdir())
    assert left == ["t0", "t1", "t3"]
    freed = sum(entry.bytes for entry in entries if not entry.is_kept)
    assert 1000 < freed < 3000
    assert not space.trash.exists()


def test_a_checkpoint_that_is_newer_than_the_end_of_its_sweep_stays(tmp_path: Path) -> None:
    """A longer search of the same study trains the same trial further."""
    space = Workspace(tmp_path)
    run, sweep = RunFolder(space.runs / "t-0"), SweepFolder(space.sweeps / "s-0")
    run.checkpoint(5).mkdir(parents=True)
    sweep.path.mkdir(parents=True)
    trials = [{"number": 0, "state": "pruned", "run": "t-0"}]
    sweep.outcome.write_text(json.dumps({"trials": trials, "front": []}))
    old = time.time() - 100
    os.utime(sweep.outcome, (old, old))
    assert by_name(collect(space, Retention(), {}))["t-0"][0] is True
    os.utime(run.checkpoint(5), (old - 100, old - 100))
    assert by_name(collect(space, Retention(), {}))["t-0"][0] is False
    assert not run.path.exists()


def test_what_killed_processes_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    space.shards.mkdir()
    for name, age in (("dead", 1000), ("alive", 0)):
        # On another host, where only the heartbeat can be seen.
        left = space.shards / f".{name}.tmp-pod-{name}.1~1~1~0123abcd"
        left.mkdir()
        os.utime(left, (time.time() - age, time.time() - age))
    sweep = SweepFolder(space.sweeps / "s-0")
    sweep.ray_scratch.mkdir(parents=True)
    with commit(space.shards / "a-000000000000"):
        found = by_name(collect(space, Retention(), {}))
    assert [name for name, (is_kept, _) in found.items() if not is_kept] == [
        ".dead.tmp-pod-dead.1~1~1~0123abcd", "tune"
    ]  # fmt: skip
    assert is_committed(space.shards / "a-000000000000")
    with leased(sweep.lease, "sweep"):
        sweep.ray_scratch.mkdir()
        assert "tune" not in by_name(collect(space, Retention(), {}))


def test_the_last_used_shard_sets_of_each_task_stay(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    for number in range(3):
        folder = bundle_at(space.shards / f"a-{number:012x}")
        os.utime(folder, (number, number))
    bundle_at(space.shards / "b-000000000000")
    hold(space.shards / "a-000000000000")  # used last, and open in this process
    found = by_name(collect(space, Retention(shard_sets=1), {}))
    assert {name for name, (is_kept, _) in found.items() if is_kept} == {
        "a-000000000000", "b-000000000000"
    }  # fmt: skip


READER = """
import sys, time
from pathlib import Path
from vinedresser.errors import VinedresserError
from vinedresser.workspace.commit import verify
from vinedresser.workspace.holds import hold
folder, opened = Path(sys.argv[1]), 0
end = time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
while time.monotonic() < end:
    for target in sorted(folder.glob("a-*")):
        hold(target)
        if not target.is_dir():
            continue  # removed before it was held: as if it had never been
        for _ in range(5):
            verify(target)
        opened += 1
print(opened)
"""


def test_readers_never_fail_during_collections(tmp_path: Path) -> None:
    """Two readers open whatever they see, while sets are written and removed around them."""
    space, made = Workspace(tmp_path), 0
    bundle_at(space.shards / "a-000000000000")
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(space.shards), "3"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    removed = 0
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    while any(reader.poll() is None for reader in readers):
        made += 1
        bundle_at(space.shards / f"a-{made:012x}", size=20)
        entries = collect(space, Retention(shard_sets=1), {})
        removed += sum(not entry.is_kept for entry in entries)
    for reader in readers:
        out, error = reader.communicate()
        assert reader.returncode == 0, error
        assert int(out) > 0
    assert made > 5
    collect(space, Retention(shard_sets=1), {})
    assert len(list(space.shards.glob("a-*"))) == 1


@pytest.mark.parametrize("is_registered", [False, True])
def test_days_remove_old_models_unless_they_are_registered(
    tmp_path: Path, is_registered: bool
) -> None:
    space = Workspace(tmp_path)
    run, model = RunFolder(space.runs / "r-0"), space.models / "m-0"
    bundle_at(run.bundle)
    run.outcome.write_text("{}")
    bundle_at(model, init=str(run.bundle))
    old = time.time() - 3 * 86400
    for path in (*run.path.iterdir(), run.path, *model.iterdir(), model):
        os.utime(path, (old, old))
    digest = json.loads((model / "manifest.json").read_text())["digest"]
    registered = {digest: ["m/1", "m@champion"]} if is_registered else {}
    assert all(entry.is_kept for entry in collect(space, Retention(), registered))
    found = by_name(collect(space, Retention(days=1), registered))
    assert {is_kept for is_kept, _ in found.values()} == {is_registered}
    if is_registered:
        assert found["r-0"] == (True, "m-0 was made from it")


@pytest.mark.filterwarnings("ignore")
def test_the_verb_keeps_versions_and_closes_runs_of_dead_pods(
    tmp_path: Path, with_database: Any, monkeypatch: Any, capsys: Any
) -> None:
    """On a real registry and tracking store; the leases of the pods are on the workspace."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    space = Workspace(with_database(tmp_path / "space"))
    store = store_for(space.path, "task")
    scores = {"metric": "per", "reference_digest": "r", "dev": {"per": 9.0}}
    bundle_at(space.models / "m-000000000000", init=None)
    (space.models / "m-000000000000" / "scores.json").write_text(json.dumps(scores))
    with commit(space.models / "m-000000000001") as staging:
        (staging.path / "scores.json").write_text(json.dumps(scores))
        (staging.path / "experiment.json").write_text("{}")
    made = verify(space.models / "m-000000000001")
    assert register(made, name="m", store=store, gate=Gate(split="dev")).is_champion

    client, runs = open_client(store), {}
    for name, age in (("dead", 1000), ("alive", 0)):
        folder = RunFolder(space.runs / f"{name}-000000000000")
        folder.path.mkdir(parents=True)
        owner = f"pod-{name}.1~1~1"
        fields = {"token": "t", "process": owner, "heartbeat": str(int(time.time()) - age)}
        folder.command_lease.write_text(json.dumps(fields))
        tags = {"vinedresser.owner": owner, "vinedresser.folder": str(folder.path)}
        runs[name] = client.create_run(initialise(store), tags=tags).info.run_id
    assert main(["gc", "-w", str(space.path), "--json", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["closed_runs"] == []
    assert main(["gc", "-w", str(space.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["closed_runs"] == [runs["dead"]]
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in found["entries"]}
    assert reasons["m-000000000001"] == "registered: m/1, m@challenger, m@champion"
    assert reasons["dead-000000000000"] == "neither a model nor a checkpoint"
    assert reasons["alive-000000000000"] == "in use by process 1 on pod-alive"
    assert [path.name for path in space.runs.iterdir()] == ["alive-000000000000"]
    assert main(["gc", "-w", str(space.path), "shard_sets=0"]) == 2
    assert main(["gc", "-w", str(space.path)]) == 0
    assert capsys.readouterr().out.endswith("0 bytes freed\n")
