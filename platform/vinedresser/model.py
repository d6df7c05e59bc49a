"""Seq2Seq: the contract that every trainable keeps.

Because of it one loop, one search, one pruner and one conformance suite serve the whole zoo.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from vinedresser.batch import Batch
from vinedresser.errors import ConfigError
from vinedresser.nn.output import Output
from vinedresser.nn.record import recording


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the two id spaces; `joint` marks that they are one and the same.

    Attributes:
        source: ids of the source side; 0 where the source is frames.
        target: ids of the target side.
        joint: one vocabulary for both sides.
        features: 0 for ids, else the source is float frames with this many features (speech).
    """

    source: int
    target: int
    joint: bool = False
    features: int = 0


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


Encode = Callable[["Seq2Seq", Tensor, Tensor], Memory]


def _crossing(encode: Encode) -> Encode:
    """Return an encoder pass that fetches its source and moves its memory to the decoder."""

    @functools.wraps(encode)
    def crossed(model: "Seq2Seq", source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        if model.devices is None:
            return encode(model, source_BS, source_lengths_B)
        encoder, decoder = model.devices
        memory = encode(model, source_BS.to(encoder), source_lengths_B.to(encoder))
        return Memory(memory.states_BSD.to(decoder), memory.is_real_BS.to(decoder))

    return crossed


class Seq2Seq(nn.Module):
    """An encoder, a decoder that can be fed whole or step by step, and an output layer.

    Teacher-forced states equal the stepwise ones to rounding, and nothing that is returned for a
    sentence depends on its batch mates or on padding.

    Attributes:
        encoder_parts: names of the attributes, modules or parameters, that only `encode` uses. A
            model names all of them, also those that some of its forms lack.
        output: the distribution of the next token given a decoder state.
        devices: encoder's and decoder's, where `to_devices` parted them.
        is_recurrent: whether a step of the decoder costs the same at any position. Scheduled
            sampling then feeds it step by step, else in two passes (objectives/likelihood.py).
    """

    encoder_parts: tuple[str, ...] = ()
    output: Output
    devices: tuple[torch.device, torch.device] | None = None
    is_recurrent: bool = False

    def __init_subclass__(cls, **settings: Any) -> None:
        """Models write `encode` for one device; where there are two, this is where they meet."""
        super().__init_subclass__(**settings)
        if "encode" in vars(cls):
            cls.encode = _crossing(cls.encode)  # type: ignore[assignment, method-assign]

    @abstractmethod
    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """Encode a source once: ids (B, S), or float frames (B, S, F)."""

    @abstractmethod
    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        """States (B, T, D) for whole inputs; state t depends on inputs 0..t only.

        Args:
            memory: an encoded source.
            inputs_BT: BOS, then any ids: an EOS or PAD that the model said itself ends nothing.
            is_real_BT: positions with a target. Only statistics over a batch may look at it, in
                training; None counts all.
        """

    @abstractmethod
    def start(self, memory: Memory, max_length: int) -> Any:
        """Return a decoding state for up to `max_length` steps; holds the caches."""

    @abstractmethod
    def step(self, state: Any, tokens_B: Tensor) -> tuple[Tensor, Any]:
        """Feed one token per sentence; returns decoder states (B, D) and the next state."""

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> Any:
        """Return the state of the given rows, in order; rows may repeat (beams) or be left out."""

    def to_devices(self, *, encoder: torch.device, decoder: torch.device) -> Self:
        """Move the weights; the encoder's may be on another device (methods.md 36).

        Batches, states and the output layer are on the decoder's device. Per source, its ids or
        frames and lengths cross to the encoder, its memory crosses back; nothing else does.

        Raises:
            ConfigError: both sides share a weight and the devices differ.
        """
        is_apart = encoder != decoder
        sides: dict[bool, set[int]] = {True: set(), False: set()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            sides[self.is_of_encoder(name)].add(id(parameter))
        if is_apart and sides[True] & sides[False]:
            raise ConfigError(
                "compute.devices parts encoder and decoder, but they share the embedding; "
                "Fix: set model.tie=output"
            )
        for name, child in self.named_children():
            child.to(encoder if self.is_of_encoder(name) else decoder)
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in own:
            tensor.data = tensor.data.to(encoder if self.is_of_encoder(name) else decoder)
        self.devices = (encoder, decoder) if is_apart else None
        return self

    def is_of_encoder(self, name: str) -> bool:
        """Return whether a parameter or module, by its name in the model, is of the encoder."""
        return name.split(".")[0] in self.encoder_parts

    @property
    def device(self) -> torch.device:
        """Device of batches, decoder states and the output layer."""
        return self.devices[1] if self.devices else next(self.parameters()).device

    def forward(self, batch: Batch) -> Tensor:
        """Teacher-forced states (B, T, D) of a batch."""
        memory = self.encode(batch.source_BS, batch.source_lengths_B)
        return self.decode(memory, batch.inputs_BT, batch.is_real_BT)

    @torch.no_grad()
    def attention(self, batch: Batch) -> dict[str, Tensor]:
        """Module's name -> its attention weights (B, H, T, S) under teacher forcing, no dropout.

        Weights of a query sum to 1 over real keys and are exactly 0 on padding. A module that
        attends once per step has its steps put together along T. Empty for a model that does not
        attend.
        """
        was_training = self.training
        self.eval()
        try:
            with recording() as found:
                self(batch)
        finally:
            self.train(was_training)
        names = {module: name for name, module in self.named_modules()}
        steps: dict[str, list[Tensor]] = {}
        for module, weights_BHTS in found:
            steps.setdefault(names[module], []).append(weights_BHTS)
        return {name: torch.cat(weights, 2) for name, weights in steps.items()}
