"""Faults of a preparation: kills, failing disks, damaged shards (tests/test_faults.py)."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from vinedresser.config import Batching, Task, Tokenizer
from vinedresser.data.batching.reader import stream
from vinedresser.data.corpora.corpus import open_corpus, read
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import open_shards, prepare, tokenizers
from vinedresser.errors import DamagedError, DataError
from vinedresser.workspace.commit import verify


def refused(task: Task, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(task, folder / "out")
    assert caught.value.exit_code == 2
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())
    return str(caught.value)


@pytest.mark.fault("D01")
def test_d01_different_line_counts_say_where_they_part(text_task, tmp_path):
    draw = random.Random(3)
    lines = [b"w " * draw.randint(1, 30) for _ in range(1000)]
    source = b"".join(line + b"\n" for line in lines)
    target = b"".join(line + b"y\n" for i, line in enumerate(lines) if i != 611)
    found = refused(text_task(train_source=source, train_target=target), tmp_path)
    assert "train.source has 1000 lines" in found
    assert "train.target has 999" in found
    near = re.search(r"part ways near line (\d+)", found)
    assert near
    assert abs(int(near[1]) - 612) <= 1


@pytest.mark.fault("D03")
def test_d03_empty_lines_are_dropped_and_named(text_task, tmp_path, logged):
    lines = [b"a%d" % i for i in range(40)]
    for at in (3, 17, 30):
        lines[at] = b" " if at == 17 else b""
    task = text_task(train_source=b"".join(line + b"\n" for line in lines))
    assert prepare(task, tmp_path / "out").counts["train"] == 37
    assert any(
        "of 40 rows dropped 3 empty (lines 4, 18, 31 ...)" in line for line in logged.messages
    )


@pytest.mark.fault("D05")
def test_d05_a_byte_order_mark_changes_no_token(text_task, tmp_path):
    task = text_task()
    plain = prepare(task, tmp_path / "a", executor="in_process")
    path = tmp_path / "train.source"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = prepare(task, tmp_path / "b", executor="in_process")
    assert marked.digest != plain.digest  # another file, the same rows
    one, other = (verify(shards.folder).files["train-00000.parquet"] for shards in (plain, marked))
    assert one == other
    inside = tmp_path / "inside"
    inside.write_bytes("a\ufeffb\n".encode())
    pair = Pair(source=str(inside), target=str(inside))
    corpus = open_corpus(task.model_copy(update={"corpus": TextCorpus(train=pair, dev=pair)}))
    assert any("1 byte order marks inside the text kept" in note for note in corpus.notes)


LONG = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from pathlib import Path
from vinedresser.config import Task
from vinedresser.data.shards import prepare
task = Task.from_json(__import__("json").loads(sys.argv[1]), where="test")
shards = prepare(task, Path(sys.argv[2]), executor="in_process")
print(shards.meta["account"]["train"])
"""


@pytest.mark.fault("D10")
@pytest.mark.slow
@pytest.mark.parametrize("characters", [1_000_000, 100_000_000])
def test_d10_a_line_of_a_hundred_million_characters(text_task, tmp_path, characters):
    task = text_task()
    path = tmp_path / "train.source"
    lines = path.read_bytes().split(b"\n")
    lines[4] = b"a" * characters
    path.write_bytes(b"\n".join(lines))
    command = [sys.executable, "-c", LONG, json.dumps(task.to_json()), str(tmp_path / "out")]
    # Every thread of OpenBLAS maps 128 MB of the 2 GiB.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "'dropped': {'too_long': 1}, 'first_lines': {'too_long': [5]}" in done.stdout, (
        done.stderr
    )


@pytest.mark.fault("D12")
def test_d12_a_file_that_another_owns():
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv to be somebody else")
    code = (
        "import sys; from vinedresser.data.corpora.textfile import inspect_text; "
        "inspect_text(sys.argv[1])"
    )
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder, path = Path(name), Path(name) / "train.source"
        folder.chmod(0o755)
        path.write_text("a\n")
        done = []
        for mode in (0o644, 0):
            path.chmod(mode)
            command = [*nobody, code, str(path)]
            done.append(subprocess.run(command, capture_output=True, text=True, check=False))
    if "ModuleNotFoundError" in done[0].stderr or done[0].returncode in (126, 127):
        pytest.skip("the interpreter is closed to others")
    assert done[0].returncode == 0, done[0].stderr
    assert "train.source: permission denied" in done[1].stderr


