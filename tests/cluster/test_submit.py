"""Jobs on a real head node with a dashboard and a token: exit codes, attaching, stop, secrets."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vinedresser.cluster.jobs import Job, Jobs, job_environment
from vinedresser.errors import ConfigError, MachineError

MAIN = [sys.executable, "-c", "import sys; from vinedresser.cli import main; sys.exit(main())"]
CANARY = "canary-5ecret-value"
# Ports of its own: those that Ray takes by default may belong to another cluster.
HEAD = """
import pathlib, socket, sys
from ray.cluster_utils import Cluster
for number in (1, 2, 3):  # Ray gives up after 30 s, which a busy machine can miss
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ports = {"dashboard_port": probe.getsockname()[1], "dashboard_agent_listen_port": 0}
    try:
        cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": True,
            "temp_dir": f"{sys.argv[1]}/{number}", **ports})
        break
    except Exception:
        if number == 3:
            raise
# As `ray start` does: without it Ray gives a job the address of any cluster on this machine.
pathlib.Path(sys.argv[1], str(number), "ray_current_cluster").write_text(cluster.address)
print(ports["dashboard_port"], flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Head:
    """A head node: its dashboard, its token and the folder with all that it writes."""

    url: str
    token: str
    folder: Path
    project: Path
    workspace: Path

    def start(self, *words: object, **env: str) -> "subprocess.Popen[str]":
        """Start one command in the user's project."""
        variables = {**client_environment(self.token), **env}
        return subprocess.Popen(
            [*MAIN, *map(str, words)], cwd=self.project, env=variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *words: object, **env: str) -> tuple[int, str, str]:
        """Return exit code, output and messages of one command."""
        process = self.start(*words, **env)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    def submit(self, *words: object, options: tuple[object, ...] = ()) -> tuple[int, str, str]:
        """Submit a verb with this workspace."""
        return self.run(
            "submit", "--address", self.url, *options, "--", *words, "-w", self.workspace,
            VINEDRESSER_PACKAGES="my_zoo", AWS_SECRET_ACCESS_KEY=CANARY,
            MLFLOW_TRACKING_PASSWORD=CANARY,
        )  # fmt: skip

    def log(self, job_id: str) -> str:
        """Return what a job has printed, from the file of the head node."""
        files = self.folder.glob(f"*/session_latest/logs/job-driver-{job_id}.log")
        return "".join(file.read_text() for file in files)


def client_environment(token: str) -> dict[str, str]:
    """A login shell of a user of the cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VINEDRESSER_"))}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, reversal: Any) -> Iterator[Head]:
    """One node with a dashboard, and a project with an experiment and a package of its own."""
    project = tmp_path_factory.mktemp("project")
    (project / "my_zoo").mkdir()
    (project / "my_zoo/__init__.py").touch()
    (project / "my_zoo/mine.py").write_text(
        "from trainables.transformer import TransformerConfig\n\n\n"
        "class Mine(TransformerConfig):\n    pass\n"
    )
    model = {"kind": "my_zoo.mine", "d_model": 16, "d_ff": 32, "num_heads": 2,
             "encoder_layers": 1, "decoder_layers": 1}  # fmt: skip
    experiment = {
        "name": "tiny", "task": reversal.task.to_json(), "model": model, "steps": 100_000,
        "optim": {"lr": 5e-3, "warmup_steps": 5}, "batch": {"max_padded_tokens": 160},
        "evaluation": {"num_evaluations": 2000, "sentences": 4, "attention_every": 0},
        "compute": {"device": "cpu", "precision": "fp32"}, "checkpoint_every": 50_000,
    }  # fmt: skip
    (project / "experiment.json").write_text(json.dumps(experiment))
    (project / "task.json").write_text(json.dumps(experiment["task"]))
    with tempfile.TemporaryDirectory(prefix="vd-test-", dir="/tmp") as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD, folder], text=True,
            env=client_environment(token := "ab" * 16), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            assert port.isdecimal()
            workspace = tmp_path_factory.mktemp("space")
            yield Head(f"http://127.0.0.1:{port}", token, Path(folder), project, workspace)
        finally:
            process.stdin.close()
            process.wait(60)


def wait_for(condition: Callable[[], object], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.ray
def test_success_and_no_secret_anywhere(head: Head) -> None:
    code, out, err = head.submit("prepare", "task.json")
    assert code == 0, out + err
    assert "reversal" in out
    request = urllib.request.Request(f"{head.url}/api/jobs/")
    request.add_header("Authorization", f"Bearer {head.token}")
    with urllib.request.urlopen(request) as answer:
        jobs = answer.read().decode()
    # What travels is there; nothing else of the environment is.
    assert '"VINEDRESSER_PACKAGES": "my_zoo"' in jobs
    texts = {"answer": jobs, "out": out, "err": err}
    texts["rows"] = head.run("jobs", "ls", "--address", head.url, "--json")[1]
    files = [file for file in head.folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.name.startswith("job-driver-") for file in files)
    texts.update({str(file): file.read_bytes().decode(errors="replace") for file in files})
    assert [name for name, text in texts.items() if CANARY in text or head.token in text] == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("changes", "expected", "message"),
    [
        (["optim.lrr=1"], 2, "E-CONFIG"),
        (["optim.lr=1e30", "steps=40", "evaluation.num_evaluations=1"], 4, "E-TRAIN"),
    ],
)
def test_the_exit_code_of_the_command_comes_back(
    head: Head, changes: list[str], expected: int, message: str
) -> None:
    code, out, err = head.submit("train", "experiment.json", *changes)
    assert code == expected, out + err
    assert message in out


@pytest.mark.slow
@pytest.mark.ray
def test_one_job_for_two_submissions_and_a_stop_with_a_checkpoint(head: Head) -> None:
    train = ("train", "experiment.json", "name=stopped")
    address = ("--address", head.url)
    code, job_id, err = head.submit(*train, options=("--no-wait",))
    job_id = job_id.strip()
    assert code == 0, err
    # The same command attaches; a detached client leaves the job running.
    follower = head.start(
        "submit", *address, "--", *train, "-w", head.workspace, VINEDRESSER_PACKAGES="my_zoo"
    )
    wait_for(lambda: re.search(r"step \d+/100000", head.log(job_id)))
    # Another slot of the same command is another job, and the run is leased.
    code, out, err = head.submit(*train, options=("--slot", "2026-01-01T03:00Z"))
    assert code == 75, out + err
    assert "E-BUSY" in out
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=200)
    assert follower.returncode == 130
    assert f"attached to {job_id}" in err
    assert f"vinedresser jobs stop {job_id} --address {head.url}" in err
    # Stopped: it was still running.
    code, out, err = head.run("jobs", "stop", job_id, *address)
    assert (code, out) == (0, f"{job_id}: stopped, exit code 75\n"), err
    assert "E-STOPPED" in head.log(job_id)
    # None was due before step 50,000.
    assert list(head.workspace.glob("runs/stopped-*/checkpoints/*/manifest.json"))
    code, out, _ = head.run("jobs", "logs", "--follow", job_id, *address)
    assert code == 75
    assert "E-STOPPED" in out
    # Ended: the same command is a new job. SIGTERM to its client stops it.
    again = head.start(
        "submit", *address, "--", *train, "-w", head.workspace, VINEDRESSER_PACKAGES="my_zoo"
    )
    new_id = f"{job_id.rpartition('-')[0]}-2"
    wait_for(lambda: "unchanged" in head.log(new_id))
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 75
    assert f"{new_id} is requested to stop" in err
    wait_for(lambda: "E-STOPPED" in head.log(new_id))


def test_a_cluster_that_does_not_answer_is_refused_in_one_line() -> None:
    with pytest.raises(MachineError, match=r"--address=http://127\.0\.0\.1:1: connection refused"):
        Jobs("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "environment",
    [{"MLFLOW_TRACKING_URI": "http://me:pw@host"}, {"VINEDRESSER_WORKSPACE": "s3://a:b@c/d"}],
)
def test_a_password_in_what_travels_is_refused(environment: Mapping[str, str]) -> None:
    with pytest.raises(ConfigError, match="password"):
        job_environment(environment)


def test_only_listed_variables_travel() -> None:
    given = {"VINEDRESSER_PACKAGES": "my_zoo", "AWS_SECRET_ACCESS_KEY": CANARY, "PATH": "/bin"}
    assert job_environment(given) == {
        "VINEDRESSER_PACKAGES": "my_zoo", "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip
    assert job_environment({"RAY_JOB_STOP_WAIT_TIME_S": "9"}) == {"RAY_JOB_STOP_WAIT_TIME_S": "9"}


@pytest.fixture
def refused(capfd: Any, tmp_path: Path, monkeypatch: Any) -> Iterator[Callable[..., str]]:
    """Run a command that is refused with exit code 2; return its message."""
    from vinedresser.cli import main

    monkeypatch.chdir(tmp_path)
    for key in ("VINEDRESSER_WORKSPACE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(key, raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> str:
        assert main(words) == 2
        return str(capfd.readouterr().err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "x"), r"--workspace workspace: inside the job's unpacked code"),
        (("train", "x", "-w", "space"), r"--workspace space: inside"),
        (("trian", "x", "-w", "/space"), "trian: no verb"),
        (("ui", "-w", "/space"), "ui: no verb"),
        (("train", "x", "-w", "/space", "--stps=3"), "No such option: --stps"),
    ],
)
def test_a_command_that_cannot_work_is_not_submitted(
    refused: Callable[..., str], words: tuple[str, ...], message: str
) -> None:
    assert re.search(message, refused("submit", "--address", "http://127.0.0.1:1", "--", *words))


def test_no_cluster_named(refused: Callable[..., str]) -> None:
    assert "--address" in refused("submit", "--", "train", "x", "-w", "/space")
    assert "--address" in refused("jobs", "ls")


def test_a_workspace_inside_the_code_of_a_job_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: Any
) -> None:
    """As under `ray job submit`, where the current folder is Ray's to delete (A-8)."""
    unpacked = tmp_path / "session/runtime_resources/working_dir_files/_ray_pkg_0"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    assert "which Ray deletes" in refused("train", "experiment.json")
    assert list(unpacked.iterdir()) == []


def test_a_password_in_the_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.corpus: the URL holds a password"):
        Job(["train", "task.corpus=s3://key:secret@bucket/x"], tmp_path, {})
