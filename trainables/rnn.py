"""Recurrent encoder and decoder without attention (Sutskever et al. 2014; Cho et al. 2014).

u = h_S^enc, h_0^dec = u, h_t = f(h_{t-1}, e_t), o_t = g(h_t) (methods.md 39): the decoder sees the
source only through u, the encoder's state after its last word, of fixed size whatever the length.
So on long sources it cannot be exact: u of 512 numbers has to hold every word.

B sentences, S source positions, T target positions, D features, U features of u, V vocabulary.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.attention import linear
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.embedding import SourceEmbedding, SourceEmbeddingConfig, token_table
from vinedresser.nn.output import FullOutput
from vinedresser.nn.recurrent import Cell, Layer, Recurrent, RecurrentConfig, RecurrentState, turned


class RnnConfig(RecurrentConfig):
    """The defaults are one LSTM layer of width 256 on each side."""

    bidirectional: bool = False
    # The source is read from its end: its first words are then near the target's, which gained 4.7
    # BLEU on English to French (Sutskever et al. 2014, section 3.3).
    reverse_source: bool = False
    # Of embeddings, between layers, and of what the output layer reads.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # output: target embedding and output layer share weights.
    tie: Literal["none", "output"] = "output"
    embedding: SourceEmbeddingConfig = SourceEmbeddingConfig()

    @property
    def has_bridge(self) -> bool:
        """True if u needs a map, tanh(W u + b), to be the decoder's first state."""
        encoder = (self.encoder_units * (1 + self.bidirectional), self.encoder_layers)
        return encoder != (self.width, self.decoder_layers)

    def build(self, vocabulary: Vocabulary) -> "Rnn":
        """Return a model with fresh weights."""
        return Rnn(self, vocabulary)


@dataclass(frozen=True)
class RnnState:
    """Between two steps: the weights of each layer, laid out for steps, and its state."""

    cells: list[Cell]
    layers: list[RecurrentState]


class Rnn(Seq2Seq):
    """Two stacks of recurrent layers, joined by one vector."""

    encoder_parts = ("source_embedding", "encoder")
    is_recurrent = True

    def __init__(self, config: RnnConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        # Vectors drawn with variance 1 / D enter with 1 / sqrt(D). Brought to 1, five of five small
        # forms memorised 63 sequences instead of reversing them; left at 1 / D, Multi30k
        # stood at 6.1 nats per token after 40 updates, with variance 1 at 5.7.
        D, self.scale = config.width, config.width**0.25
        self.num_parts = 2 if config.cell == "lstm" else 1
        self.source_embedding = SourceEmbedding(vocabulary, D, config.embedding, scale=self.scale)
        self.target_embedding = token_table(vocabulary.target, D)
        self.dropout = Dropout(config.dropout)
        stack = config.stack(config.encoder_units, config.encoder_layers, config.dropout)
        self.encoder, width = nn.ModuleList(), D
        for _ in range(config.encoder_layers):
            layer = Layer(stack, width, bidirectional=config.bidirectional)
            self.encoder.append(layer)
            width = layer.width
        # Nothing reads the top layer's outputs but u, which is a state: no norm there.
        self.encoder[-1].norm = nn.Identity()
        self.decoder = nn.ModuleList(
            Recurrent(config.cell, D, D) for _ in range(config.decoder_layers)
        )
        self.norms = nn.ModuleList(stack.norm(D) for _ in self.decoder)
        if config.has_bridge:
            of_encoder, of_decoder = config.encoder_layers * width, config.decoder_layers * D
            self.bridge = linear(of_encoder * self.num_parts, of_decoder * self.num_parts)
        self.output = FullOutput(D, vocabulary.target)
        if config.tie == "output":
            self.output.weight = self.target_embedding.weight

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """See Seq2Seq. The memory is one position: u, the last h (and c) of every layer."""
        x_BSD = self.dropout(self.source_embedding(source_BS, source_lengths_B))
        if self.config.reverse_source:
            x_BSD = turned(x_BSD, source_lengths_B)
        parts: list[Tensor] = []
        for i, layer in enumerate(self.encoder):
            assert isinstance(layer, Layer)
            x_BSD, state = layer.last(self.dropout(x_BSD) if i else x_BSD, source_lengths_B)
            parts += state
        u_BU = torch.cat(parts, -1)
        return Memory(u_BU[:, None], torch.ones_like(u_BU[:, :1], dtype=torch.bool))

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        """See Seq2Seq. Whole sequences in the fused kernel."""
        x_BTD = self._embed(inputs_BT)
        for i, (layer, state) in enumerate(zip(self.decoder, self._first(memory), strict=True)):
            x_BTD = self.norms[i](layer(self.dropout(x_BTD) if i else x_BTD, state))
        states_BTD: Tensor = self.dropout(x_BTD)
        return states_BTD

    def start(self, memory: Memory, max_length: int) -> RnnState:
        """See Seq2Seq."""
        cells = [layer.cell() for layer in self.decoder if isinstance(layer, Recurrent)]
        return RnnState(cells, self._first(memory))

    def step(self, state: RnnState, tokens_B: Tensor) -> tuple[Tensor, RnnState]:
        """See Seq2Seq."""
        x_BD, layers = self._embed(tokens_B), list[RecurrentState]()
        for i, (cell, norm) in enumerate(zip(state.cells, self.norms, strict=True)):
            known = cell.known(self.dropout(x_BD) if i else x_BD)
            layers.append(cell.step(known, None, state.layers[i]))
            x_BD = norm(layers[i][0])
        return self.dropout(x_BD), RnnState(state.cells, layers)

    def select(self, state: RnnState, rows: Tensor) -> RnnState:
        """See Seq2Seq."""
        layers = [tuple(part.index_select(0, rows) for part in layer) for layer in state.layers]
        return RnnState(state.cells, layers)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.target_embedding(ids) * self.scale)
        return embedded

    def _first(self, memory: Memory) -> list[RecurrentState]:
        """Each decoder layer before the first step: u, or what the bridge makes of it."""
        u_BU = memory.states_BSD[:, 0]
        if self.config.has_bridge:
            u_BU = torch.tanh(self.bridge(u_BU))
        parts, n = torch.split(u_BU, self.config.width, -1), self.num_parts
        return [tuple(parts[i : i + n]) for i in range(0, len(parts), n)]