@pytest.mark.fault("D14")
def test_d14_five_test_lines_in_train(text_task, tmp_path):
    task = text_task(test_source=b"".join(b"t%d\n" % i for i in range(9)),
                     test_target=b"".join(b"u%d\n" % i for i in range(9)))  # fmt: skip
    for side in ("source", "target"):
        path = tmp_path / f"train.{side}"
        lines = path.read_bytes().split(b"\n")
        lines[10:15] = (tmp_path / f"test.{side}").read_bytes().upper().split(b"\n")[2:7]
        path.write_bytes(b"\n".join(lines))
    found = refused(task, tmp_path)
    assert "5 train rows are in test, source and target; train lines 11, 12, 13, 14, 15" in found
    assert "cleaning.leakage=drop" in found


@pytest.mark.fault("D15")
def test_d15_a_corpus_smaller_than_its_vocabulary(text_task, tmp_path):
    three = {f"train_{side}": b"ab cd\nef\ngh\n" for side in ("source", "target")}
    task = text_task(Tokenizer(kind="bpe", vocab_size=8000), **three)
    limit = re.search(r"set vocab_size=(\d+) or less", refused(task, tmp_path))
    assert limit
    tokenizer = Tokenizer(kind="bpe", vocab_size=int(limit[1]))
    task = task.model_copy(update={"tokenizer": tokenizer})
    assert prepare(task, tmp_path / "out").counts["train"] == 3


@pytest.mark.fault("D17")
def test_d17_one_pair_and_two_workers(text_task, tmp_path):
    one = {
        f"{split}_{side}": b"a b\n" for split in ("train", "dev") for side in ("source", "target")
    }
    shards = prepare(text_task(**one), tmp_path / "out")
    batches = [
        next(stream(shards, Batching(max_padded_tokens=64), seed=0, rank=rank, of=2))
        for rank in (0, 1)
    ]
    assert [batch.rows_B.tolist() for batch in batches] == [[0], [0]]


@pytest.mark.fault("D20")
@pytest.mark.parametrize("kind", ["bpe", "characters", "symbols"])
def test_d20_decomposed_text_gives_the_same_ids(text_task, tmp_path, kind):
    lines = "".join(f"über größe {i % 3} naïve Å\n" for i in range(40)).encode()
    size = {"vocab_size": 60} if kind == "bpe" else {}
    task = text_task(Tokenizer(kind=kind, **size), train_source=lines)
    source, _ = tokenizers(prepare(task, tmp_path / "out"))
    composed, decomposed = "größe Å naïve", "gro\u0308ße A\u030a nai\u0308ve"
    assert source.encode(composed) == source.encode(decomposed)


@pytest.mark.fault("D21")
def test_d21_a_file_that_grows_is_refused(text_task, tmp_path, monkeypatch):
    task, path = text_task(), tmp_path / "train.source"
    corpus = open_corpus(task)
    with path.open("ab") as stream:
        stream.write(b"one more\n")
    monkeypatch.setattr("vinedresser.data.shards.open_corpus", lambda _: corpus)
    assert "train.source: changed while it was being read" in refused(task, tmp_path)


@pytest.mark.fault("D23")
def test_d23_six_damages_of_a_dictionary(lexicon_task, tmp_path):
    good = "".join(f"w{i} W AH{i % 3}\n" for i in range(9))
    for text, part in (
        (good + "alone\n", "words.dict:10: 'alone' has no phones or an empty one"),
        (good + "odd W 1\n", "words.dict:10: 'odd' has no phones or an empty one"),
        (good + "a\0b W\n", "words.dict:10:2: NUL byte"),
        ("w0 W\n", "1 words left for 2 dev, 2 test"),
        ("", "words.dict: empty file"),
    ):
        assert part in refused(lexicon_task(text), tmp_path)
    task = lexicon_task(good)
    (tmp_path / "words.dict").write_bytes(good.encode() + b"caf\xe9 K AH\n")
    assert "words.dict:10:4: invalid UTF-8 byte 0xe9" in refused(task, tmp_path)
    # Several variants: train takes all of them on request, dev and test the first alone.
    text = good + "".join(f"w{i}(2) V{i}\n" for i in range(9))
    task = lexicon_task(text, variants="all")
    held = {row.source for split in ("dev", "test") for row in read(task, split)}
    assert all(not row.target.startswith("V") for s in ("dev", "test") for row in read(task, s))
    train = [row.source for row in read(task, "train")]
    assert sorted(train) == sorted(2 * [f"w{i}" for i in range(9) if f"w{i}" not in held])


