"""Score functions against loops over single vectors (methods.md 40, 42-45)."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from vinedresser.nn.record import recording
from vinedresser.nn.scores import Attention, ScoreKind, score

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = get_args(ScoreKind)
B, T, S, D = 2, 3, 5, 6


def built(kind: ScoreKind, memory_width: int = D):
    torch.manual_seed(0)
    return score(kind, D, memory_width)


def states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pair(kind: ScoreKind, module, s: Tensor, h: Tensor) -> Tensor:
    """The textbook score of one decoder state and one encoder state."""
    if kind == "cosine":
        return (s @ h) / (s.norm() * h.norm())
    if kind == "additive":
        W, U, b = module.query.weight, module.key.weight, module.key.bias
        return sum(
            module.energy[k] * math.tanh(float(W[k] @ s + U[k] @ h + b[k])) for k in range(len(b))
        )
    if kind == "general":
        return s @ (module.key.weight @ h)
    product = sum(float(a) * float(b) for a, b in zip(s, h, strict=True))
    return torch.tensor(product / (math.sqrt(len(s)) if kind == "scaled_dot" else 1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_equal_a_loop_over_pairs(kind):
    module, queries, memory = built(kind), states(B, T, D), states(B, S, D) * 2
    found = module(queries, module.remember(memory))
    assert found.shape == (B, T, S)
    for b in range(B):
        for t in range(T):
            for i in range(S):
                wanted = pair(kind, module, queries[b, t], memory[b, i])
                assert float(found[b, t, i]) == pytest.approx(float(wanted), abs=1e-5)


@torch.no_grad()
def test_cosine_lies_in_its_range_and_does_not_depend_on_lengths():
    """methods.md 42: [-1, 1], whatever the sharpness and the rounding; scale invariant."""
    module, queries, memory = built("cosine"), states(B, T, D), states(B, S, D)
    found = module(queries, module.remember(memory))
    same = module(queries * 37, module.remember(memory / 19))
    torch.testing.assert_close(same, found, atol=1e-6, rtol=0)
    many = states(1, 500, D)
    for scores in (found, *(module(many, module.remember(sign * many)) for sign in (1, -1))):
        assert -1 <= scores.min() <= scores.max() <= 1
    diagonal = module(many, module.remember(many)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.ones(1, 500))


@torch.no_grad()
def test_cosine_can_be_sharp_from_the_start():
    module = built("cosine")
    memory = torch.eye(20, 20)[None]
    keys = module.sharpened(module.remember(memory))
    weights = (module.query_factor(memory[:, :1]) @ keys.transpose(1, 2)).softmax(-1)
    assert weights.max() > 0.99


def test_cosine_learns_its_sharpness():
    attention, memory, is_real = attended("cosine")
    context = attention(states(B, T, D), attention.remember(memory, memory, is_real))
    context.square().sum().backward()
    assert attention.score.log_sharpness.grad.abs() > 1e-3


@pytest.mark.parametrize("width", [16, 64, 256])
@torch.no_grad()
def test_only_scaled_dot_has_variance_one_for_unit_normals(width):
    torch.manual_seed(0)
    queries, memory = torch.randn(1, 400, width), torch.randn(1, 400, width)
    for kind, wanted in (("scaled_dot", 1.0), ("dot", float(width))):
        module = score(kind, width, width)
        found = module(queries, module.remember(memory)).var()
        assert float(found) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("kind", ["dot", "scaled_dot", "cosine"])
def test_unequal_widths_are_refused_where_they_cannot_be_compared(kind):
    with pytest.raises(ValueError, match=r"decoder states have 6, encoder states 8.*Fix: "):
        score(kind, 6, 8)


@pytest.mark.parametrize("kind", ["general", "additive"])
def test_unequal_widths_are_fine_where_a_matrix_stands_between(kind):
    module = built(kind, memory_width=9)
    assert module(states(B, T, D), module.remember(states(B, S, 9))).shape == (B, T, S)


def attended(kind: ScoreKind, lengths: tuple[int, ...] = (5, 2)):
    torch.manual_seed(0)
    attention, memory = Attention(kind, D, D), states(B, S, D)
    is_real = torch.arange(S) < torch.tensor(lengths)[:, None]
    return attention, memory, is_real


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_weights_sum_to_one_and_are_zero_on_padding(kind):
    attention, memory, is_real = attended(kind)
    memory[1, 2:] = 1e4
    with recording() as found:
        contexts = attention(states(B, T, D), attention.remember(memory, memory, is_real))
    ((module, weights_BHTS),) = found
    assert module is attention
    assert weights_BHTS.shape == (B, 1, T, S)
    torch.testing.assert_close(weights_BHTS.sum(-1), torch.ones(B, 1, T))
    assert (weights_BHTS[1, :, :, 2:] == 0).all()
    assert (weights_BHTS[1, :, :, :2] > 0).all()
    torch.testing.assert_close(contexts, weights_BHTS[:, 0] @ memory)


@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step_equals_whole_gradients_included(kind):
    attention, memory, is_real = attended(kind)
    queries = states(B, T, D).requires_grad_()
    memory.requires_grad_()
    known = states(T, B, D)
    weights = torch.arange(1.0, 1 + B * T * D).view(B, T, D).sin()

    def gradients(contexts: Tensor) -> list[Tensor]:
        wanted = [queries, memory, *attention.parameters()]
        return list(torch.autograd.grad((contexts * weights).sum(), wanted))

    whole = attention(queries, attention.remember(memory, memory, is_real))
    source = attention.remember(memory, memory, is_real)
    begun = source.by_values.begin(known)
    steps = [
        attention.step(queries[:, t], source, bias, begun[t])
        for t, bias in enumerate(attention.begin(source, T).unbind(0))
    ]
    stepped = torch.stack(steps, 1)
    torch.testing.assert_close(stepped - known.transpose(0, 1), whole)
    for found, wanted in zip(gradients(stepped), gradients(whole), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
