"""Admission: refusal, before anything is written, of clusters that would fail or corrupt later."""

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
    if not os.environ.get(ACCEPT) and _JOB not in os.environ and (problem := token_problem()):
        raise MachineError(
            f"RAY_ADDRESS={address}: {problem}; start it with RAY_AUTH_MODE=token, or set "
            f"{ACCEPT}=1"
        )


def token_problem() -> str:
    """Return what is wrong with the protection of the cluster in RAY_ADDRESS; "" for nothing.

    A private Ray has a token; Ray Client has an address of another kind and is not tried.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local" or address.startswith("ray://"):
        return ""
    anonymous = {key: value for key, value in os.environ.items() if "RAY_AUTH" not in key}
    command = [sys.executable, "-c", _PROBE, address]
    done = subprocess.run(  # noqa: S603 (fixed words and an address)
        command, env={**anonymous, "RAY_AUTH_MODE": "disabled"}, capture_output=True, check=False
    )
    if done.returncode:
        return ""
    return "the cluster has no token: everybody who reaches it can run code on it"


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of each node that is alive."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in found if node["Alive"]]


def hosts() -> set[str]:
    """Return the addresses of the nodes: several raylets of one machine are one host."""
    return {str(node["NodeManagerAddress"]) for node in alive_nodes()}


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
        if isinstance(there, Exception):
            raise MachineError(f"node {address}: {' '.join(str(there).split())[-300:]}")
        differing = [f"{k} {there[k]} (here {here[k]})" for k in here if there[k] != here[k]]
        if differing:
            raise MachineError(
                f"node {address}: {', '.join(differing)}; give all nodes the same environment"
            )


def on_each_node(call: Any, *words: str) -> dict[str, Any]:
    """Return the result of a call for each node, by its address and the beginning of its id.

    The result of a call that raises, or that a node does not begin within a minute, is the error.

    Args:
        call: its module and this one are sent along, because a node may have others.
        words: arguments of the call.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    modules, asked = {sys.modules[call.__module__], sys.modules[__name__]}, {}
    for module in modules:
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    task = ray.remote(num_cpus=0, max_retries=0)(call)
    for node in alive_nodes():
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[name] = task.options(scheduling_strategy=strategy).remote(*words)
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_SECONDS)
    found: dict[str, Any] = {}
    for name, answer in asked.items():
        try:
            found[name] = ray.get(answer, timeout=1)
        except Exception as error:  # noqa: BLE001 (of the node, or of what it runs)
            found[name] = error
    return found


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
