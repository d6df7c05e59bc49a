"""Clusters that would fail or corrupt later are refused in one line, and nothing is written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# Two raylets as two hosts would be, without a token; the second one has another vinedresser.
CLUSTER = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
small = {"num_cpus": 1, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
odd = {"PYTHONPATH": sys.argv[1]}
cluster.add_node(**small, num_gpus=2, node_ip_address="127.0.0.2", env_vars=odd)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    metadata = tmp_path_factory.mktemp("odd") / "vinedresser-99.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vinedresser\nVersion: 99\n")
    words = [sys.executable, "-c", CLUSTER, str(metadata.parents[1])]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A busy machine needs longer than Ray's 30 s to start a raylet.
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        yield address
        process.stdin.close()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    code = "import sys; from vinedresser.cli import main; sys.exit(main())"

    def run(*words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
        drop = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "VINEDRESSER_WORKSPACE")
        environment = {key: value for key, value in os.environ.items() if key not in drop}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            capture_output=True, text=True, cwd=tmp_path, timeout=500, check=False,
            env={**environment, **variables, "COLUMNS": "300"},
        )  # fmt: skip

    return run


@pytest.fixture
def study(tmp_path: Path, tiny_study: dict[str, Any]) -> Path:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(tiny_study))
    return file


def require_refused(done: Any, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error[E-")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_a_workspace_in_an_object_store_is_refused(cli: Cli, study: Path, tmp_path: Path) -> None:
    require_refused(cli("sweep", study, "-w", "s3://bucket/x"), 2, "object storage")
    require_refused(cli("sweep", study, VINEDRESSER_WORKSPACE="gs://bucket/x"), 2, "gs:")
    assert list(tmp_path.iterdir()) == [study]


def test_a_workspace_that_ray_deletes_is_refused(cli: Cli, study: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    require_refused(cli("sweep", study, "-w", unpacked), 2, "Ray deletes")
    assert list(tmp_path.iterdir()) == [study]


def test_a_search_through_ray_client_is_refused(cli: Cli, study: Path, tmp_path: Path) -> None:
    done = cli("sweep", study, RAY_ADDRESS="ray://127.0.0.1:10001")
    require_refused(done, 2, "not Ray Client")
    assert list(tmp_path.iterdir()) == [study]


@pytest.mark.slow
@pytest.mark.ray
def test_an_open_cluster_and_a_mixed_one_and_sqlite_are_refused(
    cluster: str, cli: Cli, study: Path, tmp_path: Path
) -> None:
    done = cli("sweep", study, RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled")
    require_refused(done, 3, "no token", "VINEDRESSER_ACCEPT_UNAUTHENTICATED=1")
    accepted = {
        "RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled",
        "VINEDRESSER_ACCEPT_UNAUTHENTICATED": "1",
    }  # fmt: skip
    done = cli("sweep", study, **accepted)
    require_refused(done, 3, "node 127.0.0.2", "vinedresser 99 (here")
    code = (
        "import ray; from pathlib import Path; from vinedresser.tracking import store_for;"
        "from vinedresser.cluster.admission import require_shared_store;"
        "ray.init(log_to_driver=False); require_shared_store(store_for(Path('.'), 'e'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **accepted}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ConfigError" in done.stderr
    assert "2 machines would write one SQLite file" in done.stderr
    assert list(tmp_path.iterdir()) == [study]


@pytest.mark.slow
@pytest.mark.ray
def test_doctor_examines_each_node_and_names_the_odd_one(
    cluster: str, cli: Cli, tmp_path: Path
) -> None:
    done = cli("doctor", "--cluster", "--json", RAY_ADDRESS=cluster, RAY_AUTH_MODE="disabled")
    assert done.returncode == 3, done.stderr
    fine, odd = sorted(json.loads(done.stdout), key=lambda report: report["gpus"])
    assert (fine["versions"], odd["versions"]) == ({}, {"vinedresser": "99"})
    assert odd["node"].startswith("127.0.0.2")
    assert (fine["gpus"], odd["gpus"]) == (0, 2)
    for report in (fine, odd):
        assert (report["workspace"], report["lock"], report["mlflow"]) == ("seen", "kept", "SQLite")
        assert report["delay"] < 5
        assert any("no token" in problem for problem in report["problems"])
    assert any("vinedresser is 99" in problem for problem in odd["problems"])
    assert not any("is 99" in problem for problem in fine["problems"])
    assert not list(tmp_path.iterdir())
