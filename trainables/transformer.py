"""Transformer (Vaswani et al. 2017) with L0 head gates (Voita et al. 2019).

B sentences, S source positions, T target positions, D features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from vinedresser.batch import PAD, is_real
from vinedresser.config import ModelConfig
from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.attention import Cache, MultiHeadAttention, linear
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.positions import sinusoids

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
    # none; output: target embedding and output layer share weights; all: the source too, which
    # needs a joint vocabulary.
    tie: Literal["none", "output", "all"] = "output"
    # Attention kinds whose heads get a trainable gate.
    concrete_heads: tuple[AttentionKind, ...] = ()
    # Kind -> layers -> 0/1 a head: only heads with 1 are built (methods.md 87).
    alive_heads: Mapping[AttentionKind, tuple[tuple[Literal[0, 1], ...], ...]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.head_dim == 0 and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd; sinusoidal positions need it even")
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
        """How many layers have attention of this kind."""
        return self.encoder_layers if kind == "enc_self" else self.decoder_layers

    def heads_of(self, kind: AttentionKind, layer: int) -> int:
        """How many heads are built in a layer."""
        alive = self.alive_heads.get(kind)
        return sum(alive[layer]) if alive is not None else self.num_heads

    def build(self, vocabulary: Vocabulary) -> "Transformer":
        """A Transformer with fresh weights.

        Raises:
            ValueError: `tie: all` without a joint vocabulary.
        """
        return Transformer(self, vocabulary)


_SMALL = {"d_model": 32, "d_ff": 64, "encoder_layers": 2, "decoder_layers": 2}

# Forms that the conformance suite tries besides the defaults: name -> overrides.
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "pre": _SMALL,
    "post": {**_SMALL, "norm": "post"},
    "untied": {**_SMALL, "tie": "none", "num_heads": 2, "head_dim": 10},
    "all_tied": {**_SMALL, "tie": "all"},
    "gated": {**_SMALL, "concrete_heads": ["enc_self", "dec_self", "dec_enc"]},
    "pruned": {
        **_SMALL,
        "norm": "post",
        "alive_heads": {
            "enc_self": [[0, 0, 0, 0], [1, 0, 1, 1]],
            "dec_self": [[0, 1, 0, 0], [0, 0, 0, 0]],
            "dec_enc": [[1, 1, 1, 1], [0, 0, 0, 1]],
        },
    },
    "pruned_pre": {**_SMALL, "alive_heads": {"dec_self": [[0, 0, 0, 0], [0, 1, 1, 0]]}},
}


class Residual(nn.Module):
    """x + dropout(f(norm(x))), or norm(x + dropout(f(x))) for post-norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)
        self.is_pre = config.norm == "pre"

    def enter(self, x_BTD: Tensor) -> Tensor:
        """What the sub-layer is given."""
        entered: Tensor = self.norm(x_BTD) if self.is_pre else x_BTD
        return entered

    def leave(self, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
        """What the sub-layer's output becomes."""
        summed = x_BTD + self.dropout(out_BTD)
        left: Tensor = summed if self.is_pre else self.norm(summed)
        return left


class FeedForward(nn.Module):
    """relu(x W1 + b1) W2 + b2 at every position, with its residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.inner = linear(config.d_model, config.d_ff)
        self.outer = linear(config.d_ff, config.d_model)
        self.dropout = Dropout(config.dropout)
        self.residual = Residual(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner = self.dropout(F.relu(self.inner(self.residual.enter(x_BTD))))
        return self.residual.leave(x_BTD, self.outer(inner))


def _attention(config: TransformerConfig, kind: AttentionKind, layer: int) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model,
        config.heads_of(kind, layer),
        config.head_dim or config.d_model // config.num_heads,
        dropout=config.attention_dropout,
        is_cross=kind == "dec_enc",
        has_gates=kind in config.concrete_heads,
    )


class EncoderLayer(nn.Module):
    """Self-attention over the source, then a feed-forward layer."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.enc_self = _attention(config, "enc_self", layer)
        self.self_residual = Residual(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        out = self.enc_self(self.self_residual.enter(x_BSD), hidden=hidden)
        out_BSD: Tensor = self.feed_forward(self.self_residual.leave(x_BSD, out))
        return out_BSD


@dataclass
class LayerState:
    """What one decoder layer keeps between steps."""

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

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out = self.dec_self(self.self_residual.enter(x_BTD), is_causal=True)
        x_BTD = self.self_residual.leave(x_BTD, out)
        memory = self.dec_enc.remember(memory_BSD)
        out = self.dec_enc(self.cross_residual.enter(x_BTD), memory=memory, hidden=hidden)
        out_BTD: Tensor = self.feed_forward(self.cross_residual.leave(x_BTD, out))
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


class Transformer(Seq2Seq):
    """Encoder and decoder stacks over embedded tokens with sinusoidal positions."""

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if config.tie == "all" and not vocabulary.joint:
            raise ValueError("tie: all needs a joint vocabulary; use tie: output")
        self.config = config
        d = config.d_model
        self.target_embedding = _embedding(vocabulary.target, d)
        self.source_embedding = (
            self.target_embedding if config.tie == "all" else _embedding(vocabulary.source, d)
        )
        self.encoder = nn.ModuleList(EncoderLayer(config, i) for i in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config, i) for i in range(config.decoder_layers))
        is_pre = config.norm == "pre"
        self.encoder_norm = nn.LayerNorm(d) if is_pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(d) if is_pre else nn.Identity()
        self.output = linear(d, vocabulary.target)
        if config.tie != "none":
            self.output.weight = self.target_embedding.weight
        self.dropout = Dropout(config.dropout)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(256, d), persistent=False)

    def _embed(self, embedding: nn.Embedding, ids_BT: Tensor, first: int = 0) -> Tensor:
        end = first + ids_BT.shape[1]
        if end > len(self.positions):
            longer = sinusoids(2 * end, self.config.d_model)
            self.positions = longer.to(self.positions.device)
        scaled = embedding(ids_BT) * self.config.d_model**0.5
        embedded: Tensor = self.dropout(scaled + self.positions[first:end])
        return embedded

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """See Seq2Seq."""
        mask_BS = is_real(source_lengths_B, source_BS.shape[1])
        x_BSD = self._embed(self.source_embedding, source_BS)
        hidden = ~mask_BS[:, None, None, :]
        for layer in self.encoder:
            x_BSD = layer(x_BSD, hidden)
        return Memory(self.encoder_norm(x_BSD), mask_BS)

    def decode(self, memory: Memory, inputs_BT: Tensor) -> Tensor:
        """See Seq2Seq."""
        x_BTD = self._embed(self.target_embedding, inputs_BT)
        hidden = ~memory.is_real_BS[:, None, None, :]
        for layer in self.decoder:
            x_BTD = layer(x_BTD, memory.states_BSD, hidden)
        states: Tensor = self.decoder_norm(x_BTD)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """See Seq2Seq."""
        scores: Tensor = self.output(states)
        return scores

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
        return TransformerState(0, layers, ~memory.is_real_BS[:, None, None, :])

    def step(self, state: TransformerState, tokens_B: Tensor) -> tuple[Tensor, TransformerState]:
        """See Seq2Seq. Caches are extended in place: the old state is used up."""
        x_B1D = self._embed(self.target_embedding, tokens_B[:, None], state.position)
        for layer, kept in zip(self.decoder, state.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_B1D = layer.step(x_B1D, kept, state.hidden_B11S)
        state.position += 1
        return self.logits(self.decoder_norm(x_B1D))[:, 0], state

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


def _embedding(size: int, features: int) -> nn.Embedding:
    embedding = nn.Embedding(size, features, padding_idx=PAD)
    nn.init.normal_(embedding.weight, std=features**-0.5)
    with torch.no_grad():
        embedding.weight[PAD].zero_()
    return embedding
