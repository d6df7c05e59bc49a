"""Optimizer updates: `training_steps` yields one Step after another.

The gradient of an update is that of sum(nll) / sum(tokens) over all its batches, however they are
shared out among ranks, micro-batches and retries (methods.md 34).
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.errors import MachineError
from vinedresser.objective import Objective
from vinedresser.training.device import Device, is_out_of_memory, peak_memory, seed_step
from vinedresser.training.optimizer import learning_rate, set_learning_rate

_log = logging.getLogger(__name__)


class StepMonitor(Protocol):
    """Observer of a model while it trains; `health.monitor.RunMonitor` is one."""

    def watching(self, step: int, batch: Batch) -> AbstractContextManager[None]:
        """Observe the forward pass of a step (1-based) over a batch on the CPU."""

    def gradients(self, step: int) -> None:
        """Read the gradients after the backward pass, before clipping."""

    def updated(self, step: int) -> None:
        """Read the weights after the optimizer's update."""


@dataclass(frozen=True)
class Step:
    """One optimizer update.

    Attributes:
        index: 1-based.
        nll: negative log-likelihood, summed over the real target tokens of this rank's batches;
            as the likelihood term trains it: smoothed, on mixed inputs where these are sampled.
        tokens: number of those tokens.
        gradient_norm: global, before clipping; not finite where the update was left out.
        learning_rate: of the model's weights.
        metrics: what the objective's terms log, such as the teacher-forcing ratio.
        batches: this rank's batches, as they were read.
        stop: true if some rank requested that all of them stop here.
        own_seconds: wall time of this rank's reading and forward passes, where it waits for no
            other rank.
    """

    index: int
    nll: Tensor
    tokens: Tensor
    gradient_norm: Tensor
    learning_rate: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    batches: Sequence[Batch] = ()
    stop: bool = False
    own_seconds: float = 0.0


# Reading an answer from a GPU waits for all that is queued there.
_READ_EVERY_ON_GPU = 16


