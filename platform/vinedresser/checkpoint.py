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

from vinedresser.commit import commit, is_committed, quarantine, verify
from vinedresser.errors import DamagedError

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
        return target
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
    """The newest checkpoint that verifies; damaged newer ones are moved aside and told.

    Args:
        folder: of the checkpoints.
        is_first: whether this is the rank that tidies up; the others only read.

    Raises:
        DamagedError: there are checkpoints, and none verifies; says why of each.
    """
    damaged: dict[Path, str] = {}
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            found = _read(path)
        except DamagedError as error:
            damaged[path] = error.args[0]
            continue
        for bad, reason in damaged.items() if is_first else ():
            _log.warning(
                "%s; using step %d, %d updates earlier", reason, found.step, _step(bad) - found.step
            )
            quarantine(bad)
        return found
    if damaged:
        raise DamagedError(
            f"{folder}: no checkpoint is whole ({'; '.join(damaged.values())}). Fix: bring one "
            "back, or train --from-scratch"
        )
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Checkpoint:
    manifest = verify(path)
    state = json.loads((path / "state.json").read_text())
    groups = [name for name in manifest.files if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in groups}
    return Checkpoint(state["step"], tensors, state["scalars"])


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