# Kills and failing disks.

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int calls;
static int strikes(const char *path) {
  const char *room = getenv("FAULT_ROOM"), *at = getenv("FAULT_AT");
  if (!room || !at || !strstr(path, room)) return 0;
  if (getenv("FAULT_COUNT")) {  /* says how many points there are */
    FILE *out = fopen(getenv("FAULT_COUNT"), "w");
    fprintf(out, "%d", ++calls);
    fclose(out);
    return 0;
  }
  if (++calls != atoi(at)) return 0;
  if (!strcmp(getenv("FAULT_KIND"), "kill")) _exit(137);
  errno = EIO;
  return 1;
}
static int strikes_fd(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strikes(path);
}
ssize_t write(int fd, const void *data, size_t size) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = dlsym(RTLD_NEXT, "write");
  return strikes_fd(fd) ? -1 : real(fd, data, size);
}
int fsync(int fd) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  return strikes_fd(fd) ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
  static int (*real)(const char *, const char *);
  if (!real) real = dlsym(RTLD_NEXT, "rename");
  return strikes(to) ? -1 : real(from, to);
}
"""

# One process imports, and a child of it dies at each point: an import takes seconds.
FAULTY = """
import json, os, sys, traceback
from pathlib import Path
from vinedresser.workspace.commit import verify
from vinedresser.config import Task
from vinedresser.data.shards import prepare
from vinedresser.data.corpora import row
from vinedresser.errors import MachineError
import pandas, pyarrow.parquet, sentencepiece
row.BLOCK_ROWS = 15
task = Task.from_json(json.loads(sys.argv[1]), where="test")
room, kind = Path(sys.argv[2]), sys.argv[3]

def attempt(at, out):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ.update(FAULT_ROOM=str(out), FAULT_AT=str(at), FAULT_KIND=kind)
    try:
        prepare(task, out, executor="in_process")
    except MachineError as error:
        os.write(1, (str(error) + chr(10)).encode())
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

os.environ["FAULT_COUNT"] = str(room / "count")
assert attempt(0, room / "whole") == 0
points = int((room / "count").read_text())
del os.environ["FAULT_COUNT"]
(folder,) = (room / "whole").iterdir()
wanted = verify(folder).digest
step = max(1, points // int(sys.argv[4]))
for at in range(1, points + 1, step):
    out = room / str(at)
    code = attempt(at, out)
    # Complete, or not there; never a part under the name of the whole.
    complete = [p for p in out.glob("*") if not p.name.startswith(".")]
    assert all(verify(p).digest == wanted for p in complete), at
    hidden = [p.name for p in out.glob(".*")]
    assert kind == "kill" or not hidden, (at, hidden)
    print(json.dumps([at, code, len(complete)]))
    again = attempt(0, out)
    assert again == 0, (at, again)
    (folder,) = out.iterdir()
    assert verify(folder).digest == wanted
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if not shutil.which("gcc"):
        pytest.skip("no gcc to build the fault shim with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "shim.c"), "-ldl"], check=True
    )
    return library


@pytest.mark.fault("S05", "S06", "S07")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "error"])
def test_s05_s06_s07_a_fault_at_any_call(text_task, tmp_path, shim, kind):
    """Dies, or answers EIO, at the k-th write, fsync or rename of a preparation, for 40 k."""
    task = text_task(Tokenizer(kind="bpe", vocab_size=40))
    room = tmp_path / "room"
    room.mkdir()
    command = [sys.executable, "-c", FAULTY, json.dumps(task.to_json()), str(room), kind, "40"]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().split("\n")
    outcomes = [json.loads(line) for line in lines if line.startswith("[")]
    assert len(outcomes) >= 40
    assert {code for _, code, _ in outcomes} <= ({137, 0} if kind == "kill" else {3, 0})
    assert any(code for _, code, _ in outcomes)
    if kind == "error":
        errors = [line for line in lines if line.startswith("error")]
        assert errors
        assert all("input/output error" in line for line in errors)


DRIVER = """
import json, sys
from pathlib import Path
from vinedresser.config import Task
from vinedresser.data.shards import prepare
from vinedresser.data.corpora import row
row.BLOCK_ROWS = 3
print("ready", flush=True)
prepare(Task.from_json(json.loads(sys.argv[1]), where="test"), Path(sys.argv[2]),
        executor="in_process")
"""


