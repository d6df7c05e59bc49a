"""Existence means completeness: mutations, kills, full disks and races."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vinedresser.errors import DamagedError, MachineError
from vinedresser.workspace.commit import canonical_json, commit, is_committed, quarantine, verify
from vinedresser.workspace.process import this_process
from vinedresser.workspace.storage import MANIFEST, write_file

FILES = {
    "a.bin": random.Random(1).randbytes(1500),
    "text.txt": b"one line\nand another\n",
    "deep/er/b.bin": random.Random(2).randbytes(300),
    "empty": b"",
}


def fill(target: Path, files: dict[str, bytes] = FILES) -> Path:
    with commit(target) as staging:
        for name, content in files.items():
            path = staging.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        staging.meta.update(rows=3, share=0.25, huge=1.5e300, name="é")
    return target


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    target = fill(tmp_path / "deeper" / "shards")
    manifest = verify(target)
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert manifest.meta["share"] == 0.25
    assert is_committed(target)
    assert names_in(target.parent) == ["shards"]


def test_the_digest_is_of_the_content(tmp_path):
    one, two = fill(tmp_path / "one"), fill(tmp_path / "two")
    other = fill(tmp_path / "three", {**FILES, "empty": b"x"})
    assert verify(one).digest == verify(two).digest != verify(other).digest


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One changed byte, a cut, or some bytes more."""
    kind = rng.choice(["byte", "cut", "more"]) if content else "more"
    if kind == "byte":
        at = rng.randrange(len(content))
        return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1 :]
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    return content + rng.randbytes(rng.randrange(1, 9))


def is_same_manifest(old: bytes, new: bytes) -> bool:
    """Whether only white space or the spelling of a value changed."""
    try:
        return canonical_json(json.loads(old)) == canonical_json(json.loads(new))
    except ValueError:
        return False


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_no_mutation_is_accepted(tmp_path, name):
    target = fill(tmp_path / "t")
    path, rng = target / name, random.Random(name)
    original, refused = path.read_bytes(), 0
    for _ in range(1000):
        changed = mutated(original, rng)
        path.write_bytes(changed)
        if name == MANIFEST and is_same_manifest(original, changed):
            continue
        with pytest.raises(DamagedError):
            verify(target)
        refused += 1
    assert refused > 900
    path.write_bytes(original)
    verify(target)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"3", b'"digest"', b"null", b"{}", b"\xff", b"[" * 100_000,
        b'{"digest": "x", "schema": 1, "meta": {}, "files": []}',
        b'{"digest": "x", "schema": 1, "meta": {}, "files": {"a": 3}}',
        b'{"digest": "x", "schema": 1, "meta": {}, "files": {"a": [1e9999, "x"]}}',
        b'{"digest": "x", "schema": 1, "meta": {"a": 1e9999}, "files": {}}',
        b'{"digest": "x", "schema": 1, "meta": {"a": NaN}, "files": {}}',
    ],
    ids=lambda content: content[:70].decode(errors="replace"),
)  # fmt: skip
def test_manifests_that_are_none(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError):
        verify(tmp_path)


def test_another_schema_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("vinedresser.workspace.commit.MANIFEST_SCHEMA", 99)
    target = fill(tmp_path / "t")
    monkeypatch.undo()
    with pytest.raises(DamagedError, match="schema 99, this version reads 1"):
        verify(target)


