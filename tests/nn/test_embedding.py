"""Source embeddings: every position by hand, nothing from padding (methods.md 29, 58, 61)."""

import pytest
import torch
import torch.nn.functional as F

from vinedresser.model import Vocabulary
from vinedresser.nn.embedding import (
    CharacterConvolution,
    Highway,
    SourceEmbedding,
    SourceEmbeddingConfig,
    token_table,
)
from vinedresser.special_ids import PAD

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

D = 64
CHARACTERS = SourceEmbeddingConfig(
    kind="characters", character_features=12, widths=(1, 2, 3, 4, 7), filters=8
)
IDS, FRAMES = Vocabulary(50, 50), Vocabulary(0, 50, features=20)


def source_of(vocabulary: Vocabulary, *shape: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    if vocabulary.features:
        return torch.randn(*shape, vocabulary.features, generator=draw)
    return torch.randint(4, vocabulary.source, shape, generator=draw)


@pytest.fixture(params=["table", "characters", "frames"])
def case(request) -> tuple[SourceEmbedding, Vocabulary]:
    torch.manual_seed(0)
    vocabulary = FRAMES if request.param == "frames" else IDS
    config = CHARACTERS if request.param == "characters" else None
    return SourceEmbedding(vocabulary, D, config), vocabulary


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_as_many_positions_come_out(case, T):
    embed, vocabulary = case
    found = embed(source_of(vocabulary, 3, T), torch.tensor([T, 1, T]))
    assert found.shape == (3, T, D)


@torch.no_grad()
def test_batch_mates_and_padding_change_nothing(case):
    embed, vocabulary = case
    source, lengths = source_of(vocabulary, 3, 9), [9, 4, 1]
    found = embed(source, torch.tensor(lengths))
    for i, T in enumerate(lengths):
        alone = embed(source[i : i + 1, :T], torch.tensor([T]))
        torch.testing.assert_close(found[i, :T], alone[0], atol=1e-6, rtol=0)
    padding = torch.arange(9) >= torch.tensor(lengths)[:, None]
    source[padding] = 7
    refilled = embed(source, torch.tensor(lengths))
    torch.testing.assert_close(refilled[~padding], found[~padding], atol=1e-6, rtol=0)
    if vocabulary.features:  # not even numbers that are none
        source[padding] = float("nan")
        assert embed(source, torch.tensor(lengths)).isfinite().all()


def test_gradients_reach_every_parameter(case):
    embed, vocabulary = case
    embed(source_of(vocabulary, 3, 9), torch.tensor([9, 4, 1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in embed.parameters())


@pytest.mark.parametrize("scale", [1.0, D**0.5])
@torch.no_grad()
def test_a_fresh_vector_is_about_as_long_as_the_scale(scale):
    torch.manual_seed(0)
    for vocabulary, config in ((IDS, None), (FRAMES, None), (IDS, CHARACTERS)):
        embed = SourceEmbedding(vocabulary, D, config, scale=scale)
        found = embed(source_of(vocabulary, 8, 30), torch.full((8,), 30))
        assert 0.5 * scale < float(found.norm(dim=-1).mean()) < 1.5 * scale


def test_table_is_scaled_and_padding_is_zero():
    embed = SourceEmbedding(IDS, D, scale=3.0)
    ids = torch.tensor([[5, 6, PAD]])
    found = embed(ids, torch.tensor([2]))
    torch.testing.assert_close(found, 3 * embed.table.weight[ids])
    assert not found[0, 2].any()


def test_a_tied_table_is_the_same_object():
    table = token_table(50, D)
    assert SourceEmbedding(IDS, D, table=table).table is table


@torch.no_grad()
def test_characters_by_hand():
    torch.manual_seed(0)
    embed = CharacterConvolution(50, D, CHARACTERS, scale=1.0)
    ids = source_of(IDS, 1, 6)
    x_SC = embed.table(ids)[0]
    positions = []
    for t in range(6):
        found = []
        for k, layer in zip((1, 2, 3, 4, 7), embed.filters, strict=True):
            first = t - (k - 1) // 2
            seen = [x_SC[i] if 0 <= i < 6 else torch.zeros(12) for i in range(first, first + k)]
            found.append(F.relu(layer(torch.cat(seen))))
        positions.append(embed.project(embed.highways(torch.cat(found))))
    wanted = torch.stack(positions)
    torch.testing.assert_close(embed(ids, torch.tensor([6]))[0], wanted, atol=1e-6, rtol=0)


@torch.no_grad()
def test_highway_by_hand_starts_near_the_identity():
    torch.manual_seed(0)
    layer, x = Highway(16), torch.randn(5, 16)
    share = torch.sigmoid(layer.gate(x))
    wanted = share * F.relu(layer.transform(x)) + (1 - share) * x
    torch.testing.assert_close(layer(x), wanted)
    assert float(share.mean()) < 0.25  # sigmoid(-2) = .12


def test_characters_and_ties_need_ids():
    with pytest.raises(ValueError, match="the source is frames; Fix: set embedding"):
        SourceEmbedding(FRAMES, D, CHARACTERS)
    with pytest.raises(ValueError, match="the table is tied"):
        SourceEmbedding(IDS, D, CHARACTERS, table=token_table(50, D))
    with pytest.raises(ValueError, match="no table to tie; Fix: set tie: output"):
        SourceEmbedding(FRAMES, D, table=token_table(50, D))
