"""Recurrent encoder and decoder with attention (Bahdanau et al. 2015; Luong et al. 2015).

With order `luong` the new state attends: h_t = f(h_{t-1}, e_t), c_t = attend(h_t), and the output
comes from the attentional state a_t = tanh(W [h_t; c_t]). With `input_feeding` the cell reads
[e_t; a_{t-1}] instead of e_t. With order `bahdanau` the previous state attends and the context
enters the cell: c_t = attend(h_{t-1}), h_t = f(h_{t-1}, [e_t; c_t]) (methods.md 40); its output is
tanh(W [h_t; c_t]) too, where the paper has a maxout layer.

Only `luong` without input feeding has all inputs of its cells beforehand: it runs the whole
sequence through the fused kernel and attends once for all positions. The other two take a step a
token.

B sentences, S source positions, T target positions, D features, M features of an encoder state,
V vocabulary, G features of a cell's gates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vinedresser.model import Memory, Seq2Seq, Vocabulary
from vinedresser.nn.attention import linear
from vinedresser.nn.dropout import Dropout
from vinedresser.nn.embedding import SourceEmbedding, SourceEmbeddingConfig, token_table
from vinedresser.nn.output import FullOutput
from vinedresser.nn.recurrent import (
    Cell,
    Known,
    Recurrent,
    RecurrentConfig,
    RecurrentEncoder,
    RecurrentState,
    check_pyramid,
)
from vinedresser.nn.scores import Attention, EncodedSource, ScoreKind, check_widths
from vinedresser.nn.steps import Product
from vinedresser.nn.subsampling import SubsamplingConfig


class AttentionRnnConfig(RecurrentConfig):
    """The defaults are Luong's model without input feeding: the fastest to train."""

    score: ScoreKind = "general"
    order: Literal["luong", "bahdanau"] = "luong"
    # luong only: the cell reads the previous attentional state too.
    input_feeding: bool = False
    # Of embeddings, between layers, and of what the output layer reads.
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # output: target embedding and output layer share weights.
    tie: Literal["none", "output"] = "output"
    embedding: SourceEmbeddingConfig = SourceEmbeddingConfig()
    # Reductions between the encoder's layers.
    subsampling: SubsamplingConfig = SubsamplingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_widths(self.score, self.width, self.encoder_units * (1 + self.bidirectional))
        check_pyramid(self.encoder_layers, self.subsampling)
        if self.order == "bahdanau" and self.input_feeding:
            raise ValueError(
                "order bahdanau feeds the context into the cell already; input_feeding belongs to "
                "order luong. Fix: input_feeding false or order luong"
            )
        return self

    def build(self, vocabulary: Vocabulary) -> "AttentionRnn":
        """Return a model with fresh weights."""
        return AttentionRnn(self, vocabulary)


# The size that the benchmarks compare; and Listen, Attend and Spell (Chan et al. 2016): a
# layer, three more each after a reduction by 2 (concatenation), so 8 frames per state. Its
# speller is half as wide, scores additively and attends with the previous state.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "rnn-small": {"input_feeding": True},
    "listener": {
        "encoder_layers": 4,
        "decoder_layers": 2,
        "score": "additive",
        "order": "bahdanau",
        "subsampling": {"kind": "concat", "factor": 2, "layers": 3},
    },
}


@dataclass(frozen=True)
class Weights:
    """Constants of all steps, laid out for stepwise use.

    Attributes:
        source: keys and values of the encoded source.
        cells: of each layer.
        of_state: W_h of the attentional state tanh(W_h h + W_c c + b).
        of_context: W_c of it, in order `bahdanau`; else the source's values carry it.
    """

    source: EncodedSource
    cells: list[Cell]
    of_state: Product
    of_context: Product


@dataclass(frozen=True)
class AttentionRnnState:
    """Between two steps.

    Attributes:
        weights: of every step.
        layers: state of each layer.
        attentional_BD: a_t, what the output layer reads; zeros before the first step.
    """

    weights: Weights
    layers: list[RecurrentState]
    attentional_BD: Tensor


