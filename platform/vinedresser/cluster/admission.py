"""Admission: what would fail or corrupt later on a cluster is refused before anything is written."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vinedresser.errors import ConfigError, MachineError
from vinedresser.tracking.store import Store, sqlite_file

# Set to accept a cluster that lets everybody in its network run code on it.
ACCEPT = "VINEDRESSER_ACCEPT_UNAUTHENTICATED"
# Packages whose versions the nodes of a cluster must share.
SHARED = ("vinedresser", "torch", "ray", "mlflow", "optuna", "pyarrow")
# Set by Ray in the processes of a job, which run on the cluster already.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_PROBE = (
    "import sys; from ray._raylet import GcsClient; "
    "GcsClient(address=sys.argv[1]).check_alive([], timeout=10)"
)
# For a process that imports ray, and for one per node.
_SECONDS = 60


def refuse_client(address: str) -> None:
    """Refuse Ray Client for a search: Tune would work on copies of the searcher and callbacks.

    Raises:
        ConfigError: the address begins with `ray://`.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: a search needs a process on the cluster, not Ray Client; run "
            "the command on a node with RAY_ADDRESS=HOST:6379, or submit it as a job"
        )


def require_token(address: str) -> None:
    """Refuse a cluster that answers processes without a token, unless the user accepts it.

    Raises:
        MachineError: everybody who reaches it runs code on it.
    """
    if os.environ.get(ACCEPT) or _JOB in os.environ or address.startswith("ray://"):
        return
    anonymous = {key: value for key, value in os.environ.items() if "RAY_AUTH" not in key}
    command = [sys.executable, "-c", _PROBE, address]
    done = subprocess.run(  # noqa: S603 (fixed words and an address)
        command, env={**anonymous, "RAY_AUTH_MODE": "disabled"}, capture_output=True, check=False
    )
    if done.returncode == 0:
        raise MachineError(
            f"RAY_ADDRESS={address}: the cluster asks for no token, so that everybody who reaches "
            f"it runs code on it; start it with RAY_AUTH_MODE=token, or set {ACCEPT}=1"
        )


def nodes() -> list[dict[str, Any]]:
    """Return Ray's description of each node that is alive."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def hosts() -> set[str]:
    """Return the addresses of the nodes: several raylets of one machine are one host."""
    return {str(node["NodeManagerAddress"]) for node in nodes()}


def versions() -> dict[str, str]:
    """Return the versions that all nodes must share, in this process."""
    found = {"python": sys.version.split()[0]}
    for package in SHARED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def require_same_versions() -> None:
    """Refuse a cluster of several hosts whose nodes have other versions than this process.

    Raises:
        MachineError: names a node and what differs.
    """
    if len(hosts()) < 2:
        return
    here = versions()
    for address, there in on_each_node(versions).items():
        differing = [f"{k} {there[k]} (here {here[k]})" for k in here if there[k] != here[k]]
        if differing:
            raise MachineError(
                f"node {address}: {', '.join(differing)}; give all nodes the same environment"
            )


def on_each_node(call: Any) -> dict[str, Any]:
    """Return the result of a call for each node, by its address and the beginning of its id.

    Raises:
        MachineError: a node does not start a process within a minute.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task, asked = ray.remote(num_cpus=0, max_retries=0)(call), {}
    for node in nodes():
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[name] = task.options(scheduling_strategy=strategy).remote()
    done, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_SECONDS)
    if late:
        names = ", ".join(name for name, answer in asked.items() if answer not in done)
        raise MachineError(f"node {names}: starts no process within {_SECONDS} s; repair it")
    return {name: ray.get(answer) for name, answer in asked.items()}


def require_shared_store(store: Store) -> None:
    """Refuse an SQLite database for runs on several hosts, whose locks a network may not keep.

    Raises:
        ConfigError: names the database.
    """
    if "ray" not in sys.modules or sqlite_file(store) is None:
        return
    import ray

    if ray.is_initialized() and len(found := hosts()) > 1:
        raise ConfigError(
            f"tracking store {store.shown}: {len(found)} machines would write one SQLite file; "
            "start `mlflow server` and set MLFLOW_TRACKING_URI to its address"
        )
