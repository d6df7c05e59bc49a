"""The optimizer from its configuration; the learning rate as a pure function of the step."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from vinedresser.config import Optim
from vinedresser.config.section import did_you_mean
from vinedresser.errors import ConfigError
from vinedresser.objective import Objective


def learning_rate(config: Optim, *, step: int, steps: int, d_model: int | None = None) -> float:
    """Return the learning rate of a 1-based step of a run of `steps` updates.

    Linear warm-up to `lr` over `warmup_steps`, then constant or lr * sqrt(warmup / step); or
    noam, lr * d_model^-.5 * min(step^-.5, step * warmup^-1.5) (methods.md 73). Over the last
    `anneal` share of the run a linear fall that would reach 0 one step after the last.
    """
    warm = max(config.warmup_steps, 1)
    rate = config.lr * min(1.0, step / warm)
    if config.decay == "noam":
        assert d_model is not None
        rate = config.lr * float(d_model**-0.5 * min(step**-0.5, step * warm**-1.5))
    elif config.decay == "inverse_sqrt" and step > warm:
        rate = config.lr * float((warm / step) ** 0.5)
    first_fall = steps - int(config.anneal * steps)
    if step > first_fall:
        rate *= (steps + 1 - step) / (steps + 1 - first_fall)
    return rate


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Take parameters out of training by patterns over their names (methods.md 77).

    A tensor that parts of the model share is frozen for all of them by any of its names.

    Returns:
        One entry per frozen tensor: its name, or all of them joined by ` = `; shared ones first.

    Raises:
        ConfigError: a pattern that names no parameter, or nothing is left to train.
    """
    shared: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(parameter, []).append(name)
    names = [name for of_one in shared.values() for name in of_one]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"optim.freeze: no parameter is named {pattern}{did_you_mean(pattern, names)}; "
                f"names look like {names[0]} and {names[-1]}"
            )
    frozen = [
        parameter
        for parameter, of_one in shared.items()
        if any(fnmatchcase(name, pattern) for name in of_one for pattern in patterns)
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if len(frozen) == len(shared):
        raise ConfigError("optim.freeze covers every parameter; leave some to train")
    found = sorted((shared[parameter] for parameter in frozen), key=len, reverse=True)
    return [" = ".join(of_one) for of_one in found]


def build_optimizer(objective: Objective, config: Optim) -> torch.optim.Adam:
    """Return AdamW over the joint parameters of an objective.

    Each group has a `factor`, multiplied with the learning rate of the step. Groups that a term
    makes of the model's parameters come last.
    """
    groups = [group for term in objective.terms.values() for group in term.model_groups()]
    grouped = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in objective.joint_parameters() if id(p) not in grouped]
    return torch.optim.AdamW(
        [{"params": rest, "factor": 1.0}, *(group for group in groups if group["params"])],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class OptimizerState:
    """State of an optimizer as a part of a checkpoint; rates and factors stay those of the run."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of every parameter, by its index and name."""
        state = self._optimizer.state_dict()["state"]
        return {
            f"{index}.{name}": value
            for index, entry in state.items()
            for name, value in entry.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the moments."""
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": entries})
