"""methods.md 51 and the gated forms of Shazeer 2020."""

import pytest
import torch
import torch.nn.functional as F

from vinedresser.nn.dropout import Dropout
from vinedresser.nn.feed_forward import FeedForward

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

PLAIN = {"relu": F.relu, "gelu": F.gelu}
GATED = {"glu": torch.sigmoid, "geglu": F.gelu, "swiglu": F.silu}


def layer(activation: str, features: int = 8, inner: int = 12, **settings) -> FeedForward:
    torch.manual_seed(0)
    built = FeedForward(features, inner, activation=activation, dropout=0.0, **settings)
    for bias in (built.inner.bias, built.outer.bias):
        torch.nn.init.normal_(bias)
    return built


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("activation", PLAIN)
def test_plain_forms_by_hand(activation):
    ours, x = layer(activation), torch.randn(2, 5, 8)
    (w1, b1), (w2, b2) = ((m.weight, m.bias) for m in (ours.inner, ours.outer))
    torch.testing.assert_close(ours(x), PLAIN[activation](x @ w1.T + b1) @ w2.T + b2)


@pytest.mark.parametrize("activation", GATED)
def test_gated_forms_by_hand(activation):
    ours, x = layer(activation), torch.randn(2, 5, 8)
    (w, v), (b, c) = ours.inner.weight.split(12), ours.inner.bias.split(12)
    inner = GATED[activation](x @ w.T + b) * (x @ v.T + c)
    torch.testing.assert_close(ours(x), inner @ ours.outer.weight.T + ours.outer.bias)


@pytest.mark.parametrize("activation", [*PLAIN, *GATED])
def test_every_position_alone(activation):
    ours, x = layer(activation), torch.randn(2, 5, 8)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(ours(x)[:, shuffled], ours(x[:, shuffled]))


def test_parameter_counts():
    assert count(layer("relu", 512, 2048)) == count(layer("gelu", 512, 2048)) == 2_099_712
    for activation in GATED:
        D, inner = 512, 2048
        assert count(layer(activation, D, inner)) == 3 * D * inner + 2 * inner + D == 3_150_336
        # Two thirds of the inner features: the weights of the plain form (Shazeer 2020).
        assert count(layer(activation, 480, 1280)) == pytest.approx(
            count(layer("relu", 480, 1920)), rel=1e-3
        )


def test_dropout_is_between_the_layers():
    ours = FeedForward(4, 4000, activation="relu", dropout=0.5)
    ours.outer.weight.data.fill_(1.0)
    x = torch.ones(1, 1, 4)
    torch.manual_seed(0)
    one, two = ours(x), ours(x)
    assert not torch.equal(one, two)
    assert torch.equal(ours.eval()(x), ours(x))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_relu_and_dropout_in_one_are_relu_then_dropout(dtype, within):
    """The same draws; values and gradients as of the two one after the other."""
    torch.manual_seed(0)
    ours = FeedForward(8, 16, activation="relu", dropout=0.3).to(dtype).train()
    x = torch.randn(50, 3, 8).to(dtype).requires_grad_()
    dropout = Dropout(0.3).train()
    results = []
    for form in ("one", "two"):
        torch.manual_seed(1)
        y = ours(x) if form == "one" else ours.outer(dropout(F.relu(ours.inner(x))))
        grads = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
        results.append([y.detach(), *grads])
    for found, wanted in zip(*results, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=within, atol=within * scale)
        assert scale > 0
