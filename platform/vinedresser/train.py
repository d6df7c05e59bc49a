"""The loop. training_steps() is a generator of steps, fit() consumes it. Knows no ray, no mlflow.

The gradient of a step is that of sum(nats) / sum(tokens) over all ranks, whatever the split.
"""

import ctypes
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vinedresser.batch import Batch
from vinedresser.config import Compute, Experiment, Objective
from vinedresser.errors import MachineError, TrainingError
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import expected_open_share
from vinedresser.objectives import gold_share, likelihood, mixed_inputs
from vinedresser.optim import learning_rate, set_learning_rate

_log = logging.getLogger("vinedresser")


@dataclass(frozen=True)
class Place:
    """Where one worker of a run computes.

    Attributes:
        device: of the weights, of the batch and of the loss.
        autocast_dtype: bfloat16, or None for plain fp32.
        rank: this worker, 0-based.
        workers: how many there are.
        encoder: another device, of the encoder's weights (methods.md 36).
    """

    device: torch.device
    autocast_dtype: torch.dtype | None
    rank: int = 0
    workers: int = 1
    encoder: torch.device | None = None

    @property
    def of_encoder(self) -> torch.device:
        """Where the encoder's weights are."""
        return self.encoder or self.device

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of a training step."""
        if self.autocast_dtype is None:
            return nullcontext()
        stack = ExitStack()
        for name in sorted({self.device.type, self.of_encoder.type}):
            stack.enter_context(torch.autocast(name, self.autocast_dtype))
        return stack


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are native: 4 to 5 times fp32 on such processors."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def place(compute: Compute, *, rank: int = 0) -> Place:
    """Resolves `auto` on this machine and sets the number of threads.

    Raises:
        MachineError: a device or precision was asked for that is not here.
    """
    has_cuda, encoder = torch.cuda.is_available(), None
    if compute.device == "cuda" and not has_cuda:
        raise MachineError("compute.device is cuda but no GPU is here; use compute.device=cpu")
    device = torch.device("cuda" if has_cuda and compute.device != "cpu" else "cpu")
    if compute.devices:
        device, encoder = (_device(n) for n in (compute.devices.decoder, compute.devices.encoder))
    torch.set_num_threads(compute.threads)
    _keep_freed_memory()
    is_native = has_bf16(device) and (encoder is None or has_bf16(encoder))
    is_bf16 = compute.precision == "bf16" or (compute.precision == "auto" and is_native)
    return Place(device, torch.bfloat16 if is_bf16 else None, rank, compute.workers, encoder)


def _device(name: str) -> torch.device:
    """A device of compute.devices that is here.

    Raises:
        MachineError: it is not.
    """
    device, count = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise MachineError(f"compute.devices names {name}, {count} GPUs are here; Fix: name cpu")
    return device


def _keep_freed_memory() -> None:
    """Keeps glibc from handing freed memory back after every step: 1.08x fp32, 1.19x bf16."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        _log.debug("no glibc: its allocator stays as it is")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes every random draw of a step a pure function of (seed, step, rank).

    So a resumed run draws what the uninterrupted one would have, with no state to store.
    """
    # Odd multipliers spread neighbouring triples over the 64-bit seeds (Weyl sequence).
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    torch.manual_seed(mixed & 0x7FFF_FFFF_FFFF_FFFF)


class Trainee(nn.Module):
    """Model and objective as one module, so that DDP sees a single forward pass."""

    def __init__(self, model: Seq2Seq, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, epsilon: float, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of this rank's batch, and what to minimise.

        Args:
            batch: this rank's.
            epsilon: share of gold inputs, 1 is teacher forcing.
            tokens: real target tokens of all ranks over the number of ranks.
        """
        memory = self.model.encode(batch.source_BS, batch.source_lengths_B)
        inputs_BT = batch.inputs_BT
        if epsilon < 1:
            inputs_BT = mixed_inputs(self.model, memory, batch, epsilon=epsilon)
        states_BTD = self.model.decode(memory, inputs_BT)
        smoothing = self.objective.label_smoothing
        loss = likelihood(self.model, states_BTD, batch, label_smoothing=smoothing)
        goal = loss.total / tokens
        if self.objective.l0 > 0:
            share = expected_open_share(self.model).to(goal.device)
            goal = goal + self.objective.l0 * share
        return loss.total.detach(), goal


@dataclass(frozen=True)
class Step:
    """One optimizer update.

    Attributes:
        index: 1-based.
        nats: sum over the real target tokens of this rank's batch.
        tokens: how many.
        gradient_norm: global, before clipping.
        learning_rate: of the model's weights.
        epsilon: share of gold tokens among the inputs.
    """

    index: int
    nats: Tensor
    tokens: Tensor
    gradient_norm: Tensor
    learning_rate: float
    epsilon: float