@dataclass(frozen=True)
class Step:
    """Terms of a step that are computed before it; each sum begins with them.

    Attributes:
        gates: of each layer.
        scores_BS: -inf on source padding, else 0.
        context_BM: zeros.
        attentional_BD: the bias.
    """

    gates: tuple[Known, ...]
    scores_BS: Tensor
    context_BM: Tensor
    attentional_BD: Tensor


class AttentionRnn(Seq2Seq):
    """A recurrent encoder, perhaps pyramidal, and a recurrent decoder that attends to it."""

    encoder_parts = ("source_embedding", "encoder")
    is_recurrent = True

    def __init__(self, config: AttentionRnnConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        D = config.width
        # Vectors drawn with variance 1 / D enter with 1 / sqrt(D). Brought to 1, five of five small
        # forms memorised 63 sequences instead of reversing them; left at 1 / D, Multi30k
        # stood at 6.1 nats per token after 40 updates, with variance 1 at 5.7.
        self.scale = D**0.25
        self.source_embedding = SourceEmbedding(vocabulary, D, config.embedding, scale=self.scale)
        self.target_embedding = token_table(vocabulary.target, D)
        self.dropout = Dropout(config.dropout)
        self.encoder = RecurrentEncoder(
            config.stack(config.encoder_units, config.encoder_layers, config.dropout),
            D,
            bidirectional=config.bidirectional,
            subsampling=config.subsampling,
        )
        M, stack = self.encoder.width, config.stack(D, config.decoder_layers, config.dropout)
        # Input of the first cell in addition to the token: context, attentional state, nothing.
        self.is_bahdanau = config.order == "bahdanau"
        self.num_fed = M if self.is_bahdanau else D * config.input_feeding
        self.decoder = nn.ModuleList(
            Recurrent(config.cell, D + (self.num_fed if i == 0 else 0), D)
            for i in range(config.decoder_layers)
        )
        self.norms = nn.ModuleList(stack.norm(D) for _ in self.decoder)
        # h (and c) of every decoder layer from the encoder's last outputs.
        self.bridge = linear(M, config.decoder_layers * D * (2 if config.cell == "lstm" else 1))
        self.attend = Attention(config.score, D, M)
        # W [h; c] in two halves; the right one is applied to the memory, once a source.
        self.from_state = linear(D, D)
        self.from_context = nn.Linear(M, D, bias=False)
        nn.init.xavier_uniform_(self.from_context.weight)
        self.output = FullOutput(D, vocabulary.target)
        if config.tie == "output":
            self.output.weight = self.target_embedding.weight

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        """See Seq2Seq. A pyramid's memory has fewer positions than the source."""
        x_BSD = self.dropout(self.source_embedding(source_BS, source_lengths_B))
        return Memory(*self.encoder(x_BSD, source_lengths_B))

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        """See Seq2Seq."""
        if self.num_fed == 0:
            return self._whole(memory, self._embed(inputs_BT))
        state = self.start(memory, inputs_BT.shape[1])
        found = []
        # Steps first: each takes a slice without a gap.
        for step in self._steps(state.weights, self._embed(inputs_BT.t())):
            state = self._advance(state, step)
            found.append(state.attentional_BD)
        states_BTD: Tensor = self.dropout(torch.stack(found, 1))
        return states_BTD

    def start(self, memory: Memory, max_length: int) -> AttentionRnnState:
        """See Seq2Seq."""
        source, layers = self._remember(memory), self._first(memory)
        cells = [
            layer.cell(self.num_fed if i == 0 else self.config.width)
            for i, layer in enumerate(self.decoder)
            if isinstance(layer, Recurrent)
        ]
        dtype = source.keys_BSK.dtype
        of_state, of_context = (
            Product(layer.weight.to(dtype)) for layer in (self.from_state, self.from_context)
        )
        weights = Weights(source, cells, of_state, of_context)
        return AttentionRnnState(weights, layers, torch.zeros_like(layers[0][0]))

    def step(self, state: AttentionRnnState, tokens_B: Tensor) -> tuple[Tensor, AttentionRnnState]:
        """See Seq2Seq."""
        (step,) = self._steps(state.weights, self._embed(tokens_B[None]))
        state = self._advance(state, step)
        return self.dropout(state.attentional_BD), state

    def select(self, state: AttentionRnnState, rows: Tensor) -> AttentionRnnState:
        """See Seq2Seq."""
        weights = replace(state.weights, source=state.weights.source.select(rows))
        layers = [tuple(part.index_select(0, rows) for part in layer) for layer in state.layers]
        return AttentionRnnState(weights, layers, state.attentional_BD.index_select(0, rows))

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.target_embedding(ids) * self.scale)
        return embedded

    def _remember(self, memory: Memory) -> EncodedSource:
        """Keys and values: the memory's states in order `bahdanau`, else their half of W [h; c]."""
        states_BSM = memory.states_BSD
        values = states_BSM if self.is_bahdanau else self.from_context(states_BSM)
        return self.attend.remember(states_BSM, values, memory.is_real_BS)

    def _first(self, memory: Memory) -> list[RecurrentState]:
        """Return the state of each decoder layer before the first step: tanh(W last + b)."""
        last_BM = self.encoder.last(memory.states_BSD, memory.is_real_BS)
        num_parts = 2 if self.config.cell == "lstm" else 1
        parts = torch.split(torch.tanh(self.bridge(last_BM)), self.config.width, -1)
        return [tuple(parts[i : i + num_parts]) for i in range(0, len(parts), num_parts)]

    def _whole(self, memory: Memory, x_BTD: Tensor) -> Tensor:
        """Return decoder states (B, T, D) of a model that feeds nothing back."""
        source = self._remember(memory)
        for i, (layer, state) in enumerate(zip(self.decoder, self._first(memory), strict=True)):
            x_BTD = self.norms[i](layer(self.dropout(x_BTD) if i else x_BTD, state))
        context_BTD = self.attend(x_BTD, source)
        states_BTD: Tensor = self.dropout(torch.tanh(self.from_state(x_BTD) + context_BTD))
        return states_BTD

    def _steps(self, weights: Weights, x_TBD: Tensor) -> list[Step]:
        """Exactly the steps that are to be taken next, in order, from the embedded tokens."""
        T, B, _ = x_TBD.shape
        # Upper layers are fed all their inputs: nothing of them is known beforehand.
        known_of = [x_TBD] + [x_TBD[..., :0]] * (len(weights.cells) - 1)
        gates = [cell.begin(cell.known(x)) for cell, x in zip(weights.cells, known_of, strict=True)]
        source = weights.source
        context_TBM = source.values_BSM.new_zeros(1).expand(T, B, source.values_BSM.shape[-1])
        bias_D = self.from_state.bias.to(source.values_BSM.dtype)
        attentional_TBD = weights.of_state.begin(bias_D.expand(T, B, -1))
        if self.is_bahdanau:
            attentional_TBD = weights.of_context.begin(attentional_TBD)
            context_TBM = source.by_values.begin(context_TBM)
        else:
            attentional_TBD = source.by_values.begin(attentional_TBD)
        scores_TBS = self.attend.begin(source, T)
        rest = (scores_TBS.unbind(0), context_TBM.unbind(0), attentional_TBD.unbind(0))
        return [Step(*parts) for parts in zip(zip(*gates, strict=True), *rest, strict=True)]

    def _advance(self, state: AttentionRnnState, step: Step) -> AttentionRnnState:
        weights, layers = state.weights, list[RecurrentState]()
        fed_BF = state.attentional_BD if self.config.input_feeding else None
        if self.is_bahdanau:
            top_BD = self.norms[-1](state.layers[-1][0])
            fed_BF = self.attend.step(top_BD, weights.source, step.scores_BS, step.context_BM)
        context_BF = fed_BF
        for i, (cell, norm) in enumerate(zip(weights.cells, self.norms, strict=True)):
            layers.append(cell.step(step.gates[i], fed_BF, state.layers[i]))
            h_BD: Tensor = norm(layers[i][0])
            fed_BF = self.dropout(h_BD)
        sum_BD = weights.of_state(step.attentional_BD, h_BD)
        if context_BF is not None and self.is_bahdanau:
            sum_BD = weights.of_context(sum_BD, context_BF)
        else:
            sum_BD = self.attend.step(h_BD, weights.source, step.scores_BS, sum_BD)
        return AttentionRnnState(weights, layers, torch.tanh(sum_BD))
