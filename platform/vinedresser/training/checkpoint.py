"""Checkpoints: one atomic folder each, read back verified, the newest good one first.

No pickle: tensors are in safetensors, scalars in JSON. There is no random state in it because
there is none to keep: every step seeds its generator from (seed, step, rank).
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vinedresser.errors import DamagedError, MachineError
from vinedresser.workspace.commit import commit, is_committed, quarantine, verify

_log = logging.getLogger("vinedresser")


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on as if it had never stopped.

    Attributes:
        step: optimizer updates done.
        tensors: group -> name -> tensor, for example `model`, `average`, `best`, `optimizer`.
        scalars: plain JSON: best score, history, data position.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    scalars: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Commits `folder/step-00001234` and removes all but the newest `keep`, oldest first."""
    target = folder / f"step-{checkpoint.step:08d}"
    if is_committed(target):
        if _is_whole(target):
            return target
        quarantine(target)  # it was passed over at the start
    with commit(target) as staging:
        for group, tensors in checkpoint.tensors.items():
            # Tied weights share storage, which safetensors refuses; copies are small.
            plain = {name: t.detach().cpu().clone() for name, t in tensors.items()}
            save_file(plain, staging.path / f"{group}.safetensors")
        content = {"step": checkpoint.step, "scalars": dict(checkpoint.scalars)}
        (staging.path / "state.json").write_text(json.dumps(content))
    for old in sorted(folder.glob("step-????????"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(folder: Path, *, is_first: bool = True) -> Checkpoint | None:
    """The newest checkpoint that can be read and verifies; newer ones are passed over and told.

    Damaged ones are moved aside. One that the disk does not give may be whole, and stays.

    Args:
        folder: of the checkpoints.
        is_first: whether this is the rank that tidies up; the others only read.

    Raises:
        DamagedError: there are checkpoints, and none verifies; says why of each.
        MachineError: none verifies, and the disk is in the way of one at least.
    """
    passed: dict[Path, DamagedError | MachineError] = {}
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            found = _read(path)
        except (DamagedError, MachineError) as error:
            passed[path] = error
            continue
        for bad, why in passed.items() if is_first else ():
            earlier = _step(bad) - found.step
            _log.warning("%s; using step %d, %d updates earlier", why.args[0], found.step, earlier)
            if isinstance(why, DamagedError):
                quarantine(bad)
        return found
    reasons = "; ".join(why.args[0] for why in passed.values())
    if any(isinstance(why, MachineError) for why in passed.values()):
        raise MachineError(
            f"{folder}: no checkpoint can be read ({reasons}). Fix: mend the disk and run the "
            "same command again"
        )
    if passed:
        raise DamagedError(
            f"{folder}: no checkpoint is whole ({reasons}). Fix: bring one back, or train "
            "--from-scratch"
        )
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Checkpoint:
    """Raises DamagedError or MachineError, whatever the disk answers."""
    try:
        manifest = verify(path)
        state = json.loads((path / "state.json").read_text())
        groups = [name for name in manifest.files if name.endswith(".safetensors")]
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in groups}
    except OSError as error:  # a stale handle, or rank 0 has moved it aside meanwhile
        raise MachineError(f"{path}: {error.strerror or error}") from error
    return Checkpoint(state["step"], tensors, state["scalars"])


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except (DamagedError, MachineError, OSError):
        return False
    return True


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter index, flat; `restore_optimizer` puts it back."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took out."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state})
