"""Gates of recurrent layers against a loop over positions that computes each of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from vinedresser.health.activations import Activations, fused_saturated, observed
from vinedresser.nn.recurrent import Recurrent

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, I, D = 5, 7, 3, 6  # noqa: E741 - features of the inputs, as everywhere


def layer(kind: type[nn.RNNBase], scale: float, **settings: bool) -> nn.RNNBase:
    torch.manual_seed(1)
    rnn = kind(I, D, **{"batch_first": True, **settings})
    with torch.no_grad():
        for p in rnn.parameters():
            p.mul_(scale)
    return rnn


@torch.no_grad()
def by_hand(rnn: nn.RNNBase, x_TI: Tensor, first: tuple[Tensor, ...]) -> Tensor:
    """(T, G) of one sentence: each gate's value, and whether it is within 0.01 of its ends."""
    of_x, of_h = rnn.weight_ih_l0, rnn.weight_hh_l0
    b_x, b_h = (rnn.bias_ih_l0, rnn.bias_hh_l0) if rnn.bias else (0, 0)
    h, c, found = first[0], first[-1], []
    for x in x_TI:
        in_x, in_h = of_x @ x + b_x, of_h @ h + b_h
        if rnn.mode == "LSTM":
            i, f, g, o = (in_x + in_h).chunk(4)
            sigmoids, tanhs = [torch.sigmoid(gate) for gate in (i, f, o)], torch.tanh(g)
            c = sigmoids[1] * c + sigmoids[0] * tanhs
            h = sigmoids[2] * torch.tanh(c)
        else:
            r, z = (
                torch.sigmoid(a + b)
                for a, b in zip(in_x.chunk(3)[:2], in_h.chunk(3)[:2], strict=True)
            )
            tanhs = torch.tanh(in_x.chunk(3)[2] + r * in_h.chunk(3)[2])
            sigmoids, h = [r, z], (1 - z) * tanhs + z * h
        ends = [(gate < 0.01) | (gate > 0.99) for gate in sigmoids]
        found.append(torch.cat([*ends, tanhs.abs() > 0.99]))
    return torch.stack(found)


def watched(rnn: nn.RNNBase, *args: object) -> tuple[int, int]:
    found = Activations()
    with observed(rnn, frozenset(), found):
        rnn(*args)
    ((place, (count, of)),) = found.saturated.items()
    assert place == "model gates"
    return int(count), int(of)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("settings", [{}, {"batch_first": False}, {"bias": False}])
def test_gates_equal_those_by_hand(kind, settings):
    rnn, x_BTI = layer(kind, 12.0, **settings), torch.randn(B, T, I)
    first_BD = tuple(torch.randn(B, D).tanh() for _ in range(2 if kind is nn.LSTM else 1))
    given = tuple(part[None] for part in first_BD)
    wanted = sum(
        int(by_hand(rnn, x_BTI[b], tuple(part[b] for part in first_BD)).sum()) for b in range(B)
    )
    G = len(rnn.weight_ih_l0)
    assert B * T * G * 0.1 < wanted < B * T * G * 0.9
    x = x_BTI if rnn.batch_first else x_BTI.transpose(0, 1)
    assert watched(rnn, x, given if kind is nn.LSTM else given[0]) == (wanted, B * T * G)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_of_a_packed_sequence_real_positions_count(kind):
    rnn, x_BTI, lengths = layer(kind, 12.0), torch.randn(B, T, I), [2, 7, 1, 4, 7]
    zeros = (torch.zeros(D), torch.zeros(D))
    wanted = sum(int(by_hand(rnn, x_BTI[b, :n], zeros).sum()) for b, n in enumerate(lengths))
    packed = pack_padded_sequence(
        x_BTI, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    assert watched(rnn, packed) == (wanted, sum(lengths) * len(rnn.weight_ih_l0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_eight_sentences_of_a_large_batch_are_enough(kind):
    rnn, x_BTI = layer(kind, 12.0), torch.randn(30, T, I)
    zeros = (torch.zeros(D), torch.zeros(D))
    wanted = sum(int(by_hand(rnn, x_TI, zeros).sum()) for x_TI in x_BTI[:8])
    assert watched(rnn, x_BTI) == (wanted, 8 * T * len(rnn.weight_ih_l0))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_crafted_weights_saturate_everything_or_nothing(kind):
    x_BTI = torch.ones(B, T, I)
    for scale, share in ((0.0, 0), (1e4, 1)):
        count, of = watched(layer(kind, scale), x_BTI)
        assert count == share * of > 0 or (share == 0 and count == 0 < of)


def test_steps_see_what_the_fused_kernel_does():
    torch.manual_seed(1)
    recurrent, x_BTI = Recurrent("lstm", I, D), torch.randn(B, T, I)
    with torch.no_grad():
        for p in recurrent.parameters():
            p.mul_(12)
    fused, stepped = Activations(), Activations()
    with observed(recurrent, frozenset(), fused):
        out_BTD = recurrent(x_BTI)
    with observed(recurrent, frozenset(), stepped):
        cell, state = recurrent.cell(), (torch.zeros(B, D), torch.zeros(B, D))
        for t, known in enumerate(cell.begin(cell.known(x_BTI.transpose(0, 1)))):
            state = cell.step(known, None, state)
            torch.testing.assert_close(state[0], out_BTD[:, t])
    assert list(fused.saturated) == ["rnn gates"]
    counts = [tuple(map(int, found.saturated[place])) for found, place in (
        (fused, "rnn gates"), (stepped, "model gates"),
    )]  # fmt: skip
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1] == B * T * 4 * D


@pytest.mark.parametrize(
    "rnn",
    [nn.LSTM(I, D, num_layers=2), nn.GRU(I, D, bidirectional=True), nn.RNN(I, D)],
    ids=["deep", "both_ways", "plain"],
)
def test_what_does_not_come_out_is_not_guessed(rnn):
    x_TBI = torch.randn(T, B, I)
    assert fused_saturated(rnn, (x_TBI,), rnn(x_TBI)) is None
