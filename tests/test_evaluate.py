"""What a right source is worth: closed forms, blind models, nobody keeps his own."""

import math

import pytest
import torch
from torch import Tensor

from tests.batches import pad_ids
from trainables.transformer import Transformer, TransformerConfig
from vinedresser.batch import Batch
from vinedresser.decode import forced
from vinedresser.evaluate import conditioning_gap, with_other_sources
from vinedresser.model import Memory, Vocabulary
from vinedresser.nn.output import Output
from vinedresser.objective import target_nll
from vinedresser.special_ids import EOS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = TransformerConfig(d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1)


class _Said(Output):
    """The first number of a state with probability 0.9."""

    def log_probs(self, states: Tensor) -> Tensor:
        is_said = torch.arange(10) == states[..., :1].long()
        return torch.where(is_said, math.log(0.9), math.log(1 / 90))


class _Copier(Transformer):
    """Says a source's first id with probability 0.9, and each of nine other ids with 1 / 90."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        ids_B1D = source_BS[:, :1, None].expand(-1, -1, 16).float()
        return Memory(ids_B1D, torch.ones(len(source_BS), 1, dtype=torch.bool))

    def decode(self, memory: Memory, inputs_BT: Tensor, is_real_BT: Tensor | None = None) -> Tensor:
        return memory.states_BSD.expand(-1, inputs_BT.shape[1], -1)

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        self.output = _Said()


class _Deaf(Transformer):
    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        memory = super().encode(source_BS, source_lengths_B)
        return Memory(memory.states_BSD * 0, torch.ones_like(memory.is_real_BS))


def batch_of(source: list[list[int]], target: list[list[int]]) -> Batch:
    return Batch(*pad_ids(source), *pad_ids(target), torch.arange(len(source)))


def built(kind: type[Transformer]) -> Transformer:
    torch.manual_seed(0)
    return kind(SMALL, Vocabulary(10, 10))


def test_gap_and_error_in_closed_form():
    # Each token of a sentence is its source's first id: the right one costs -ln 0.9, any other
    # ln 90, so that a sentence of n tokens differs by n ln 81 and the error is 0.
    rows = [([4], [4]), ([5], [5, 5, 5]), ([6], [6, 6]), ([7], [7])]
    batch = batch_of([s for s, _ in rows], [t for _, t in rows])
    found = conditioning_gap(built(_Copier), [batch])
    assert found.gap == pytest.approx(math.log(81), rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-6)
    assert found.true_loss == pytest.approx(-math.log(0.9), rel=1e-5)
    assert found.sentences == 4
    # One sentence in two keeps its meaning: gaps of 0 and 2 ln 81 over 2 tokens each.
    same = batch_of([[4], [4], [4], [5]], [[4, 4], [4, 4], [4, 4], [5, 5]])
    found = conditioning_gap(built(_Copier), [same])  # rows 1 and 3 change sources
    assert found.gap == pytest.approx(math.log(81) / 2, rel=1e-6)
    # Deviations are +-ln 81 a sentence: sqrt(4 (ln 81)^2 * 4 / 3) / 8 tokens.
    assert found.error == pytest.approx(math.log(81) * math.sqrt(16 / 3) / 8, rel=1e-5)
    assert found.deviations == pytest.approx(found.gap / found.error)


def test_batches_weigh_by_their_tokens():
    one = batch_of([[4], [5]], [[4] * 6, [5] * 6])
    other = batch_of([[4], [4]], [[4], [4]])  # of equal sources: no gap
    found = conditioning_gap(built(_Copier), [one, other])
    assert found.gap == pytest.approx(math.log(81) * 12 / 14, rel=1e-6)


def test_a_deaf_model_has_no_gap_at_all():
    sources = [[4, 5, EOS], [6, EOS], [7, 8, 9, EOS], [5, EOS]]
    batch = batch_of(sources, [s[::-1] for s in sources])
    model = built(_Deaf).train()
    found = conditioning_gap(model, [batch])
    assert found.gap == pytest.approx(0, abs=1e-6)
    assert model.training  # as it was
    assert conditioning_gap(built(Transformer), [batch]).gap != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_nobody_keeps_his_own_source(count):
    rows = [[4 + i, *[4] * (i % 3), EOS] for i in range(count)]
    batch = batch_of(rows, rows)
    other = with_other_sources(batch)
    assert not (other.source_BS[:, 0] == batch.source_BS[:, 0]).any()
    assert sorted(other.source_BS[:, 0].tolist()) == sorted(batch.source_BS[:, 0].tolist())
    # A source travels with its length.
    for source, length in zip(other.source_BS, other.source_lengths_B, strict=True):
        assert source[length - 1] == EOS
        assert not source[length:].any()
    assert torch.equal(other.target_BT, batch.target_BT)


def test_single_sentences_have_nobody_to_change_with():
    alone = batch_of([[4, EOS]], [[4, EOS]])
    with pytest.raises(ValueError, match="2 sentences"):
        conditioning_gap(built(Transformer), [alone])


@torch.no_grad()
def test_sentences_sum_up_to_the_loss():
    batch = batch_of([[4, EOS], [5, 6, EOS]], [[6, 7, 8, EOS], [EOS]])
    model = built(Transformer).eval()
    found_B = forced(model, batch)
    assert float(found_B.sum()) == pytest.approx(
        float(target_nll(model, model(batch), batch).total)
    )
    alone = batch_of([[5, 6, EOS]], [[EOS]])
    assert float(found_B[1]) == pytest.approx(float(forced(model, alone)), rel=1e-5)
