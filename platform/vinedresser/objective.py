"""Objective: the loss of a run as a weighted sum of terms.

A term is one module of `objectives/`. Sums over tokens travel, means do not: the objective alone
divides by the tokens of an update. B sentences, T target positions, D features, N real target
tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vinedresser.batch import Batch
from vinedresser.config import TermConfig, Terms
from vinedresser.data.tokenizers.tokenizer import TextTokenizer
from vinedresser.decode import greedy, sample
from vinedresser.metrics import sentence_scores
from vinedresser.model import Memory, Seq2Seq


@dataclass(frozen=True)
class Part:
    """The value of a term over one batch.

    Attributes:
        total: differentiable scalar; a sum over the batch's tokens, or a penalty once per update.
        tokens: real target tokens, int64 scalar; None marks a penalty.
    """

    total: Tensor
    tokens: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Total per token."""
        return self.total if self.tokens is None else self.total / self.tokens


def target_nll(
    model: Seq2Seq, states_BTD: Tensor, batch: Batch, *, label_smoothing: float = 0.0
) -> Part:
    """Return the negative log-likelihood of the targets in nats, over real tokens only.

    States are picked before the output layer, so that padding costs no projection. Uniform logits
    give exactly ln |V| per token. Position t of the states predicts target t.
    """
    is_real_BT = batch.is_real_BT
    states_ND, targets_N = states_BTD[is_real_BT], batch.target_BT[is_real_BT]
    return Part(model.output.nll(states_ND, targets_N, smoothing=label_smoothing), batch.tokens)


@dataclass(frozen=True)
class Pass:
    """One batch on its way through the model; every term sees the same one.

    Attributes:
        model: in training mode.
        batch: on the model's device.
        memory: the encoded source.
        step: 1-based update.
        seed: function of the run's seed, the step and the batch's number in the update.
        tokenizer: of the target; None where a caller has none, and then no text can be scored.
    """

    model: Seq2Seq
    batch: Batch
    memory: Memory
    step: int
    seed: int
    tokenizer: TextTokenizer | None = None

    @cached_property
    def states_BTD(self) -> Tensor:
        """Decoder states under teacher forcing; computed once, when a term first reads them."""
        return self.model.decode(self.memory, self.batch.inputs_BT, self.batch.is_real_BT)

    def generator(self) -> torch.Generator:
        """Return a fresh generator for a term's own draws; it leaves torch's global one alone."""
        return torch.Generator(self.model.device).manual_seed(self.seed)

    def decode(
        self, generator: torch.Generator | None = None, *, cap: int | None = None
    ) -> list[list[int]]:
        """Decode the batch without gradient and dropout; return ids without EOS.

        Cost: a second encoder pass and one decoder step per position.

        Args:
            generator: draws from the model's distribution; None decodes greedily.
            cap: no output is longer; by default the longest target of the batch.
        """
        model, batch = self.model, self.batch
        modes = {module: module.training for module in model.modules()}
        limit = batch.target_BT.shape[1] if cap is None else cap
        source_BS, lengths_B = batch.source_BS, batch.source_lengths_B
        model.eval()
        try:
            if generator is None:
                return greedy(model, source_BS, lengths_B, cap=limit).ids
            return sample(model, source_BS, lengths_B, cap=limit, generator=generator).ids
        finally:
            for module, mode in modes.items():
                module.training = mode

    @cached_property
    def references(self) -> list[list[int]]:
        """Target ids without EOS and padding."""
        return [
            row[: length - 1]
            for row, length in zip(
                self.batch.target_BT.tolist(), self.batch.target_lengths_B.tolist(), strict=True
            )
        ]

    def sentence_scores(self, metric: str, hypotheses: Sequence[Sequence[int]]) -> Tensor:
        """Return the score (B,) of each hypothesis against its target, as text.

        The metric is a name of METRICS, which defines the unit and the direction; EOS is left out
        of the ids.
        """
        assert self.tokenizer is not None, "this caller trains without a tokenizer"
        texts, references = (
            [self.tokenizer.decode(ids) for ids in side] for side in (hypotheses, self.references)
        )
        folds = self.tokenizer.folds_case
        scores = sentence_scores(metric, texts, references, folds_case=folds)
        return torch.tensor(scores, device=self.model.device)


