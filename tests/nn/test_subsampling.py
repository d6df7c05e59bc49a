"""Lengths in closed form, values by brute force, sentence by sentence (methods.md 25, 26)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vinedresser.errors import ConfigError
from vinedresser.nn.subsampling import FrontEnd, Subsample, SubsamplingConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

D = 6
KINDS = [
    {"kind": "conv"},
    {"kind": "conv", "factor": 3, "kernel": 5, "padding": 2},
    {"kind": "conv", "factor": 2, "kernel": 4, "padding": 3},
    {"kind": "conv", "factor": 4, "kernel": 1, "padding": 0},
    {"kind": "pool"},
    {"kind": "pool", "rounding": "floor", "factor": 3},
    {"kind": "pool", "pool": "max"},
    {"kind": "pool", "pool": "max", "rounding": "floor"},
    {"kind": "concat"},
    {"kind": "concat", "factor": 3},
    {"kind": "concat", "factor": 1},
]


def name(changes: dict[str, object]) -> str:
    return "-".join(str(value) for value in changes.values())


@pytest.fixture(params=KINDS, ids=name)
def config(request) -> SubsamplingConfig:
    return SubsamplingConfig(**request.param)


def reduction(config: SubsamplingConfig, features_out: int | None = None) -> Subsample:
    torch.manual_seed(0)
    built = Subsample(config, D, features_out)
    if built.project is not None:
        torch.nn.init.normal_(built.project.bias)
    return built


def states(T: int, seed: int = 1) -> Tensor:
    # Far below zero too: a maximum must not take the padding's zeros.
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed)) * 3 - 2


def by_hand(built: Subsample, x_TD: Tensor) -> Tensor:
    """One sentence, one window at a time, from the formulas."""
    config, T = built.config, len(x_TD)
    s = config.factor
    if config.kind == "conv":
        k, p = config.kernel, config.padding
        weight = built.project.weight.view(built.width, k, D).transpose(1, 2)
        return F.relu(F.conv1d(x_TD.T[None], weight, built.project.bias, s, p))[0].T
    rows = [x_TD[i : i + s] for i in range(0, T, s)]
    if config.kind == "pool":
        if config.rounding == "floor" and s <= T:
            rows = [row for row in rows if len(row) == s]
        return torch.stack([row.amax(0) if config.pool == "max" else row.mean(0) for row in rows])
    gathered = torch.stack([torch.cat([*row, torch.zeros((s - len(row)) * D)]) for row in rows])
    return gathered if built.project is None else built.project(gathered)


def wanted_length(config: SubsamplingConfig, T: int) -> int:
    if config.kind == "conv":
        return math.floor((T + 2 * config.padding - config.kernel) / config.factor) + 1
    if config.kind == "pool" and config.rounding == "floor":
        return max(1, math.floor(T / config.factor))
    return math.ceil(T / config.factor)


def test_lengths_in_closed_form(config):
    lengths = torch.arange(1, 200)
    found = config.reduced(lengths)
    assert found.tolist() == [wanted_length(config, T) for T in range(1, 200)]
    assert found.tolist() == [config.reduced(T) for T in range(1, 200)]
    assert found.dtype == torch.int64
    assert int(found.min()) >= 1
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 6, 7, 12, 13])
@torch.no_grad()
def test_states_by_hand(config, T):
    built, x_TD = reduction(config), states(T)
    found, lengths = built(x_TD[None], torch.tensor([T]))
    wanted = by_hand(built, x_TD)
    assert found.shape == (1, int(lengths[0]), built.width) == (1, *wanted.shape)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_batch_mates_and_padding_change_nothing(config):
    built, lengths = reduction(config), [7, 1, 12, 2, 3, 5]
    for size in (12, 13, 17):  # a batch may be wider than its longest sentence
        x_BSD = torch.full((len(lengths), size, D), 1e6)  # what stands on padding
        for i, T in enumerate(lengths):
            x_BSD[i, :T] = states(T, seed=i)
        found, reduced = built(x_BSD, torch.tensor(lengths))
        assert found.shape[1] == config.reduced(size)
        assert found.isfinite().all()
        for i, T in enumerate(lengths):
            wanted = by_hand(built, states(T, seed=i))
            assert int(reduced[i]) == len(wanted)
            torch.testing.assert_close(found[i, : len(wanted)], wanted, atol=1e-5, rtol=0)


def test_gradients_stay_in_the_sentence(config):
    built, x_BSD = reduction(config), torch.stack([states(9), states(9, 2)]).requires_grad_()
    found, lengths = built(x_BSD, torch.tensor([9, 5]))
    found[1, : int(lengths[1])].square().sum().backward()
    assert not x_BSD.grad[0].any()
    assert not x_BSD.grad[1, 5:].any()
    assert x_BSD.grad[1, :5].any()


def test_concatenation_halves_one_hundred_frames_twice():
    front = FrontEnd(SubsamplingConfig(kind="concat"), D)
    found, lengths = front(torch.randn(2, 101, D), torch.tensor([100, 101]))
    assert lengths.tolist() == [25, 26]
    assert found.shape == (2, 26, D)


def test_widths():
    def width(features_out=None, **changes):
        return Subsample(SubsamplingConfig(**changes), D, features_out).width

    assert width(kind="concat") == 2 * D
    assert width(kind="concat", factor=3) == 3 * D
    assert width(4, kind="concat") == 4
    assert width(kind="pool") == width(kind="conv") == D
    assert width(4, kind="pool") == width(4, kind="conv") == 4
    assert Subsample(SubsamplingConfig(kind="concat"), D).project is None
    assert sum(p.numel() for p in Subsample(SubsamplingConfig(kind="pool"), D).parameters()) == 0


@torch.no_grad()
def test_projection_follows_the_reduction():
    built = reduction(SubsamplingConfig(kind="concat"), features_out=4)
    found, _ = built(states(5)[None], torch.tensor([5]))
    torch.testing.assert_close(found[0], by_hand(built, states(5)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_maximum_over_padding_is_finite(dtype):
    built = Subsample(SubsamplingConfig(kind="pool", pool="max"), D)
    found, _ = built(torch.randn(2, 9, D, dtype=dtype), torch.tensor([9, 1]))
    assert found.dtype == dtype
    assert not found[1, 1:].any()


def test_none_gives_back_what_it_is_given():
    config = SubsamplingConfig()
    x_BSD, lengths = torch.randn(2, 5, D), torch.tensor([5, 2])
    found, same = FrontEnd(config, D)(x_BSD, lengths)
    assert found is x_BSD
    assert same is lengths
    assert config.reductions == 0
    assert config.reduced(7) == 7
    with pytest.raises(ValueError, match="no reduction"):
        Subsample(config, D)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "convolution"}, "kind"),
        ({"factor": 0}, "factor"),
        ({"layers": 0}, "layers"),
        ({"kind": "conv", "padding": 0}, "padding 0 with kernel 3.*wanted 1 to 2"),
        ({"kind": "conv", "padding": 3}, "padding 3 with kernel 3.*wanted 1 to 2"),
        ({"pol": "max"}, "did you mean pool"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SubsamplingConfig().override(changes)
