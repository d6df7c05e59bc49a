"""Examination of a cluster: facts about each node, gathered by tasks on it.

This module is sent to the nodes, which may hold another version of the package or none.
"""

import contextlib
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vinedresser.cluster.admission import alive_nodes, hosts, on_each_node, token_problem, versions
from vinedresser.tracking.store import Store, sqlite_file

# NFS may hide a new file for up to 60 s; longer than this is too long in any case.
_SECONDS = 5.0


@dataclass(frozen=True)
class NodeReport:
    """Findings of one node.

    Attributes:
        node: address and the beginning of Ray's id.
        versions: package -> version; differing ones only.
        workspace: "seen", or what is wrong with it.
        lock: "kept", or "not kept": two nodes would hold one lease.
        delay: seconds until a new file is seen; None where it never was.
        gpus: number of GPUs that Ray gives out there.
        bf16: "native" or "none".
        mlflow: "answers", or what is wrong with it.
        problems: what has to be repaired.
    """

    node: str
    versions: dict[str, str]
    workspace: str
    lock: str
    delay: float | None
    gpus: float
    bf16: str
    mlflow: str
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        return asdict(self)


def examine(workspace: Path, store: Store) -> list[NodeReport]:
    """Examine each node of the connected cluster; nothing stays behind in the workspace.

    Args:
        workspace: need not exist; then the folder that it would be made in is tried.
        store: tracking store.
    """
    gpus = {node["NodeID"][:6]: node["Resources"].get("GPU", 0.0) for node in alive_nodes()}
    here, reports = versions(), list[NodeReport]()
    uri = store.uri if store.is_server else ""
    with _probes(workspace) as (nonce, held, late):
        found = on_each_node(facts, str(nonce), str(held), str(late), uri)
        late.touch()
        delays = on_each_node(seconds_until, str(late))
    many_write = sqlite_file(store) is not None and len(hosts()) > 1
    shared = token_problem()
    for node, fact in found.items():
        problems = [shared] if shared else []
        if isinstance(fact, Exception):
            reason = " ".join(str(fact).split())[-200:]
            reports.append(NodeReport(node, {}, "", "", None, 0.0, "", "", [*problems, reason]))
            continue
        odd = {key: fact["versions"][key] for key in here if fact["versions"][key] != here[key]}
        problems += [f"{key} is {value}, here {here[key]}" for key, value in odd.items()]
        if fact["workspace"] != "seen":
            problems.append(f"workspace {fact['workspace']}")
        elif fact["lock"] != "kept":
            problems.append("lock not kept: mount the workspace with locks across hosts")
        delay = None if isinstance(delays[node], Exception) else delays[node]
        if delay is None and fact["workspace"] == "seen":
            problems.append(f"new files unseen for {_SECONDS:.0f} s: mount with actimeo=3 or less")
        mlflow = "SQLite" if not uri else fact["mlflow"]
        if many_write:
            problems.append("SQLite on several hosts: start `mlflow server`")
        elif mlflow not in ("SQLite", "answers"):
            problems.append(f"mlflow {mlflow}")
        count = float(gpus[node.rpartition("(")[2].rstrip(")")])
        reports.append(
            NodeReport(
                node, odd, fact["workspace"], fact["lock"], delay, count, fact["bf16"], mlflow,
                problems,
            )
        )  # fmt: skip
    return reports


@contextlib.contextmanager
def _probes(workspace: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Write a nonce, hold a lock, and name a file that is absent yet; remove all at the end."""
    from filelock import FileLock

    folder = workspace.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    name = f".doctor-{uuid.uuid4().hex}"
    nonce, held, late = (existing / f"{name}.{kind}" for kind in ("nonce", "lock", "late"))
    try:
        nonce.write_text(name)
        with FileLock(held):
            yield nonce, held, late
    finally:
        for path in (nonce, held, late):
            path.unlink(missing_ok=True)


def facts(nonce: str, held: str, late: str, uri: str) -> dict[str, Any]:
    """Return what a node is like; runs on the node."""
    from filelock import FileLock, Timeout

    found: dict[str, Any] = {"versions": versions(), "workspace": "seen", "lock": "kept"}
    path = Path(nonce)
    if not path.is_file() or path.read_text() != path.stem:
        found["workspace"] = f"not seen at {path.parent}"
    else:
        with contextlib.suppress(Timeout), FileLock(held, timeout=0):
            found["lock"] = "not kept"
    Path(late).exists()  # so that a cache may hold its absence
    found["mlflow"] = "answers"
    if uri:
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()  # noqa: S310
        except (OSError, ValueError) as error:
            found["mlflow"] = f"does not answer ({error})"
    flags = ""
    with contextlib.suppress(OSError):  # another system than Linux
        flags = Path("/proc/cpuinfo").read_text()
    is_native = "avx512_bf16" in flags or "amx_bf16" in flags
    if Path("/dev/nvidia0").exists():
        import torch

        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    return {**found, "bf16": "native" if is_native else "none"}


def seconds_until(path: str) -> float | None:
    """Return after how long a node sees a file that exists; None for not at all."""
    start = time.monotonic()
    while not Path(path).exists():
        if time.monotonic() - start > _SECONDS:
            return None
        time.sleep(0.05)
    return round(time.monotonic() - start, 1)