def test_missing_extra_and_swapped_files(tmp_path):
    target = fill(tmp_path / "t")
    (target / "a.bin").rename(target / "moved.bin")
    with pytest.raises(DamagedError, match=r"missing a\.bin"):
        verify(target)
    (target / "moved.bin").rename(target / "a.bin")
    (target / "deep" / "extra").touch()
    with pytest.raises(DamagedError, match="unknown deep/extra"):
        verify(target)
    (target / "deep" / "extra").unlink()
    verify(target)
    (target / MANIFEST).unlink()
    with pytest.raises(DamagedError, match="the folder is incomplete"):
        verify(target)
    (target / MANIFEST).mkdir()
    with pytest.raises(DamagedError, match="the folder is incomplete"):
        verify(target)
    with pytest.raises(DamagedError, match="the folder is incomplete"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_nothing(tmp_path, error):
    with pytest.raises(error), commit(tmp_path / "t") as staging:  # noqa: PT012
        (staging.path / "half").write_text("half")
        raise error
    assert names_in(tmp_path) == []


def test_the_first_writer_wins(tmp_path):
    target = tmp_path / "t"
    with commit(target) as late:
        (late.path / "late").touch()
        fill(target)
    assert set(verify(target).files) == set(FILES)
    fill(target, {"other": b""})
    assert set(verify(target).files) == set(FILES)
    assert names_in(tmp_path) == ["t"]


def test_something_else_in_the_way_is_said(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        with pytest.raises(DamagedError, match="exists without"):
            fill(tmp_path / name)
    assert names_in(tmp_path) == ["file", "folder"]
    assert names_in(tmp_path / "folder") == ["mine"]


def test_a_committed_folder_can_be_copied_changed_and_committed_anew(tmp_path):
    old = fill(tmp_path / "old")
    with commit(tmp_path / "new") as staging:
        shutil.copytree(old, staging.path, dirs_exist_ok=True)
        (staging.path / "a.bin").write_bytes(b"new")
    assert verify(tmp_path / "new").files["a.bin"][0] == 3
    assert MANIFEST not in verify(tmp_path / "new").files


@pytest.mark.parametrize("name", ["a [b]*?", "a b'\"$(x)é", ".tmp-x", "a.tmp-b"])
def test_odd_names(tmp_path, name):
    left = tmp_path / f".{name}.tmp-{this_process().rsplit('~', 1)[0]}~1~deadbeef"
    left.mkdir()
    verify(fill(tmp_path / name))
    assert names_in(tmp_path) == [name]


def test_quarantine_moves_aside(tmp_path):
    target = fill(tmp_path / "t")
    aside = quarantine(target)
    verify(aside)
    assert not target.exists()
    verify(fill(target))


def test_write_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deeper" / "x.json"
    write_file(path, "old")
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(MachineError, match="input/output error"):
        write_file(path, b"new")
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["x.json"]


# Failing disks.


def fail_with(number: int, *, at: int = 1):
    calls = 0

    def fail(*_args, **_kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("at", range(1, 12))
def test_a_sync_that_fails_leaves_nothing_or_everything(tmp_path, monkeypatch, at):
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO, at=at))
    target, told = tmp_path / "t", None
    try:
        fill(target)
    except MachineError as error:
        told = error
    monkeypatch.undo()
    if told:
        assert str(told).startswith(f"error[E-MACHINE] {target}: the disk reports")
    else:
        assert at > 9
    if target.exists():
        verify(target)
    assert names_in(tmp_path) in ([], ["t"])
    verify(fill(target))


def test_an_unreadable_input_is_blamed_and_not_the_target(tmp_path):
    with (
        pytest.raises(MachineError, match=r"E-MACHINE\] /somewhere/corpus: permission"),
        commit(tmp_path / "t"),
    ):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/corpus")


MOUNTED = """
import sys
from pathlib import Path
from vinedresser.workspace.commit import commit, verify
from vinedresser.errors import MachineError
room = Path(sys.argv[1])
def write(megabytes, files):
    with commit(room / "t") as staging:
        for i in range(files):
            (staging.path / str(i)).write_bytes(bytes(int(megabytes * 2**20)))
try:
    write(float(sys.argv[2]), int(sys.argv[3]))
    print("accepted")
except MachineError as error:
    print(error.exit_code, error)
print(sorted(p.name for p in room.iterdir()))
if sys.argv[4] == "again":
    write(0.01, 1)
    verify(room / "t")
    print("works again")
"""


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ("size=1m", ["0.3", "5", "again"], "the disk is full"),
        ("nr_inodes=6", ["0", "9", "again"], "the disk is full"),
        ("ro", ["0", "1", "no"], "the file system is read-only"),
    ],
)
def test_full_and_read_only_disks(tmp_path, options, arguments, words):
    mount = f'mount -t tmpfs -o {options} none "{tmp_path}"'
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this machine does not permit mounts")
    script = f'{mount} && exec "$@"'
    command = [sys.executable, "-c", MOUNTED, str(tmp_path), *arguments]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, left, *again = done.stdout.strip().split("\n")
    assert error.startswith("3 error[E-MACHINE]")
    assert words in error
    assert left == "[]"
    assert again == (["works again"] if arguments[-1] == "again" else [])


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))" + MOUNTED


def test_file_size_limit(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), "0.3", "1", "again"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the file size limit (ulimit -f) is too small" in done.stdout
    assert done.stdout.strip().split("\n")[1:] == ["[]", "works again"]


# Kills.

KILLED = """
import os, signal, sys
from pathlib import Path
from vinedresser.workspace.commit import commit
at, calls = int(sys.argv[2]), 0
def around(function):
    def wrapped(*args, **kwargs):
        point()
        result = function(*args, **kwargs)
        point()
        return result
    return wrapped
def point():
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
for name in ("mkdir", "fsync", "rename", "replace"):
    setattr(os, name, around(getattr(os, name)))
with commit(Path(sys.argv[1])) as staging:
    (staging.path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (staging.path / name).write_bytes(name.encode() * 100)
        point()
print(calls)
"""


def run_until(target: Path, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(target), str(at)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_nothing_or_everything(tmp_path):
    points = int(run_until(tmp_path / "whole" / "t", 0).stdout)
    assert points > 15
    seen = set()
    for at in range(1, points + 1):
        target = tmp_path / str(at) / "t"
        assert run_until(target, at).returncode == -signal.SIGKILL
        seen.add(target.exists())
        if target.exists():
            assert set(verify(target).files) == {"a", "sub/b"}
        with commit(target) as staging:
            (staging.path / "a").write_bytes(b"a" * 100)
        assert "a" in verify(target).files
        assert names_in(target.parent) == ["t"]
    assert seen == {True, False}


RACER = """
import sys
from pathlib import Path
from vinedresser.workspace.commit import commit, verify
room, me = Path(sys.argv[1]), sys.argv[2]
sys.stdin.read()
for i in range(20):
    with commit(room / str(i)) as staging:
        for name in "abc":
            (staging.path / name).write_text(me)
    verify(room / str(i))
"""


@pytest.mark.slow
def test_eight_writers_of_one_target_make_one_complete_winner(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(i)],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(8)
    ]  # fmt: skip
    for racer in racers:
        racer.stdin.close()
    for racer in racers:
        with racer:
            assert racer.wait() == 0, racer.stderr.read()
    assert names_in(tmp_path) == sorted(str(i) for i in range(20))
    for folder in tmp_path.iterdir():
        verify(folder)
        assert len({(folder / name).read_text() for name in "abc"}) == 1