def training_steps(  # noqa: PLR0913 - all that a loop touches, and nothing hidden
    objective: Objective,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    *,
    device: Device,
    start: int = 0,
    monitor: StepMonitor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Make one update after another, from step start + 1 to the end, and yield each.

    An update whose gradient is not finite is left out: weights and optimizers stay as they are
    (methods.md 101). Batches are this rank's, from the first not yet used. `should_stop` is called
    once per update; true on any rank ends all ranks after the same update.

    Raises:
        MachineError: out of memory with a single row, or with other ranks.
    """
    module: nn.Module = objective
    if device.world_size > 1:
        # DDP sorts its buckets anew after its first update, in each process that resumes too. Two
        # addends commute; three are rounded by the ring in the order of the buckets.
        module = DistributedDataParallel(objective, find_unused_parameters=device.world_size > 2)
    gradients = GradientAccumulator(module, device, experiment.seed, monitor)
    parameters, own_parameters = objective.joint_parameters(), objective.own_parameters()
    count, clip_norm = experiment.batches_per_rank, experiment.optim.clip_norm
    d_model = getattr(experiment.model, "d_model", None)
    for index in range(start + 1, experiment.steps + 1):
        begun = time.perf_counter()
        hosted = list(itertools.islice(batches, count))
        reading = time.perf_counter() - begun
        if len(hosted) < count:
            return
        own_tokens = torch.stack([batch.tokens for batch in hosted]).sum()
        # DDP averages gradients over ranks, tokens must weigh them.
        tokens, stop = own_tokens.to(device.primary), should_stop()
        if device.world_size > 1:
            both = device.all_sum(torch.stack([own_tokens, torch.tensor(int(stop))]))
            tokens = both[0] / device.world_size
            is_read = device.primary.type == "cpu" or index % _READ_EVERY_ON_GPU == 0
            stop = is_read and bool(both[1] > 0)
        rate = learning_rate(experiment.optim, step=index, steps=experiment.steps, d_model=d_model)
        set_learning_rate(optimizer, rate)
        nll = gradients.accumulate(index, hosted, tokens)
        if monitor is not None:
            monitor.gradients(index)
        norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
        for own in own_parameters:
            own_norm = nn.utils.clip_grad_norm_(own, clip_norm)
            norm = torch.where(torch.isfinite(own_norm), norm, own_norm)
        for each in (optimizer, *objective.optimizers.values()):
            update(each, is_finite=torch.isfinite(norm))
        if monitor is not None:
            monitor.updated(index)
        seconds, metrics = reading + gradients.forward_seconds, objective.metrics(index)
        yield Step(index, nll, own_tokens, norm, rate, metrics, hosted, stop, seconds)
        if stop:
            return


def update(optimizer: torch.optim.Optimizer, *, is_finite: Tensor) -> None:
    """Make an optimizer's update; leave it out where the gradient is not finite."""
    if optimizer.defaults.get("fused"):
        # What fused kernels look at, without waiting for the device: 1 leaves the update out.
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(is_finite):
        optimizer.step()


class GradientAccumulator:
    """Accumulates the gradient of an update; batches that do not fit in memory go in halves.

    Attributes:
        forward_seconds: wall time of the forward passes of the last update.
    """

    def __init__(
        self, module: nn.Module, device: Device, seed: int, monitor: StepMonitor | None
    ) -> None:
        """Args: the objective, alone or inside DDP; where it computes; the run's seed; observer."""
        self._module, self._device, self._seed, self._monitor = module, device, seed, monitor
        # Padded tokens per pass; lowered when memory runs out.
        self._fits: int | None = None
        self.forward_seconds = 0.0

    def accumulate(self, index: int, hosted: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Leave the gradient of all batches in the parameters; return the sum of their nll."""
        device, monitor = self._device, self._monitor
        while True:
            for parameter in self._module.parameters():
                parameter.grad = None
            pieces = [piece for batch in hosted for piece in self._cut(batch)]
            found: list[Tensor] = []
            self.forward_seconds = 0.0
            try:
                for number, piece in enumerate(pieces):
                    seed = seed_step(self._seed, index, number * device.world_size + device.rank)
                    # Of several batches, the last one exchanges gradients with other ranks.
                    is_synced = number == len(pieces) - 1 or device.world_size == 1
                    with nullcontext() if is_synced else self._module.no_sync():  # type: ignore[operator]
                        begun = time.perf_counter()
                        look: AbstractContextManager[None] = nullcontext()
                        if monitor is not None and number == 0:
                            look = monitor.watching(index, piece)
                        with look, device.autocast():
                            nll, loss = self._module(
                                piece.to(device.primary),
                                tokens,
                                step=index,
                                seed=seed,
                                share=1 / len(pieces),
                            )
                        self.forward_seconds += time.perf_counter() - begun
                        loss.backward()
                    found.append(nll)
                return torch.stack(found).sum()
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(pieces, index)

    def _cut(self, batch: Batch) -> list[Batch]:
        """Return a batch in halves of halves that fit."""
        if self._fits is None or batch.padded <= self._fits or len(batch.rows_B) == 1:
            return [batch]
        middle = len(batch.rows_B) // 2
        return [*self._cut(batch.rows(0, middle)), *self._cut(batch.rows(middle, None))]

    def _shrink(self, pieces: Sequence[Batch], index: int) -> None:
        """Lower the largest batch that is tried; the sums over an update stay the same."""
        largest = max(pieces, key=lambda piece: piece.padded)
        shape = " x ".join(map(str, largest.source_BS.shape[:2])) + " source and "
        shape += " x ".join(map(str, largest.target_BT.shape)) + " target"
        if self._device.world_size > 1 or len(largest.rows_B) == 1:
            raise MachineError(
                f"step {index}: out of memory at {shape} tokens, peak {peak_memory()}; "
                "lower batch.max_padded_tokens, or the task's max_source_length and "
                "max_target_length"
            )
        self._fits = largest.padded // 2
        _log.warning(
            "step %d: out of memory at %s tokens; batches over %d tokens go in parts from now on",
            index,
            shape,
            self._fits,
        )
