"""Recurrent layers and encoders (methods.md 25, 26, 46)."""

import pytest
import torch
from torch import Tensor, nn

from vinedresser.nn.recurrent import Layer, Recurrent, RecurrentEncoder, Stack, turned
from vinedresser.nn.subsampling import SubsamplingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

B, S, INPUTS, D = 3, 7, 5, 4
LENGTHS = torch.tensor([7, 3, 1])
NONE = SubsamplingConfig()


def stack(**changes) -> Stack:
    plain = {"cell": "lstm", "units": D, "layers": 1, "layer_norm": False, "dropout": 0.0}
    return Stack(**{**plain, **changes})


def layer(cell: str = "lstm", inputs: int = INPUTS, units: int = D) -> Recurrent:
    torch.manual_seed(0)
    made = Recurrent(cell, inputs, units)
    for parameter in made.parameters():  # biases that matter
        nn.init.normal_(parameter, std=0.5)
    return made


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def source() -> Tensor:
    return torch.randn(B, S, INPUTS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("units", [4, 256])
def test_an_lstm_has_four_thirds_of_the_parameters_of_a_gru(units):
    lstm, gru = (count(Recurrent(cell, INPUTS, units)) for cell in ("lstm", "gru"))
    assert 3 * lstm == 4 * gru
    assert lstm == 4 * units * (INPUTS + units + 2)
    for direction in (False, True):
        sizes = [
            count(RecurrentEncoder(
                stack(cell=cell, units=units, layers=2), INPUTS,
                bidirectional=direction, subsampling=NONE,
            ))
            for cell in ("lstm", "gru")
        ]  # fmt: skip
        assert 3 * sizes[0] == 4 * sizes[1]


def test_forget_gates_start_open():
    made = Recurrent("lstm", INPUTS, D)
    _, _, bias, inner = made.parameters()
    assert (bias + inner).tolist() == [0] * D + [1] * D + [0] * 2 * D
    _, _, bias, inner = Recurrent("gru", INPUTS, D).parameters()
    assert not (bias + inner).any()


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_one_step_is_the_textbook_cell(cell):
    made = layer(cell)
    W, U, b, c = made.parameters()
    x, h = source()[:, 0], source()[:, 1, :D]
    if cell == "lstm":
        memory = source()[:, 2, :D]
        i, f, g, o = (x @ W.t() + h @ U.t() + b + c).chunk(4, 1)
        new = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        wanted = (o.sigmoid() * new.tanh(), new)
        state = (h, memory)
    else:
        r, z, n = (x @ W.t() + b).chunk(3, 1)
        of_r, of_z, of_n = (h @ U.t() + c).chunk(3, 1)
        r, z = (r + of_r).sigmoid(), (z + of_z).sigmoid()
        wanted = ((1 - z) * torch.tanh(n + r * of_n) + z * h,)
        state = (h,)
    steps = made.cell()
    for found, right in zip(steps.step(steps.known(x), None, state), wanted, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("fed", [0, 2, INPUTS], ids=lambda n: f"fed {n}")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_steps_equal_the_fused_kernel_gradients_included(cell, fed):
    made, x_BSI = layer(cell), source().requires_grad_()
    first = tuple(
        torch.full((B, D), 0.3 * (i + 1), requires_grad=True)
        for i in range(2 if cell == "lstm" else 1)
    )
    weights = torch.arange(1.0, 1 + B * S * D).view(B, S, D).sin()
    wanted = made(x_BSI, first)
    steps, state, outs = made.cell(fed), first, []
    known = steps.begin(steps.known(x_BSI.transpose(0, 1)[..., : INPUTS - fed]))
    for t in range(S):
        state = steps.step(known[t], x_BSI[:, t, INPUTS - fed :] if fed else None, state)
        outs.append(state[0])
    found = torch.stack(outs, 1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    leaves = [x_BSI, *first, *made.parameters()]
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_bf16_steps_keep_the_cell_state_in_fp32(cell):
    made, x = layer(cell), source()
    with torch.autocast("cpu", torch.bfloat16):
        steps = made.cell()
        state = steps.step(steps.known(x[:, 0]), None, (torch.zeros(B, D),) * 2)
    assert state[0].dtype == torch.bfloat16
    assert cell == "gru" or state[1].dtype == torch.float32
    torch.testing.assert_close(state[0].float(), made(x)[:, 0], atol=0.02, rtol=0)


def test_turned_reverses_what_is_real_and_is_its_own_inverse():
    x_BS1 = torch.arange(B * S, dtype=torch.float32).view(B, S, 1)
    once = turned(x_BS1, LENGTHS)
    assert once[0, :, 0].tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert once[1, :, 0].tolist() == [9, 8, 7, 10, 11, 12, 13]
    assert torch.equal(once[2], x_BS1[2])
    assert torch.equal(turned(once, LENGTHS), x_BS1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@torch.no_grad()
def test_two_directions_equal_torchs_own_on_packed_sequences(cell):
    torch.manual_seed(0)
    made = Layer(stack(cell=cell), INPUTS, bidirectional=True)
    peer = (nn.LSTM if cell == "lstm" else nn.GRU)(INPUTS, D, batch_first=True, bidirectional=True)
    pairs = zip(peer.parameters(), [*made.ahead.parameters(), *made.back.parameters()], strict=True)
    for target, ours in pairs:
        nn.init.normal_(ours, std=0.4)
        target.copy_(ours)
    packed = nn.utils.rnn.pack_padded_sequence(source(), LENGTHS, batch_first=True)
    out, last = peer(packed)
    wanted, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
    real = torch.arange(S) < LENGTHS[:, None]
    torch.testing.assert_close(made(source(), LENGTHS)[real], wanted[real])
    found, state = made.last(source(), LENGTHS)
    torch.testing.assert_close(found[real], wanted[real])
    parts = last if cell == "lstm" else (last,)
    for ours, theirs in zip(state, parts, strict=True):
        torch.testing.assert_close(ours, torch.cat([theirs[0], theirs[1]], -1))


def encoder(**changes) -> RecurrentEncoder:
    torch.manual_seed(0)
    settings = {"bidirectional": True, "subsampling": NONE, **changes}
    bidirectional, subsampling = settings.pop("bidirectional"), settings.pop("subsampling")
    return RecurrentEncoder(
        stack(**settings), INPUTS, bidirectional=bidirectional, subsampling=subsampling
    ).eval()


PYRAMIDS = {
    "none": NONE,
    **{kind: SubsamplingConfig(kind=kind) for kind in ("conv", "pool", "concat")},
}


@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "two ways"])
@torch.no_grad()
def test_batch_mates_and_padding_change_nothing(kind, bidirectional):
    made = encoder(layers=3, bidirectional=bidirectional, subsampling=PYRAMIDS[kind])
    x_BSI = source()
    together, is_real_BU = made(x_BSI, LENGTHS)
    x_BSI[torch.arange(S) >= LENGTHS[:, None]] = 9.0
    filled, _ = made(x_BSI, LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        alone, is_real = made(source()[i : i + 1, :length], LENGTHS[i : i + 1])
        assert is_real.all()
        assert is_real_BU[i].sum() == alone.shape[1]
        for found in (together, filled):
            torch.testing.assert_close(found[i, : alone.shape[1]], alone[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(
            made.last(filled, is_real_BU)[i], made.last(alone, is_real)[0], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("kind", ["conv", "pool", "concat"])
@pytest.mark.parametrize(("frames", "left"), [(100, 25), (101, 26), (1, 1), (2, 1)])
@torch.no_grad()
def test_two_reductions_leave_a_quarter(kind, frames, left):
    made = encoder(layers=3, subsampling=PYRAMIDS[kind])
    states, is_real = made(torch.randn(1, frames, INPUTS), torch.tensor([frames]))
    assert states.shape == (1, left, 2 * D)
    assert is_real.shape == (1, left)
    assert is_real.all()


def test_the_pyramid_of_listen_attend_and_spell_reads_two_states_side_by_side():
    made = encoder(layers=3, subsampling=PYRAMIDS["concat"])
    widths = [part.ahead.rnn.input_size for part in made.layers]
    assert widths == [INPUTS, 2 * 2 * D, 2 * 2 * D]
    torch.manual_seed(0)
    x_BSI, lengths = torch.randn(1, 8, INPUTS), torch.tensor([8])
    bottom, first, second = made.layers
    with torch.no_grad():
        h = bottom(x_BSI, lengths)
        h = first(torch.cat([h[:, 0::2], h[:, 1::2]], -1), torch.tensor([4]))
        h = second(torch.cat([h[:, 0::2], h[:, 1::2]], -1), torch.tensor([2]))
        torch.testing.assert_close(made(x_BSI, lengths)[0], h)


def test_reductions_stand_between_layers():
    with pytest.raises(ValueError, match=r"2 reductions need more than 2 encoder layers.*Fix: "):
        encoder(layers=2, subsampling=PYRAMIDS["pool"])


@torch.no_grad()
def test_layer_norm_standardises_outputs_but_not_the_recurrence():
    made = encoder(layer_norm=True)
    states, _ = made(source(), LENGTHS)
    torch.testing.assert_close(states.mean(-1), torch.zeros(B, S), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.var(-1, correction=0), torch.ones(B, S), atol=1e-2, rtol=0)
    plain = encoder()
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if "norm" not in k})
    raw, _ = plain(source(), LENGTHS)
    torch.testing.assert_close(nn.functional.layer_norm(raw, (2 * D,)), states)


def test_dropout_stands_between_layers_in_training_only():
    made, single = encoder(layers=2, dropout=0.5), encoder(dropout=0.5)
    quiet = made(source(), LENGTHS)[0]
    assert torch.equal(made(source(), LENGTHS)[0], quiet)
    made.train()
    assert not torch.allclose(made(source(), LENGTHS)[0], quiet)
    single.train()
    assert torch.equal(single(source(), LENGTHS)[0], single(source(), LENGTHS)[0])