def training_steps(
    model: Seq2Seq,
    batches: Iterator[Batch],
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    *,
    place: Place,
    start: int = 0,
) -> Iterator[Step]:
    """Updates the model once a batch and yields what happened, from step start + 1 to the end."""
    trainee: nn.Module = Trainee(model, experiment.objective)
    if place.workers > 1:
        trainee = DistributedDataParallel(trainee)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index, host_batch in zip(range(start + 1, experiment.steps + 1), batches, strict=False):
        seed_step(experiment.seed, index, place.rank)
        batch = host_batch.to(place.device)
        rate = learning_rate(experiment.optim, step=index, steps=experiment.steps)
        set_learning_rate(optimizer, rate)
        epsilon = gold_share(experiment.objective.sampling, index - 1)
        with place.autocast():
            nats, goal = trainee(batch, epsilon, _tokens_a_rank(batch, place))
        optimizer.zero_grad(set_to_none=True)
        goal.backward()
        norm = nn.utils.clip_grad_norm_(parameters, experiment.optim.clip_norm)
        optimizer.step()
        yield Step(index, nats, batch.tokens, norm, rate, epsilon)


def _tokens_a_rank(batch: Batch, place: Place) -> Tensor:
    """Tokens of all ranks over their number: DDP averages gradients, tokens must weigh them."""
    tokens = batch.tokens.clone()
    if place.workers > 1:
        dist.all_reduce(tokens)
    return tokens / place.workers


class AveragedWeights:
    """Exponential moving average of the weights (Polyak and Juditsky 1992), bias-free early on.

    With `decay` 0 it is the model's own weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._own = dict(model.state_dict())
        self._names = [n for n, t in self._own.items() if t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves towards the model after a 1-based step; early steps average over fewer."""
        decay = min(self.decay, step / (step + 10))
        torch._foreach_lerp_(
            [self.tensors[name] for name in self._names],
            [self._own[name] for name in self._names],
            1 - decay,
        )


class Window:
    """The steps between two log lines. Tensors are read only when a line is written."""

    def __init__(self, clip_norm: float) -> None:
        self._clip_norm = clip_norm
        self._steps: list[Step] = []
        self._since = time.perf_counter()

    def add(self, step: Step) -> None:
        """Takes a step in without waiting for the device."""
        self._steps.append(step)

    def close(self) -> dict[str, float]:
        """What is logged, under the house's metric keys; the window is empty afterwards.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        nats = float(torch.stack([step.nats for step in self._steps]).sum())
        tokens = int(torch.stack([step.tokens for step in self._steps]).sum())
        norms = torch.stack([step.gradient_norm for step in self._steps])
        last, loss, largest = self._steps[-1], nats / tokens, float(norms.max())
        if not (math.isfinite(loss) and math.isfinite(largest)):
            raise TrainingError(
                f"step {last.index}: loss {loss:.3g}, gradient norm {largest:.3g}; "
                "lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps"
            )
        seconds, steps = time.perf_counter() - self._since, len(self._steps)
        self.restart()
        return {
            "train/nats_per_token": loss,
            "train/learning_rate": last.learning_rate,
            "train/gradient_norm_max": largest,
            "train/clipped_share": float((norms > self._clip_norm).float().mean()),
            "train/gold_share": last.epsilon,
            "train/tokens_per_second": tokens / seconds,
            "train/seconds_per_step": seconds / steps,
        }

    def restart(self) -> None:
        """Empties the window and starts its clock."""
        self._steps, self._since = [], time.perf_counter()


@dataclass(frozen=True)
class Effects:
    """What fit() does to the outside, and when.

    Attributes:
        log: takes metrics and the step.
        evaluate: judges the averaged weights at a step; called at each of `evaluate_at`.
        checkpoint: stores everything at a step.
        log_every: updates between log lines.
        evaluate_at: 1-based steps.
        checkpoint_every: updates between checkpoints.
    """

    log: Callable[[Mapping[str, float], int], None]
    evaluate: Callable[[int], None]
    checkpoint: Callable[[int], None]
    log_every: int
    evaluate_at: frozenset[int]
    checkpoint_every: int


def evaluation_steps(experiment: Experiment) -> frozenset[int]:
    """The steps after which a run is evaluated, evenly spread, the last one included."""
    times, steps = experiment.evaluation.times, experiment.steps
    return frozenset(round(steps * (i + 1) / times) for i in range(times))


def fit(
    steps: Iterator[Step], averaged: AveragedWeights, effects: Effects, *, clip_norm: float
) -> None:
    """Runs the steps; logs, evaluates and checkpoints on the way. Sums, not means, are kept.

    Raises:
        TrainingError: loss or gradient is not finite.
    """
    window = Window(clip_norm)
    for step in steps:
        averaged.update(step.index)
        window.add(step)
        if step.index % effects.log_every == 0 or step.index in effects.evaluate_at:
            effects.log(window.close(), step.index)
        if step.index in effects.evaluate_at:
            effects.evaluate(step.index)
            window.restart()
        if step.index % effects.checkpoint_every == 0:
            effects.checkpoint(step.index)
