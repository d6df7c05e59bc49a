"""Convolutional sequence to sequence (Gehring et al. 2017; methods.md 60).

B sentences, S source positions, T target positions, D features, K window, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vinedresser.batch import is_real
from vinedresser.config import ModelConfig
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.convolution import WeightNorm, scale_gradient, windows
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.embedding import SourceEmbedding, SourceEmbeddingConfig, token_table
from vinedresser.nn.output import FullOutput
from vinedresser.nn.positions import Positions
from vinedresser.nn.record import record
from vinedresser.nn.subsampling import FrontEnd, SubsamplingConfig

# The mean of two terms of variance v has variance v / 2; this keeps it at v (their section 3.4).
_HALF = math.sqrt(0.5)


class ConvConfig(ModelConfig):
    """The defaults are as large as the small Transformer: 5.5 million weights in the layers.

    It needs a higher learning rate than the others: after 150 updates of 4,096 tokens on Multi30k
    it stood at 4.5 nats per token with optim.lr 3e-3 and at 5.3 with 1e-3.
    """

    d_model: PositiveInt = 256
    # Positions that a layer sees; L layers of width K see L * (K - 1) + 1 of them.
    kernel: PositiveInt = 3
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    # Of embeddings, of each layer's input and of the decoder's states.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Learned, as in the paper: positions from max_positions on share the last row, so that no
    # sentence is too long; the convolutions still encode their order.
    positions: Literal["learned", "none"] = "learned"
    max_positions: PositiveInt = 512
    # Salimans & Kingma 2016, for every convolution and projection.
    weight_norm: bool = True
    # none; output: target embedding and output layer share weights.
    tie: Literal["none", "output"] = "output"
    embedding: SourceEmbeddingConfig = SourceEmbeddingConfig()
    subsampling: SubsamplingConfig = SubsamplingConfig()

    def build(self, vocabulary: Vocabulary) -> "ConvSeq2Seq":
        """Return a convolutional model with fresh weights.

        Raises:
            ValueError: `embedding.kind: characters` with frames.
        """
        return ConvSeq2Seq(self, vocabulary)


PRESETS: Mapping[str, Mapping[str, object]] = {"conv-small": {}}


def _gated_convolution(config: ConvConfig) -> WeightNorm:
    """(..., K * D) -> (..., 2 * D), which a GLU halves.

    N(0, 4 p / n) for n inputs that are kept with probability p: half of the features gate the
    other half (their section 3.5).
    """
    d, n = config.d_model, config.kernel * config.d_model
    std = math.sqrt(4 * (1 - config.dropout) / n)
    return WeightNorm(n, 2 * d, std=std, has_norm=config.weight_norm)


class EncoderLayer(nn.Module):
    """x + GLU(convolution(x)), times sqrt(1/2)."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.kernel = config.kernel
        self.convolution = _gated_convolution(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, is_real_BS1: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); padding is read as zeros, as are the ends of a sentence."""
        entered = self.dropout(x_BSD.masked_fill(~is_real_BS1, 0.0))
        left = (self.kernel - 1) // 2
        gathered = windows(entered, self.kernel, left=left, right=self.kernel - 1 - left)
        return (x_BSD + F.glu(self.convolution(gathered))) * _HALF


@dataclass(frozen=True)
class Source:
    """Keys and values that every decoder layer attends to.

    Attributes:
        keys_BSD: z, the encoder's outputs.
        values_BSD: (z + e) sqrt(1/2), e the embedding at the same position.
        hidden_B1S: true on padding.
        spread_B11: sqrt(m) of a source of m positions. An attended vector is a mean of m values,
            so that its variance falls with m where the weights are even; this undoes it.
    """

    keys_BSD: Tensor
    values_BSD: Tensor
    hidden_B1S: Tensor
    spread_B11: Tensor

    @classmethod
    def of(cls, memory: Memory) -> "Source":
        """From a memory whose states are keys and values side by side."""
        keys, values = memory.states_BSD.chunk(2, -1)
        mask_BS = memory.is_real_BS
        return cls(keys, values, ~mask_BS[:, None], mask_BS.sum(1)[:, None, None].sqrt())

    def select(self, rows: Tensor) -> "Source":
        """Return the given rows, in their order."""
        fields = (self.keys_BSD, self.values_BSD, self.hidden_B1S, self.spread_B11)
        return Source(*(field.index_select(0, rows) for field in fields))


class Attention(nn.Module):
    """One step of multi-step attention: softmax(q z) (z + e), for q = W h + b + g.

    h are the layer's GLU outputs, g the embeddings of the decoder's inputs.
    """

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        d = config.d_model
        self.query, self.output = (
            WeightNorm(d, d, std=d**-0.5, has_norm=config.weight_norm) for _ in range(2)
        )

    def forward(self, h_BTD: Tensor, embedded_BTD: Tensor, source: Source) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        queries = (self.query(h_BTD) + embedded_BTD) * _HALF
        scores_BTS = queries @ source.keys_BSD.transpose(1, 2)
        scores_BTS = scores_BTS.masked_fill(source.hidden_B1S, -math.inf)
        weights_BTS = torch.softmax(scores_BTS, -1, dtype=torch.float32)
        record(self, weights_BTS[:, None])
        attended = weights_BTS.to(source.values_BSD.dtype) @ source.values_BSD
        out_BTD: Tensor = self.output(attended * source.spread_B11.to(attended.dtype))
        return out_BTD


class DecoderLayer(nn.Module):
    """Causal gated convolution, then attention to the source, each added and scaled."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        self.kernel = config.kernel
        self.convolution = _gated_convolution(config)
        self.attention = Attention(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, embedded_BTD: Tensor, source: Source) -> Tensor:
        """(B, T, D) -> (B, T, D); position t sees t - K + 1 .. t, zeros before the first."""
        gathered = windows(self.dropout(x_BTD), self.kernel, left=self.kernel - 1, right=0)
        return self._attend(gathered, x_BTD, embedded_BTD, source)

    def step(
        self, x_B1D: Tensor, past_BKD: Tensor, embedded_B1D: Tensor, source: Source
    ) -> tuple[Tensor, Tensor]:
        """(B, 1, D), the K - 1 inputs before it -> (B, 1, D), the K - 1 inputs before the next."""
        window_BKD = torch.cat([past_BKD, x_B1D], 1)
        out_B1D = self._attend(window_BKD.flatten(1)[:, None], x_B1D, embedded_B1D, source)
        return out_B1D, window_BKD[:, 1:]

    def _attend(self, gathered: Tensor, x_BTD: Tensor, embedded: Tensor, source: Source) -> Tensor:
        h_BTD = F.glu(self.convolution(gathered))
        h_BTD = (h_BTD + self.attention(h_BTD, embedded, source)) * _HALF
        out_BTD: Tensor = (x_BTD + h_BTD) * _HALF
        return out_BTD


