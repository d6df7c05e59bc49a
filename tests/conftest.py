"""Fixtures of all rooms, and how tests are shared out among the workers of pytest-xdist."""

import ast
import contextlib
import functools
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.processes import MAIN, Forked

if TYPE_CHECKING:
    from vinedresser.data.shards import ShardSet

ROOT = Path(__file__).parents[1]
RAY = "ray"

# One thread per process, also in processes that tests start: matrices here are tiny, and another
# worker uses the other core. Set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray gives its workers the lowest priority but four: they would wait for the other worker's tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# The same examples in every run and on every worker; Hypothesis' own limit of 200 ms per example
# would fail tests on a busy machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record-golden`: write the data in tests/golden instead of comparing with it."""
    parser.addoption(
        "--record-golden", action="store_true", help="write tests/golden anew, compare nothing"
    )


@functools.cache
def marked(file: str, mark: str) -> frozenset[str]:
    """Return the names of a file's tests that have a mark, by themselves or all of them."""
    tree = ast.parse((ROOT / file).read_text())
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    of_file = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    if any(line.startswith("pytestmark") and f"mark.{mark}" in line for line in of_file):
        return frozenset(test.name for test in tests)
    wanted = f"pytest.mark.{mark}"
    return frozenset(t.name for t in tests if wanted in map(ast.unparse, t.decorator_list))


def has_mark(nodeid: str, mark: str) -> bool:
    """Return True if the test of a node has a mark."""
    file, *_, test = nodeid.partition("[")[0].split("::")
    return test in marked(file, mark)


class FileScheduling(LoadScopeScheduling):
    """A file is one piece of work, and all tests that use Ray are one together.

    One worker then starts the one local Ray, and fixtures of a module are made once. The groups of
    `--dist loadgroup` do not do it: xdist 3.8 writes them where pytest 9.2 no longer reads them.
    What takes long comes first, so that all workers end together.
    """

    def _split_scope(self, nodeid: str) -> str:
        return RAY if has_mark(nodeid, RAY) else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = max(self.workqueue, key=self._length)
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _length(self, scope: str) -> float:
        if scope == RAY:
            return math.inf
        return sum(60 if has_mark(test, "slow") else 1 for test in self.workqueue[scope])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileScheduling:
    """Share out files among the workers of `-n`."""
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that starts Ray without the mark by which it is shared out."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()) and not item.get_closest_marker(RAY):
            raise pytest.UsageError(f"{item.nodeid}: uses local_ray; mark it with pytest.mark.ray")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fill a folder once per session: the first worker does it, the others wait for it."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def is_recording(pytestconfig: pytest.Config) -> bool:
    """True where the stored results are to be written anew."""
    return bool(pytestconfig.getoption("--record-golden"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public data sets beside the repository; tests that need them skip where they are not."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Tiny matrices are slower on two threads, and other tests want the other core."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reversal(made_once: Callable[..., Path]) -> "ShardSet":
    """Shards of a corpus anybody can solve: `a b c` becomes `c b a`; 400 train, 40 dev rows."""
    from vinedresser.config import Task, Tokenizer
    from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
    from vinedresser.data.shards import open_shards, prepare

    def fill(folder: Path) -> None:
        draw, pairs = random.Random(0), {}
        for split, count in (("train", 400), ("dev", 40)):
            rows = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(count)]
            for side, step in (("source", 1), ("target", -1)):
                lines = (" ".join(row[::step]) + "\n" for row in rows)
                (folder / f"{split}.{side}").write_text("".join(lines))
            source, target = (str(folder / f"{split}.{side}") for side in ("source", "target"))
            pairs[split] = Pair(source=source, target=target)
        task = Task(
            name="reversal",
            corpus=TextCorpus(**pairs),
            tokenizer=Tokenizer(kind="symbols"),
            metric="per",
            max_source_length=20,
            max_target_length=20,
        )
        prepare(task, folder / "shards", executor="in_process")

    (shards,) = (made_once("reversal", fill) / "shards").glob("reversal-*")
    return open_shards(shards)


@pytest.fixture(scope="session")
def with_database(made_once: Callable[..., Path]) -> Callable[[Path], Path]:
    """Put an empty tracking database into a new workspace: MLflow needs 3 s to make one."""

    def fill(folder: Path) -> None:
        from vinedresser.tracking import Store
        from vinedresser.tracking.store import open_client

        uri = f"sqlite:///{folder / 'mlflow.db'}"
        open_client(Store(uri, "none", None, folder)).search_experiments(max_results=1)

    def copy(workspace: Path) -> Path:
        workspace.mkdir(parents=True, exist_ok=True)
        shutil.copy(made_once("database", fill) / "mlflow.db", workspace / "mlflow.db")
        return workspace

    return copy


@pytest.fixture(scope="session")
def mlflow_server(
    tmp_path_factory: pytest.TempPathFactory, with_database: Callable[[Path], Path]
) -> Iterator[str]:
    """The address of an MLflow server on loopback, one for the whole session."""
    from vinedresser.tracking.store import DEFAULTS

    folder = with_database(tmp_path_factory.mktemp("server"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    environment = {**os.environ, **DEFAULTS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=log, stderr=log
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for the whole session, never the user's cluster; for tests marked `ray`."""
    from vinedresser.cluster.connect import connect

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        with connect(cpus=2):
            yield


@pytest.fixture
def forked(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> Iterator[Callable[..., Forked]]:
    """Start a process that costs no import: of code, or without code of the command line."""
    started: list[Forked] = []

    def start(*words: object, code: str = MAIN, **more: Any) -> Forked:
        settings = {"cwd": tmp_path, "env": os.environ, **more}
        started.append(Forked(tmp_path_factory.mktemp("forked"), code, words, **settings))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def hashed_files(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often this process hashes each file, counted from the start of the test on."""
    from vinedresser.workspace import commit

    counts, file_digest = Counter[Path](), commit.file_digest

    def counted(path: Path) -> str:
        counts[Path(path).resolve()] += 1
        return file_digest(path)

    for name, module in list(sys.modules.items()):
        if name.startswith("vinedresser") and getattr(module, "file_digest", None) is file_digest:
            monkeypatch.setattr(module, "file_digest", counted)
    return counts


@pytest.fixture
def tiny_study(reversal: "ShardSet") -> dict[str, Any]:
    """A study of that corpus as plain JSON, as a file holds it; a trial trains for a second."""
    model = {
        "kind": "transformer", "d_model": 32, "d_ff": 64, "num_heads": 4, "encoder_layers": 1,
        "decoder_layers": 1, "dropout": 0, "attention_dropout": 0,
    }  # fmt: skip
    base = {
        "name": "tiny", "task": reversal.task.to_json(), "model": model,
        "optim": {"lr": 5e-3, "warmup_steps": 10}, "batch": {"max_padded_tokens": 256},
        "evaluation": {"num_evaluations": 3}, "compute": {"device": "cpu", "precision": "fp32"},
        "steps": 60, "checkpoint_every": 20,
    }  # fmt: skip
    space = {"optim.lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}}
    return {"name": "tiny-lr", "base": base, "space": space, "num_trials": 4}
