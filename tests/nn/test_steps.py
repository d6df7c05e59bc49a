"""Products step by step against autograd's own gradients."""

import pytest
import torch
from torch import Tensor

from vinedresser.nn.steps import Product

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, F, G = 4, 3, 5, 2


def chain(product, known_TBG: Tensor, x_BF: Tensor, mix_FG: Tensor) -> Tensor:
    """A recurrence: each step's input comes from the step before."""
    total = torch.zeros(())
    for known_BG in known_TBG:
        out_BG = product(known_BG, x_BF)
        total = total + out_BG.square().sum()
        x_BF = torch.tanh(out_BG @ mix_FG.t())
    return total


def plain(weight: Tensor):
    def product(known_BG: Tensor, x_BF: Tensor) -> Tensor:
        if weight.dim() == 2:
            return known_BG + x_BF @ weight.t()
        return known_BG + torch.einsum("bgf,bf->bg", weight, x_BF)

    return product


@pytest.mark.parametrize("shape", [(G, F), (B, G, F)], ids=["matrix", "matrix a sentence"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_values_and_gradients_equal_autograds(shape, rounds):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True)
              for s in (shape, (T, B, G), (B, F), (F, G))]  # fmt: skip
    weight, known, x, mix = leaves
    wanted = chain(plain(weight), known, x, mix)
    product = Product(weight)
    for _ in range(rounds):  # a product may be begun anew, and must not keep what it was given
        found = chain(product, product.begin(known), x, mix)
    assert torch.equal(found.detach().round(decimals=9), wanted.detach().round(decimals=9))
    pairs = zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    assert torch.autograd.grad(chain(plain(weight), known, x, mix), weight)[0].abs().sum() > 1


def test_two_products_begun_on_one_sum():
    torch.manual_seed(0)
    one, two = (torch.randn(G, F, requires_grad=True) for _ in range(2))
    known, x = torch.randn(T, B, G), torch.randn(T, B, F)
    first, second = Product(one), Product(two)
    begun = second.begin(first.begin(known))
    out = torch.stack([second(first(begun[t], x[t]), x[t].cos()) for t in range(T)])
    wanted = known + x @ one.t() + x.cos() @ two.t()
    torch.testing.assert_close(out, wanted)
    for found, right in zip(
        torch.autograd.grad(out.sin().sum(), (one, two)),
        torch.autograd.grad(wanted.sin().sum(), (one, two)),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_rows_are_selected_from_a_matrix_a_sentence_only():
    matrix, matrices, rows = torch.randn(G, F), torch.randn(B, G, F), torch.tensor([2, 0, 2])
    known, x = torch.zeros(3, G), torch.randn(3, F)
    torch.testing.assert_close(Product(matrix).select(rows)(known, x), x @ matrix.t())
    wanted = torch.einsum("bgf,bf->bg", matrices[rows], x)
    torch.testing.assert_close(Product(matrices).select(rows)(known, x), wanted)


def test_nothing_is_kept_without_gradients():
    product = Product(torch.randn(G, F, requires_grad=True))
    known = torch.randn(1, B, G)
    product.begin(known)
    with torch.no_grad():
        assert product.begin(known) is known
        product(known[0], torch.randn(B, F))
    assert product._inputs is None