@pytest.mark.fault("S05")
@pytest.mark.slow
def test_s05_a_killed_driver(text_task, tmp_path):
    many = b"".join(b"line %d of some words\n" % i for i in range(3000))
    task = text_task(train_source=many, train_target=many)
    for patience in (0.05, 0.3, 0.8):
        out = tmp_path / str(patience)
        command = [sys.executable, "-c", DRIVER, json.dumps(task.to_json()), str(out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            driver.stdout.readline()
            time.sleep(patience)
            driver.send_signal(signal.SIGKILL)
        assert driver.returncode == -signal.SIGKILL
        assert [path for path in out.glob("*") if not path.name.startswith(".")] == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 1000)
            shards = prepare(task, out, executor="in_process")
        assert list(out.iterdir()) == [shards.folder]


@pytest.mark.fault("D25")
@pytest.mark.ray
@pytest.mark.slow
def test_d25_killed_workers_change_no_byte(text_task, tmp_path, monkeypatch, local_ray):
    import threading

    import psutil

    monkeypatch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 200)
    many = b"".join(b"line %d of some words %d\n" % (i, i * i) for i in range(3000))
    task = text_task(Tokenizer(kind="unigram", vocab_size=60), train_source=many, train_target=many)
    wanted = verify(prepare(task, tmp_path / "plain", executor="in_process").folder)
    killed, stop = [], threading.Event()

    def is_working(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):  # it may be gone by now
            return "ray::encode_block" in " ".join(process.cmdline())
        return False

    def hunt() -> None:
        while len(killed) < 5 and not stop.wait(0.05):
            for process in filter(is_working, psutil.Process().children(recursive=True)):
                process.kill()
                killed.append(process.pid)
                break

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        by_ray = prepare(task, tmp_path / "ray", executor="ray")
    finally:
        stop.set()
        hunter.join()
    assert len(killed) == 5
    assert verify(by_ray.folder).files == wanted.files
    assert list((tmp_path / "ray").iterdir()) == [by_ray.folder]


# Damage on disk.


@pytest.mark.fault("S08")
def test_s08_no_mutation_is_read_as_good_data(text_task, tmp_path):
    """1,000 flips, cuts and additions over all files of a set: none is opened."""
    shards = prepare(text_task(), tmp_path / "out")
    draw = random.Random(8)
    files = sorted(path for path in shards.folder.iterdir() if path.name != "manifest.json")
    for _ in range(1000):
        path = draw.choice(files)
        whole = path.read_bytes()
        kind, at = draw.choice(["flip", "cut", "more"]), draw.randrange(len(whole))
        path.write_bytes(
            whole[:at] if kind == "cut"
            else whole + draw.randbytes(3) if kind == "more"
            else whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
        )  # fmt: skip
        with pytest.raises(DamagedError, match=re.escape(path.name)):
            open_shards(shards.folder)
        path.write_bytes(whole)
    assert open_shards(shards.folder) == shards


@pytest.mark.parametrize("dedup", [False, True])
def test_s08_damaged_shards_alone_are_written_anew(text_task, tmp_path, monkeypatch, dedup, logged):
    monkeypatch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 9)
    lines = b"".join(b"line %d\n" % (i % 30) for i in range(40))
    task = text_task(train_source=lines, train_target=lines)
    task = task.model_copy(update={"cleaning": task.cleaning.override({"dedup": dedup})})
    shards = prepare(task, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in shards.folder.iterdir()}
    damaged = [shards.folder / name for name in ("train-00001.parquet", "dev-00000.parquet")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-3])
    assert prepare(task, tmp_path / "out") == shards
    assert "damaged dev-00000.parquet, train-00001.parquet written anew" in logged.text
    after = {path: path.stat().st_mtime_ns for path in shards.folder.iterdir()}
    assert {path for path in before if before[path] != after[path]} == set(damaged)
    assert list((tmp_path / "out").iterdir()) == [shards.folder]


@pytest.mark.fault("S09")
def test_s09_missing_extra_renamed_and_no_manifest(text_task, tmp_path, monkeypatch):
    monkeypatch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 10)
    shards = prepare(text_task(), tmp_path / "out")
    folder, path = shards.folder, shards.folder / "train-00002.parquet"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DamagedError, match=r"missing train-00002\.parquet"):
        open_shards(folder)
    (folder / "train-00009.parquet").write_bytes(whole)
    with pytest.raises(DamagedError, match=r"missing train-00002\.parquet"):
        open_shards(folder)
    path.write_bytes(whole)
    with pytest.raises(DamagedError, match=r"unknown train-00009\.parquet"):
        open_shards(folder)
    (folder / "train-00009.parquet").unlink()
    assert open_shards(folder) == shards
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"no manifest\.json; the folder is incomplete"):
        open_shards(folder)


def test_rows_of_shards_are_numbered_as_in_the_files(text_task, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 4)
    source = b"".join(b"\n" if i % 3 == 0 else b"s%d\n" % i for i in range(40))
    shards = prepare(text_task(train_source=source), tmp_path / "out")
    files = shards.meta["shards"]["train"]
    rows = np.concatenate([pq.read_table(shards.folder / name)["row"] for name in files])
    assert sorted(rows) == [i for i in range(40) if i % 3]
