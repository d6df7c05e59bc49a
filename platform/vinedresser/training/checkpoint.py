"""Checkpoints: the states of a run's parts in one atomic folder; read back verified.

A part is anything with `state_dict` and `load_state_dict`. Its tensors are stored as safetensors,
everything else as JSON; nothing is pickled. No random state is stored because there is none: every
step seeds its generator from (seed, step, number of the batch in the update).
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from vinedresser.errors import DamagedError, MachineError
from vinedresser.workspace.commit import commit, is_committed, quarantine, verify
from vinedresser.workspace.layout import RunFolder, checkpoint_step

_log = logging.getLogger(__name__)

# In the stored JSON, a mapping with one of these keys represents a tensor, or for a mapping whose
# keys are no strings, as the state of an optimizer.
_TENSOR, _ITEMS = "$tensor", "$items"


class Stateful(Protocol):
    """A part of a run that a checkpoint stores."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return nested mappings and lists of tensors and plain JSON values."""

    def load_state_dict(self, state: Any) -> object:
        """Restore what `state_dict` returned; tensors are on the CPU."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified.

    Attributes:
        step: optimizer updates done.
        states: part -> its state.
    """

    step: int
    states: Mapping[str, Any]


def save_checkpoint(
    run: RunFolder, step: int, parts: Mapping[str, Stateful], *, keep: int = 2
) -> Path:
    """Commit the checkpoint of a step and remove all but the newest `keep`, oldest first.

    Raises:
        MachineError: the disk is full or refuses.
    """
    target = run.checkpoint(step)
    if is_committed(target):
        try:
            verify(target)
        except (DamagedError, MachineError, OSError):
            quarantine(target)  # `newest_checkpoint` skipped it
        else:
            return target
    with commit(target) as staging:
        states = {}
        for name, part in parts.items():
            tensors: dict[str, Tensor] = {}
            states[name] = _without_tensors(part.state_dict(), tensors, name)
            if tensors:
                save_file(tensors, staging.path / f"{name}.safetensors")
        content = {"step": step, "states": states}
        (staging.path / "state.json").write_text(json.dumps(content))
    for old in sorted(run.checkpoints.glob("step-????????"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_parts(parts: Mapping[str, Stateful], checkpoint: Checkpoint) -> None:
    """Restore every part that the checkpoint holds a state of."""
    for name, part in parts.items():
        if name in checkpoint.states:
            part.load_state_dict(checkpoint.states[name])


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return plain JSON with the tensors of a state moved into `tensors`, by path."""
    if isinstance(value, Tensor):
        # Tied weights share storage, which safetensors refuses; copies are small.
        tensors[path] = value.detach().cpu().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        items = [(k, _without_tensors(v, tensors, f"{path}/{k}")) for k, v in value.items()]
        return dict(items) if all(isinstance(k, str) for k, _ in items) else {_ITEMS: items}
    if isinstance(value, list | tuple):
        return [_without_tensors(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    items = value[_ITEMS] if value.keys() == {_ITEMS} else value.items()
    return {key: _with_tensors(item, tensors) for key, item in items}


def newest_checkpoint(run: RunFolder, *, is_first: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint that can be read and verifies; None if there is none.

    Damaged ones are moved aside. One that the disk fails to read may be intact, and stays.
    `is_first` is true on the rank that moves damaged ones aside; the others only read.

    Raises:
        DamagedError: there are checkpoints, and none verifies; with the reason of each.
        MachineError: none verifies, and at least one cannot be read from the disk.
    """
    folder = run.checkpoints
    passed: dict[Path, DamagedError | MachineError] = {}
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            found = _read(path)
        except (DamagedError, MachineError) as error:
            passed[path] = error
            continue
        for bad, why in passed.items() if is_first else ():
            earlier = checkpoint_step(bad) - found.step
            _log.warning("%s; using step %d, %d updates earlier", why.args[0], found.step, earlier)
            if isinstance(why, DamagedError):
                quarantine(bad)
        return found
    reasons = "; ".join(why.args[0] for why in passed.values())
    if any(isinstance(why, MachineError) for why in passed.values()):
        raise MachineError(
            f"{folder}: no checkpoint can be read ({reasons}). Fix: repair the disk and run the "
            "same command again"
        )
    if passed:
        raise DamagedError(
            f"{folder}: no checkpoint is intact ({reasons}). Fix: restore one from a copy, or "
            "train --from-scratch"
        )
    return None


def _read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        DamagedError: it fails its manifest.
        MachineError: the disk does not read it: a stale handle, or rank 0 has moved it aside.
    """
    try:
        manifest = verify(path)
        state = json.loads((path / "state.json").read_text())
        tensors: dict[str, Tensor] = {}
        for name in manifest.files:
            if name.endswith(".safetensors"):
                tensors |= load_file(path / name)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from error
    if "states" not in state:
        raise DamagedError(f"{path}: written by another version of vinedresser")
    return Checkpoint(state["step"], _with_tensors(state["states"], tensors))
