"""Transformer (Vaswani et al. 2017) with L0 head gates (Voita et al. 2019).

B sentences, S source positions, T target positions, D features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vinedresser.batch import is_real
from vinedresser.config import ModelConfig
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn import feed_forward
from vinedresser.nn.attention import Cache, MultiHeadAttention
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.embedding import SourceEmbedding, SourceEmbeddingConfig, token_table
from vinedresser.nn.feed_forward import Activation
from vinedresser.nn.norms import NormKind, build_norm
from vinedresser.nn.output import FullOutput
from vinedresser.nn.positions import PositionKind, Positions
from vinedresser.nn.reduced_values import ReducedValueAttention, ReducedValues
from vinedresser.nn.subsampling import FrontEnd, SubsamplingConfig

# Self-attention of the encoder, of the decoder, and the decoder's attention to the encoder.
AttentionKind = Literal["enc_self", "dec_self", "dec_enc"]
Rate = Annotated[float, Field(ge=0, lt=1)]


class TransformerConfig(ModelConfig):
    """The defaults are the small translation model: 3 + 3 layers of width 256."""

    d_model: PositiveInt = 256
    d_ff: PositiveInt = 1024
    num_heads: PositiveInt = 4
    # 0 takes d_model / num_heads. Removing heads never changes it.
    head_dim: Annotated[int, Field(ge=0)] = 0
    encoder_layers: PositiveInt = 3
    decoder_layers: PositiveInt = 3
    dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    # pre: x + f(norm(x)), with a norm after the last layer; post: norm(x + f(x)) (methods.md 47).
    norm: Literal["pre", "post"] = "pre"
    # batch and power have limits, told in nn/norms.py (methods.md 48).
    norm_kind: NormKind = "layer"
    # Of the feed-forward layers; the glu forms have three matrices of d_ff instead of two.
    activation: Activation = "relu"
    # Added to embeddings. Positions beyond a table share its last row: from max_positions on for
    # learned, from d_model on for one_hot (methods.md 57).
    positions: PositionKind = "sinusoidal"
    # learned only: rows of its table.
    max_positions: PositiveInt = 512
    # none; output: target embedding and output layer share weights; all: the source too, which
    # needs a joint vocabulary.
    tie: Literal["none", "output", "all"] = "output"
    # Embeddings times sqrt(d_model), and a bias on the source's (methods.md 58).
    rescale_emb: bool = True
    inp_emb_bias: bool = False
    # Source ids by a table or by convolutions over characters; frames are always projected.
    embedding: SourceEmbeddingConfig = SourceEmbeddingConfig()
    # A front end that shortens the source before the first layer (methods.md 25-29).
    subsampling: SubsamplingConfig = SubsamplingConfig()
    # Values of all attention: W_v x; low_rank: U V x, with U of value_rank columns shared by all
    # heads; none: x itself, each head its slice (methods.md 62, 63).
    values: Literal["full", "low_rank", "none"] = "full"
    # low_rank only; 0 takes the head dimension.
    value_rank: Annotated[int, Field(ge=0)] = 0
    # Attention kinds whose heads get a trainable gate.
    concrete_heads: tuple[AttentionKind, ...] = ()
    # Kind -> layers -> 0/1 a head: only heads with 1 are built (methods.md 87).
    alive_heads: Mapping[AttentionKind, tuple[tuple[Literal[0, 1], ...], ...]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        is_split = self.head_dim == 0 or self.values != "full"
        if is_split and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd; sinusoidal positions need it even")
        if self.value_rank and self.values != "low_rank":
            raise ValueError(f"value_rank is of values: low_rank, values is {self.values}")
        if self.value_rank > self.d_model:
            raise ValueError(f"value_rank {self.value_rank} is over d_model {self.d_model}")
        if both := set(self.concrete_heads) & set(self.alive_heads):
            raise ValueError(f"{min(both)} is both in concrete_heads and in alive_heads")
        for kind, layers in self.alive_heads.items():
            wanted = self.layers_of(kind)
            if len(layers) != wanted or any(len(row) != self.num_heads for row in layers):
                raise ValueError(
                    f"alive_heads.{kind} is not {wanted} layers of {self.num_heads} heads"
                )
        return self

    def layers_of(self, kind: AttentionKind) -> int:
        """Return the number of layers with attention of this kind."""
        return self.encoder_layers if kind == "enc_self" else self.decoder_layers

    def heads_of(self, kind: AttentionKind, layer: int) -> tuple[int, ...]:
        """Which heads are built in a layer."""
        alive = self.alive_heads.get(kind)
        heads = range(self.num_heads)
        return tuple(h for h in heads if alive is None or alive[layer][h])

    def build(self, vocabulary: Vocabulary) -> "Transformer":
        """Return a Transformer with fresh weights.

        Raises:
            ValueError: `tie: all` without a joint vocabulary of ids, or with character embedding;
                character embedding of frames.
        """
        return Transformer(self, vocabulary)


# The field's sizes, with layer norm first and a norm after each stack: `norm: post` takes the
# order of Vaswani et al. 2017, whose rates need a warm-up of thousands of updates.
# Parameters with two vocabularies (tie: output) and with a joint one (tie: all):
#   size       8,000: output          all    37,000: output          all
#   tiny           2,982,208    1,958,208       10,435,208    5,699,208
#   small          9,634,624    7,586,624       24,511,624   15,039,624
#   base          52,340,544   48,244,544       82,065,544   63,121,544
#   big          192,753,472  184,561,472      252,174,472  214,286,472
PRESETS: Mapping[str, Mapping[str, object]] = {
    "transformer-tiny": {
        "d_model": 128, "d_ff": 512, "encoder_layers": 2, "decoder_layers": 2
    },
    "transformer-small": {},
    "transformer-base": {
        "d_model": 512, "d_ff": 2048, "num_heads": 8, "encoder_layers": 6, "decoder_layers": 6,
        "attention_dropout": 0.0,
    },
    "transformer-big": {
        "d_model": 1024, "d_ff": 4096, "num_heads": 16, "encoder_layers": 6, "decoder_layers": 6,
        "attention_dropout": 0.0, "dropout": 0.3,
    },
}  # fmt: skip


class Residual(nn.Module):
    """x + dropout(f(norm(x))), or norm(x + dropout(f(x))) for post-norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = build_norm(config.norm_kind, config.d_model)
        self.dropout = Dropout(config.dropout)
        self.is_pre = config.norm == "pre"

    def enter(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Return the input of the sub-layer. Real positions matter to norms over a batch only."""
        entered: Tensor = self.norm(x_BTD, real_BT) if self.is_pre else x_BTD
        return entered

    def leave(self, x_BTD: Tensor, out_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Return the residual sum with the sub-layer's output."""
        summed = x_BTD + self.dropout(out_BTD)
        left: Tensor = summed if self.is_pre else self.norm(summed, real_BT)
        return left


class FeedForward(feed_forward.FeedForward):
    """The position-wise layer with its residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config.d_model, config.d_ff, activation=config.activation, dropout=config.dropout
        )
        self.residual = Residual(config)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out_BTD = super().forward(self.residual.enter(x_BTD, real_BT))
        return self.residual.leave(x_BTD, out_BTD, real_BT)


def _attention(config: TransformerConfig, kind: AttentionKind, layer: int) -> MultiHeadAttention:
    heads = config.heads_of(kind, layer)
    head_dim = config.head_dim or config.d_model // config.num_heads
    is_cross, has_gates = kind == "dec_enc", kind in config.concrete_heads
    dropout = config.attention_dropout
    if config.values == "full":
        return MultiHeadAttention(
            config.d_model,
            len(heads),
            head_dim,
            dropout=dropout,
            is_cross=is_cross,
            has_gates=has_gates,
        )
    rank = (config.value_rank or head_dim) if config.values == "low_rank" else 0
    return ReducedValueAttention(
        config.d_model,
        ReducedValues(heads, config.num_heads, rank),
        head_dim,
        dropout=dropout,
        is_cross=is_cross,
        has_gates=has_gates,
    )


class EncoderLayer(nn.Module):
    """Self-attention over the source, then a feed-forward layer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.enc_self = _attention(config, "enc_self", layer)
        self.self_residual = Residual(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); padding is not attended to."""
        entered = self.self_residual.enter(x_BSD, real_BS)
        out = self.enc_self(entered, hidden=~real_BS[:, None, None, :])
        out_BSD: Tensor = self.feed_forward(self.self_residual.leave(x_BSD, out, real_BS), real_BS)
        return out_BSD


@dataclass
class LayerState:
    """State of one decoder layer between steps."""

    cache: Cache
    memory: tuple[Tensor, Tensor]


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, then a feed-forward layer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.dec_self = _attention(config, "dec_self", layer)
        self.self_residual = Residual(config)
        self.dec_enc = _attention(config, "dec_enc", layer)
        self.cross_residual = Residual(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None, memory: Memory) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out = self.dec_self(self.self_residual.enter(x_BTD, real_BT), is_causal=True)
        x_BTD = self.self_residual.leave(x_BTD, out, real_BT)
        entered, hidden = self.cross_residual.enter(x_BTD, real_BT), _hidden(memory)
        out = self.dec_enc(entered, memory=self.dec_enc.remember(memory.states_BSD), hidden=hidden)
        x_BTD = self.cross_residual.leave(x_BTD, out, real_BT)
        out_BTD: Tensor = self.feed_forward(x_BTD, real_BT)
        return out_BTD

    def step(self, x_B1D: Tensor, state: LayerState, hidden: Tensor) -> Tensor:
        """(B, 1, D) -> (B, 1, D); extends the layer's cache."""
        out = self.dec_self.step(self.self_residual.enter(x_B1D), cache=state.cache)
        x_B1D = self.self_residual.leave(x_B1D, out)
        entered = self.cross_residual.enter(x_B1D)
        out = self.dec_enc.step(entered, memory=state.memory, hidden=hidden)
        out_B1D: Tensor = self.feed_forward(self.cross_residual.leave(x_B1D, out))
        return out_B1D


@dataclass
class TransformerState:
    """Caches of all decoder layers; `hidden` is true on source padding."""

    position: int
    layers: list[LayerState]
    hidden_B11S: Tensor


def _hidden(memory: Memory) -> Tensor:
    """(B, 1, 1, S): true on source padding."""
    return ~memory.is_real_BS[:, None, None, :]


class Transformer(Seq2Seq):
    """Encoder and decoder stacks over embedded tokens, or over frames, with positions."""

    encoder_parts = (
        "source_embedding", "source_bias", "source_positions", "front_end", "encoder",
        "encoder_norm",
    )  # fmt: skip

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if config.tie == "all" and not vocabulary.joint:
            raise ValueError("tie: all needs a joint vocabulary; use tie: output")
        self.config = config
        d = config.d_model
        # Tables have variance 1 / d: scaled by sqrt(d), embeddings have the positions' size.
        self.scale = d**0.5 if config.rescale_emb else 1.0
        self.target_embedding = token_table(vocabulary.target, d)
        self.source_embedding = SourceEmbedding(
            vocabulary,
            d,
            config.embedding,
            scale=self.scale,
            table=self.target_embedding if config.tie == "all" else None,
        )
        self.source_bias = nn.Parameter(torch.zeros(d)) if config.inp_emb_bias else None
        self.front_end = FrontEnd(config.subsampling, d)
        kind, rows = config.positions, config.max_positions
        self.source_positions = Positions(kind, d, max_positions=rows)
        self.target_positions = Positions(kind, d, max_positions=rows)
        self.encoder = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        if config.norm == "pre":
            self.encoder_norm = build_norm(config.norm_kind, d)
            self.decoder_norm = build_norm(config.norm_kind, d)
        self.output = FullOutput(d, vocabulary.target)
        if config.tie != "none":
            self.output.weight = self.target_embedding.weight
        self.dropout = Dropout(config.dropout)

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """See Seq2Seq."""
        x_BSD = self.source_embedding(source_BS, source_lengths_B)
        if self.source_bias is not None:
            x_BSD = x_BSD + self.source_bias
        x_BSD, lengths_B = self.front_end(x_BSD, source_lengths_B)
        x_BSD = self.dropout(self.source_positions(x_BSD))
        real_BS = is_real(lengths_B, x_BSD.shape[1])
        for layer in self.encoder:
            x_BSD = layer(x_BSD, real_BS)
        if self.config.norm == "pre":
            x_BSD = self.encoder_norm(x_BSD, real_BS)
        return Memory(x_BSD, real_BS)

    def _embed_target(self, ids_BT: Tensor, first: int = 0) -> Tensor:
        x_BTD = self.target_embedding(ids_BT) * self.scale
        embedded: Tensor = self.dropout(self.target_positions(x_BTD, first))
        return embedded

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        """See Seq2Seq."""
        x_BTD = self._embed_target(inputs_BT)
        for layer in self.decoder:
            x_BTD = layer(x_BTD, is_real_BT, memory)
        return self._leave_decoder(x_BTD, is_real_BT)

    def _leave_decoder(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        if self.config.norm == "post":
            return x_BTD
        states: Tensor = self.decoder_norm(x_BTD, real_BT)
        return states

    def start(self, memory: Memory, max_length: int) -> TransformerState:
        """See Seq2Seq."""
        layers = [
            LayerState(
                layer.dec_self.new_cache(len(memory.states_BSD), max_length, memory.states_BSD),
                layer.dec_enc.remember(memory.states_BSD),
            )
            for layer in self.decoder
            if isinstance(layer, DecoderLayer)
        ]
        return TransformerState(0, layers, _hidden(memory))

    def step(self, state: TransformerState, tokens_B: Tensor) -> tuple[Tensor, TransformerState]:
        """See Seq2Seq. Caches are extended in place: the old state is used up."""
        x_B1D = self._embed_target(tokens_B[:, None], state.position)
        for layer, kept in zip(self.decoder, state.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_B1D = layer.step(x_B1D, kept, state.hidden_B11S)
        state.position += 1
        return self._leave_decoder(x_B1D)[:, 0], state

    def select(self, state: TransformerState, rows: Tensor) -> TransformerState:
        """See Seq2Seq."""
        layers = [
            LayerState(
                Cache(
                    kept.cache.keys_BHLK.index_select(0, rows),
                    kept.cache.values_BHLK.index_select(0, rows),
                    kept.cache.length,
                ),
                (kept.memory[0].index_select(0, rows), kept.memory[1].index_select(0, rows)),
            )
            for kept in state.layers
        ]
        return TransformerState(state.position, layers, state.hidden_B11S.index_select(0, rows))