class Term(nn.Module):
    """Base of the terms. Parameters and buffers are stored in checkpoints.

    A parameter without an optimizer of the term's own joins the main optimizer.

    Attributes:
        is_nll: true if the value is the targets' negative log-likelihood: the training curve.
    """

    is_nll = False

    @abstractmethod
    def forward(self, found: Pass) -> Part:
        """Return the term's value over one batch, before its weight."""

    def build_optimizer(self) -> torch.optim.Optimizer | None:
        """Return an optimizer over the term's parameters; its rate is the term's own affair.

        It is stepped with the main one, after clipping to `optim.clip_norm` apart from the model.
        An update that is left out is left out for both.
        """
        return None

    def model_groups(self) -> Sequence[dict[str, Any]]:
        """Return parameter groups of the model that the main optimizer treats differently.

        Each has `params`, a `factor` of the learning rate, and further options of AdamW.
        """
        return ()

    def metrics(self, step: int) -> Mapping[str, float]:  # noqa: ARG002 - for those that override
        """Return what the training log shows of the term at a 1-based step, as `train/NAME`."""
        return {}


class Objective(nn.Module):
    """A model with the terms that train it, as one module: DDP sees a single forward pass.

    `terms` are those with a weight above 0, `optimizers` those of the terms that have their own, by
    name.
    """

    def __init__(
        self, config: Terms, model: Seq2Seq, tokenizer: TextTokenizer | None = None
    ) -> None:
        """Build the terms on the model's device."""
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        self._configs: dict[str, TermConfig] = config.active
        self.terms = {
            name: term.build(model).to(model.device) for name, term in self._configs.items()
        }
        # Registers the terms; a module's name cannot hold the dots of a term's name.
        self._registered = nn.ModuleList(self.terms.values())
        built = {name: term.build_optimizer() for name, term in self.terms.items()}
        self.optimizers = {name: own for name, own in built.items() if own is not None}

    def forward(
        self, batch: Batch, tokens: Tensor, *, step: int, seed: int, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of a batch, summed in nats, and its share of the loss.

        Args:
            batch: on the model's device.
            tokens: real target tokens of the update, over the number of ranks.
            step: 1-based update.
            seed: of the batch.
            share: of the penalties; 1 over the rank's batches in the update.
        """
        memory = self.model.encode(batch.source_BS, batch.source_lengths_B)
        found = Pass(self.model, batch, memory, step, seed, self._tokenizer)
        loss, nll = torch.zeros((), device=tokens.device), None
        for name, term in self.terms.items():
            part, weight = term(found), self._configs[name].weight
            total = part.total.to(tokens.device)
            if part.tokens is None:
                loss = loss + share * weight * total
            else:
                loss = loss + weight * (total / tokens)
            if term.is_nll:
                nll = total.detach()
        if nll is None:
            # The training curve shows it whatever is minimised.
            with torch.no_grad():
                nll = target_nll(self.model, found.states_BTD, batch).total
        return nll, loss

    def own_parameters(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each optimizer that a term has for itself."""
        return [
            [p for group in own.param_groups for p in group["params"]]
            for own in self.optimizers.values()
        ]

    def joint_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the model and of terms without an optimizer."""
        own = {id(p) for parameters in self.own_parameters() for p in parameters}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own]

    def metrics(self, step: int) -> dict[str, float]:
        """Return what the training log shows of all terms."""
        return {k: v for term in self.terms.values() for k, v in term.metrics(step).items()}

    # A part of a checkpoint, not of another module's state.
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the states of terms and of their optimizers; the model is another part."""
        return {
            name: {
                "module": term.state_dict(),
                "optimizer": own.state_dict() if (own := self.optimizers.get(name)) else None,
            }
            for name, term in self.terms.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore what `state_dict` returned."""
        for name, term in self.terms.items():
            term.load_state_dict(state[name]["module"])
            if name in self.optimizers:
                self.optimizers[name].load_state_dict(state[name]["optimizer"])
