"""Leases on POSIX and on a store that has conditional writes only."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from vinedresser.errors import BusyError, MachineError
from vinedresser.workspace import lease as module
from vinedresser.workspace.lease import EXPIRY_SECONDS, Lease, leased
from vinedresser.workspace.process import this_process
from vinedresser.workspace.storage import POSIX, Storage


class Bucket:
    """An object store in memory: whole objects and conditional writes."""

    def __init__(self) -> None:
        self._objects: dict[Path, bytes] = {}
        self._server = Lock()

    def read(self, path: Path) -> bytes | None:
        return self._objects.get(path)

    def write(self, path: Path, content: bytes) -> None:
        self._objects[path] = content

    def replace(self, path: Path, content: bytes | None, *, expected: bytes | None) -> bool:
        with self._server:
            is_expected = self._objects.get(path) == expected
            if is_expected:
                self._objects.pop(path, None)
                self._objects |= {path: content} if content is not None else {}
            return is_expected

    def publish(self, staging: Path, target: Path) -> bool:
        """Upload the files first, then the manifest, if there is none."""
        if self.read(target / "manifest.json") is not None:
            return False
        manifest = (staging / "manifest.json").read_bytes()
        for path in staging.rglob("*"):
            if path.is_file() and path != staging / "manifest.json":
                self._objects[target / path.relative_to(staging)] = path.read_bytes()
        return self.replace(target / "manifest.json", manifest, expected=None)


@pytest.fixture(params=["posix", "bucket"])
def storage(request) -> Storage:
    return POSIX if request.param == "posix" else Bucket()


def holder(path: Path, storage: Storage, *, process: str, seconds_ago: float = 0.0) -> Lease:
    """A lease as another process would have left it."""
    lease = Lease(path, storage=storage)
    assert lease.take()
    fields = json.loads(storage.read(path))
    fields |= {"process": process, "heartbeat": str(int(time.time() - seconds_ago))}
    storage.write(path, json.dumps(fields).encode())
    return lease


def test_one_holder_at_a_time(tmp_path, storage):
    one, two = (Lease(tmp_path / "deep" / "lease", storage=storage) for _ in range(2))
    assert one.take()
    assert not two.take()
    assert (one.is_current(), two.is_current()) == (True, False)
    one.require_current()
    assert one.beat()
    one.release()
    assert two.take()
    assert not one.is_current()
    with pytest.raises(BusyError, match="a later start has taken over"):
        one.require_current()


def test_of_many_that_try_at_once_one_succeeds(tmp_path, storage):
    leases = [Lease(tmp_path / "lease", storage=storage) for _ in range(16)]
    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(Lease.take, leases)) == 1


def test_a_lease_that_was_taken_over_is_lost(tmp_path, storage):
    path = tmp_path / "lease"
    old, new = Lease(path, storage=storage), Lease(path, storage=storage)
    assert old.take()
    assert new.take(force=True)
    with pytest.raises(BusyError, match="writes no more"):
        old.require_current()
    # A late heartbeat or release of the old holder changes nothing.
    assert not old.beat()
    old.release()
    new.require_current()


def test_a_dead_process_of_this_host_holds_nothing(tmp_path, storage):
    host, pid, started = this_process().split("~")
    holder(tmp_path / "lease", storage, process=f"{host}~{pid}~{int(started) - 100}")
    assert Lease(tmp_path / "lease", storage=storage).take()


def test_a_process_of_another_host_holds_until_its_heartbeats_stop(tmp_path, storage):
    for name, seconds, is_free in (
        ("beating", EXPIRY_SECONDS / 2, False), ("silent", EXPIRY_SECONDS + 1, True),
    ):  # fmt: skip
        old = holder(tmp_path / name, storage, process="elsewhere.1~1~1", seconds_ago=seconds)
        new = Lease(tmp_path / name, storage=storage)
        assert new.take() is is_free
        assert old.is_current() is not is_free


def test_a_folder_is_published_once_and_whole(tmp_path, storage):
    target = tmp_path / "target"
    for name in ("first", "second"):
        staging = tmp_path / name
        (staging / "deep").mkdir(parents=True)
        (staging / "deep" / "file").write_text(name)
        (staging / "manifest.json").write_text("{}")
        assert storage.publish(staging, target) is (name == "first")
    assert storage.read(target / "deep" / "file") == b"first"
    assert storage.read(target / "manifest.json") == b"{}"
    assert storage.read(target / "other") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"\xff", b'{"token": 1, "heartbeat": "x"}']
)
def test_a_damaged_lease_is_free(tmp_path, storage, content):
    storage.write(tmp_path / "lease", content)
    assert Lease(tmp_path / "lease", storage=storage).take()


def test_heartbeats_are_written_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    path = tmp_path / "lease"
    with leased(path, "x"):
        first = json.loads(path.read_bytes())["heartbeat"]
        end = time.monotonic() + 60
        while json.loads(path.read_bytes())["heartbeat"] == first and time.monotonic() < end:
            time.sleep(0.005)
        assert json.loads(path.read_bytes())["heartbeat"] != first
    assert not path.exists()


def test_who_holds_it_is_named(tmp_path):
    path = tmp_path / "lease"
    with (
        leased(path, "model m"),
        pytest.raises(
            BusyError,
            match=rf"model m: in use by process {os.getpid()} on \S+; wait for it to end",
        ),
        leased(path, "model m"),
    ):
        pass
    with (
        leased(path, "model m"),
        pytest.raises(BusyError, match="for 0 s; wait for it"),
        leased(path, "model m", wait=0.2),
    ):
        pass


def test_who_waits_gets_it_when_the_holder_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from vinedresser.workspace.lease import leased\n"
        "with leased(Path(sys.argv[1]), 'x'):\n"
        "    print('held', flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lease")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(BusyError), leased(tmp_path / "lease", "x"):
            pass
        child.send_signal(signal.SIGKILL)
        with leased(tmp_path / "lease", "x", wait=None) as lease:
            lease.require_current()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(MachineError, match="a file is in the way"),
        leased(tmp_path / "file" / "lease", "x"),
    ):
        pass


def test_an_error_of_the_block_passes_where_the_lease_cannot_be_released(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> bool:
        raise MachineError("the disk is full")

    with pytest.raises(KeyError), leased(tmp_path / "lease", "x"):  # noqa: PT012
        monkeypatch.setattr(type(POSIX), "replace", full)
        raise KeyError
    monkeypatch.undo()


def test_a_heartbeat_that_fails_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    beats, beat = [], Lease.beat

    def failing(lease: Lease) -> bool:
        beats.append(1)
        if len(beats) == 1:
            raise MachineError("the mount was lost")
        return beat(lease)

    monkeypatch.setattr(Lease, "beat", failing)
    with leased(tmp_path / "lease", "x"):
        end = time.monotonic() + 60
        while len(beats) < 3 and time.monotonic() < end:
            time.sleep(0.005)
    assert len(beats) >= 3
