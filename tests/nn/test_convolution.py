import pytest
import torch
import torch.nn.functional as F

from vinedresser.nn.convolution import WeightNorm, scale_gradient, windows

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "left", "right"), [(1, 0, 0), (3, 1, 1), (3, 2, 0), (4, 1, 2)])
def test_windows_and_a_product_are_a_convolution(kernel, left, right, stride):
    torch.manual_seed(0)
    for T in (1, 2, 5, 8):
        x_BTD, weight = torch.randn(2, T, 5), torch.randn(7, 5, kernel)
        padded = F.pad(x_BTD, (0, 0, left, right)).transpose(1, 2)
        wanted = F.conv1d(padded, weight, stride=stride).transpose(1, 2)
        gathered = windows(x_BTD, kernel, left=left, right=right, stride=stride)
        found = F.linear(gathered, weight.transpose(1, 2).flatten(1))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "left", "right"), [(1, 0, 0), (3, 1, 1), (5, 4, 0), (4, 1, 2)])
def test_windows_with_and_without_a_gradient_are_the_same(kernel, left, right, stride):
    for T in (1, 2, 3, 5, 8):
        x_BTD = torch.randn(2, T, 3, dtype=torch.float64, requires_grad=True)

        def gathered(x, kernel=kernel):
            return windows(x, kernel, left=left, right=right, stride=stride)

        assert torch.equal(gathered(x_BTD), gathered(x_BTD.detach()))
        assert torch.autograd.gradcheck(gathered, (x_BTD,))


def test_weight_norm_equals_torch():
    torch.manual_seed(0)
    ours = WeightNorm(5, 7, std=0.3)
    theirs = torch.nn.Linear(5, 7)
    theirs.weight.data = ours.direction.data.clone()
    theirs.bias.data.zero_()
    torch.nn.utils.parametrizations.weight_norm(theirs)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    plain = WeightNorm(5, 7, std=0.3, has_norm=False)
    plain.direction.data = ours.direction.data
    torch.testing.assert_close(ours(x), plain(x))
    ours.direction.data *= 3  # its length is not its gain
    torch.testing.assert_close(ours(x), theirs(x))
    ours.gain.data *= 2
    torch.testing.assert_close(ours(x), 2 * theirs(x))


def test_a_gradient_is_scaled_and_the_values_are_not():
    x = torch.randn(3, requires_grad=True)
    found = scale_gradient(x, 0.25)
    assert torch.equal(found, x)
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.25))
