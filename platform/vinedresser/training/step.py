"""The loop: training_steps() is a generator of optimizer updates.

The gradient of an update is that of sum(nats) / sum(tokens) over all its batches, however they are
shared out among ranks, micro-batches and retries (methods.md 34).
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vinedresser.batch import Batch
from vinedresser.config import Experiment, Objective
from vinedresser.errors import MachineError
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import expected_open_share
from vinedresser.objectives import gold_share, likelihood, mixed_inputs
from vinedresser.training.device import Device, is_out_of_memory, peak_memory, seed_step
from vinedresser.training.optimizer import learning_rate, set_learning_rate

_log = logging.getLogger("vinedresser")


class Monitor(Protocol):
    """Observer of a model while it trains; `health.monitor.RunMonitor` is one."""

    def watching(self, step: int, batch: Batch) -> AbstractContextManager[None]:
        """Observe the forward pass of a step (1-based) over a batch on the CPU."""

    def gradients(self, step: int) -> None:
        """Read the gradients after the backward pass, before clipping."""

    def updated(self, step: int) -> None:
        """Read the weights after the optimizer's update."""


class Trainee(nn.Module):
    """Model and objective as one module, so that DDP sees a single forward pass."""

    def __init__(self, model: Seq2Seq, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, batch: Batch, epsilon: float, tokens: Tensor, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Nats of a batch, and what to minimise.

        Args:
            batch: one of this rank's.
            epsilon: share of gold inputs, 1 is teacher forcing.
            tokens: real target tokens of the update, over the number of ranks.
            share: this batch's share of the penalties, 1 over the rank's batches in the update.
        """
        memory = self.model.encode(batch.source_BS, batch.source_lengths_B)
        inputs_BT = batch.inputs_BT
        if self.training and epsilon < 1:
            sampling = self.objective.sampling
            inputs_BT = mixed_inputs(
                self.model,
                memory,
                batch,
                epsilon=epsilon,
                feedback=sampling.feedback,
                exact=sampling.exact,
            )
        states_BTD = self.model.decode(memory, inputs_BT, batch.is_real_BT)
        smoothing = self.objective.label_smoothing
        loss = likelihood(self.model, states_BTD, batch, label_smoothing=smoothing)
        goal = loss.total / tokens
        if self.objective.l0 > 0:
            open_share = expected_open_share(self.model).to(goal.device)
            goal = goal + share * self.objective.l0 * open_share
        return loss.total.detach(), goal


@dataclass(frozen=True)
class Step:
    """One optimizer update.

    Attributes:
        index: 1-based.
        nats: sum over the real target tokens of this rank's batches.
        tokens: how many.
        gradient_norm: global, before clipping; not finite where the update was left out.
        learning_rate: of the model's weights.
        epsilon: share of gold tokens among the inputs.
        batches: this rank's batches, as they were read.
        is_last: whether some rank asked all of them to stop here.
        own_seconds: wall time of this rank's reading and forward passes, where it waits for no
            other rank.
    """

    index: int
    nats: Tensor
    tokens: Tensor
    gradient_norm: Tensor
    learning_rate: float
    epsilon: float
    batches: Sequence[Batch] = ()
    is_last: bool = False
    own_seconds: float = 0.0


def training_steps(  # noqa: PLR0913 - all that a loop touches, and nothing hidden
    model: Seq2Seq,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    *,
    device: Device,
    start: int = 0,
    monitor: Monitor | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Makes one update after another, from step start + 1 to the end, and yields what happened.

    An update whose gradient is not finite is left out: weights and optimizer stay as they are
    (methods.md 101). Draws are a function of (seed, step, number of the batch in the update), so
    that one rank with two batches draws what two ranks with one each do.

    Args:
        model: in training mode.
        batches: this rank's, from the first that was not yet used.
        optimizer: over the model's trainable parameters.
        experiment: steps, seed, rates, objective, and how many batches an update takes.
        device: device, precision and rank.
        start: updates done before.
        monitor: looks on.
        should_stop: asked once an update; true on any rank ends all ranks after the same update.

    Raises:
        MachineError: out of memory with a single row, or beside other ranks.
    """
    trainee: nn.Module = Trainee(model, experiment.objective)
    if device.world_size > 1:
        # DDP sorts its buckets anew after its first update, in each process that resumes too. Two
        # addends commute; three are rounded by the ring in the order of the buckets.
        trainee = DistributedDataParallel(trainee, find_unused_parameters=device.world_size > 2)
    updater = _Updater(trainee, device, experiment.seed, monitor)
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = experiment.batches_a_rank
    d_model = getattr(experiment.model, "d_model", None)
    for index in range(start + 1, experiment.steps + 1):
        begun = time.perf_counter()
        hosted = list(itertools.islice(batches, count))
        reading = time.perf_counter() - begun
        if len(hosted) < count:
            return
        tokens, is_last = _agree(index, hosted, should_stop(), device)
        rate = learning_rate(experiment.optim, step=index, steps=experiment.steps, d_model=d_model)
        set_learning_rate(optimizer, rate)
        epsilon = gold_share(experiment.objective.sampling, index - 1)
        nats = updater.accumulate(index, hosted, epsilon, tokens)
        if monitor is not None:
            monitor.gradients(index)
        norm = nn.utils.clip_grad_norm_(parameters, experiment.optim.clip_norm)
        # What the fused kernels of AdamW look at, without asking the device: 1 leaves it out.
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.step()
        if monitor is not None:
            monitor.updated(index)
        own = torch.stack([batch.tokens for batch in hosted]).sum()
        seconds = reading + updater.forward_seconds
        yield Step(index, nats, own, norm, rate, epsilon, hosted, is_last, seconds)
        if is_last:
            return


# Reading an answer from a GPU waits for all that is queued there.
_ASK_EVERY_ON_GPU = 16


def _agree(
    index: int, hosted: Sequence[Batch], wants_stop: bool, device: Device
) -> tuple[Tensor, bool]:
    """Tokens of the update over the number of ranks, and whether all ranks stop after it.

    DDP averages gradients over ranks, tokens must weigh them.
    """
    tokens = torch.stack([batch.tokens for batch in hosted]).sum()
    if device.world_size == 1:
        return tokens.to(device.primary), wants_stop
    both = device.all_sum(torch.stack([tokens, torch.tensor(int(wants_stop))]))
    is_asked = device.primary.type == "cpu" or index % _ASK_EVERY_ON_GPU == 0
    return both[0] / device.world_size, is_asked and bool(both[1] > 0)


class _Updater:
    """Accumulates the gradient of an update; batches that do not fit in memory go in halves."""

    def __init__(
        self, trainee: nn.Module, device: Device, seed: int, monitor: Monitor | None
    ) -> None:
        self._trainee, self._device, self._seed, self._monitor = trainee, device, seed, monitor
        # Padded tokens a pass; lowered when memory runs out.
        self._fits: int | None = None
        # Of the last update.
        self.forward_seconds = 0.0

    def accumulate(
        self, index: int, hosted: Sequence[Batch], epsilon: float, tokens: Tensor
    ) -> Tensor:
        """Leaves the gradient of all batches in the parameters; returns the sum of nats."""
        while True:
            pieces = list(hosted)
            try:
                pieces = [piece for batch in hosted for piece in self._cut(batch)]
                return self._pass(index, pieces, epsilon, tokens)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(pieces, index)

    def _cut(self, batch: Batch) -> list[Batch]:
        if self._fits is None or batch.padded <= self._fits or len(batch.rows_B) == 1:
            return [batch]
        middle = len(batch.rows_B) // 2
        return [*self._cut(batch.rows(0, middle)), *self._cut(batch.rows(middle, None))]

    def _shrink(self, pieces: Sequence[Batch], index: int) -> None:
        """Lowers what is tried at a time (fault T03); the sums over an update stay the same."""
        largest = max(pieces, key=lambda piece: piece.padded)
        shape = " x ".join(map(str, largest.source_BS.shape[:2])) + " source and "
        shape += " x ".join(map(str, largest.target_BT.shape)) + " target"
        is_uncut = self._fits is not None and largest.padded > self._fits  # no memory even for that
        if self._device.world_size > 1 or len(largest.rows_B) == 1 or is_uncut:
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

    def _pass(self, index: int, pieces: Sequence[Batch], epsilon: float, tokens: Tensor) -> Tensor:
        for parameter in self._trainee.parameters():
            parameter.grad = None
        device, found = self._device, []
        self.forward_seconds = 0.0
        for number, piece in enumerate(pieces):
            seed_step(self._seed, index, number * device.world_size + device.rank)
            is_synced = number == len(pieces) - 1 or device.world_size == 1
            sync = nullcontext() if is_synced else self._trainee.no_sync()  # type: ignore[operator]
            monitor = self._monitor if number == 0 else None
            look = monitor.watching(index, piece) if monitor else nullcontext()
            with sync:
                begun = time.perf_counter()
                with look, device.autocast():
                    nats, goal = self._trainee(
                        piece.to(device.primary), epsilon, tokens, 1 / len(pieces)
                    )
                self.forward_seconds += time.perf_counter() - begun
                goal.backward()
            found.append(nats)
        return torch.stack(found).sum()