@dataclass
class ConvState:
    """The last K - 1 inputs of every decoder layer, and the source."""

    position: int
    pasts: list[Tensor]
    source: Source


class ConvSeq2Seq(Seq2Seq):
    """Gated convolutions on both sides; every decoder layer attends to the source.

    A memory's states are keys z and values (z + e) sqrt(1/2) side by side: (B, S, 2 D).
    """

    encoder_parts = ("source_embedding", "source_positions", "front_end", "encoder")

    def __init__(self, config: ConvConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        d, kind, rows = config.d_model, config.positions, config.max_positions
        self.source_embedding = SourceEmbedding(vocabulary, d, config.embedding)
        self.target_embedding = token_table(vocabulary.target, d)
        self.source_positions = Positions(kind, d, max_positions=rows)
        self.target_positions = Positions(kind, d, max_positions=rows)
        self.front_end = FrontEnd(config.subsampling, d)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.output = FullOutput(d, vocabulary.target)
        if config.tie != "none":
            self.output.weight = self.target_embedding.weight
        self.dropout = Dropout(config.dropout)

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """See Seq2Seq. Positions are counted after subsampling."""
        x_BSD = self.source_embedding(source_BS, source_lengths_B)
        x_BSD, lengths_B = self.front_end(x_BSD, source_lengths_B)
        embedded_BSD = self.dropout(self.source_positions(x_BSD))
        mask_BS = is_real(lengths_B, x_BSD.shape[1])
        x_BSD = embedded_BSD
        for layer in self.encoder:
            x_BSD = layer(x_BSD, mask_BS[:, :, None])
        # Every decoder layer sends a gradient back; their mean instead of their sum keeps it at
        # the size of the decoder's (their section 3.5).
        keys_BSD = scale_gradient(x_BSD, 1 / len(self.decoder))
        return Memory(torch.cat([keys_BSD, (keys_BSD + embedded_BSD) * _HALF], -1), mask_BS)

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        """See Seq2Seq."""
        source = Source.of(memory)
        embedded_BTD = self._embed(inputs_BT)
        x_BTD = embedded_BTD
        for layer in self.decoder:
            x_BTD = layer(x_BTD, embedded_BTD, source)
        states: Tensor = self.dropout(x_BTD)
        return states

    def _embed(self, inputs_BT: Tensor, first: int = 0) -> Tensor:
        placed_BTD = self.target_positions(self.target_embedding(inputs_BT), first)
        embedded_BTD: Tensor = self.dropout(placed_BTD)
        return embedded_BTD

    def start(self, memory: Memory, max_length: int) -> ConvState:
        """See Seq2Seq."""
        B, kept = len(memory.states_BSD), self.config.kernel - 1
        blank = memory.states_BSD.new_zeros(B, kept, self.config.d_model)
        return ConvState(0, [blank] * len(self.decoder), Source.of(memory))

    def step(self, state: ConvState, tokens_B: Tensor) -> tuple[Tensor, ConvState]:
        """See Seq2Seq."""
        embedded_B1D = self._embed(tokens_B[:, None], state.position)
        x_B1D, pasts = embedded_B1D, []
        for layer, past in zip(self.decoder, state.pasts, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_B1D, past_BKD = layer.step(x_B1D, past, embedded_B1D, state.source)
            pasts.append(past_BKD)
        return x_B1D[:, 0], ConvState(state.position + 1, pasts, state.source)

    def select(self, state: ConvState, rows: Tensor) -> ConvState:
        """See Seq2Seq."""
        pasts = [past.index_select(0, rows) for past in state.pasts]
        return ConvState(state.position, pasts, state.source.select(rows))
