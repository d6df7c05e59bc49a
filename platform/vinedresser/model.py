"""Seq2Seq: the contract that every trainable keeps.

Because of it one loop, one search, one pruner and one conformance suite serve the whole zoo.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vinedresser.batch import Batch


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the two id spaces; `joint` says that they are one and the same."""

    source: int
    target: int
    joint: bool = False


@dataclass(frozen=True)
class Memory:
    """An encoded source.

    Attributes:
        states_BSD: encoder outputs; positions on padding hold anything.
        is_real_BS: true where a position counts. A subsampling encoder has fewer positions than
            source tokens and shortens this mask by the same rule.
    """

    states_BSD: Tensor
    is_real_BS: Tensor


class Seq2Seq(nn.Module):
    """An encoder, a decoder that can be fed whole or step by step, and an output layer.

    Teacher-forced states equal the stepwise ones to rounding, and nothing that is returned for a
    sentence depends on its batch mates or on padding.
    """

    @abstractmethod
    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """Encodes once per source."""

    @abstractmethod
    def decode(self, memory: Memory, inputs_BT: Tensor) -> Tensor:
        """States (B, T, D) for whole inputs; state t depends on inputs 0..t only."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """(..., D) states -> (..., V) unnormalised scores of the next token."""

    @abstractmethod
    def start(self, memory: Memory, max_length: int) -> Any:
        """A decoding state for up to `max_length` steps; holds the caches."""

    @abstractmethod
    def step(self, state: Any, tokens_B: Tensor) -> tuple[Tensor, Any]:
        """Feeds one token a sentence; returns logits (B, V) and the next state."""

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of the given rows, in their order; rows may repeat (beams) or be left out."""

    def forward(self, batch: Batch) -> Tensor:
        """Teacher-forced states (B, T, D) of a batch."""
        memory = self.encode(batch.source_BS, batch.source_lengths_B)
        return self.decode(memory, batch.inputs_BT)
