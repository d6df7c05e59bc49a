"""The loop: training_steps() is a generator of optimizer updates.

The gradient of a step is that of sum(nats) / sum(tokens) over all ranks, whatever the split.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vinedresser.batch import Batch
from vinedresser.config import Experiment, Objective
from vinedresser.model import Seq2Seq
from vinedresser.nn.gates import expected_open_share
from vinedresser.objectives import gold_share, likelihood, mixed_inputs
from vinedresser.optim import learning_rate, set_learning_rate
from vinedresser.train.place import Place, seed_step


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
        if self.training and epsilon < 1:
            feedback = self.objective.sampling.feedback
            inputs_BT = mixed_inputs(self.model, memory, batch, epsilon=epsilon, feedback=feedback)
        states_BTD = self.model.decode(memory, inputs_BT, batch.is_real_BT)
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
