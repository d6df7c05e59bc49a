"""methods.md 62, 63: attention with values of low rank, or without a value projection."""

import pytest
import torch

from vinedresser.nn import attention
from vinedresser.nn.attention import MultiHeadAttention
from vinedresser.nn.reduced_values import ReducedValueAttention, ReducedValues

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

D, H, K = 24, 3, 8


def layer(rank: int, *, heads=(0, 1, 2), of: int = H, head_dim: int = K, **settings):
    torch.manual_seed(0)
    built = ReducedValueAttention(
        D, ReducedValues(heads, of, rank), head_dim, dropout=0.0, **settings
    )
    for name, parameter in built.named_parameters():
        if "gates" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


@pytest.fixture
def x_BTD() -> torch.Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.tensor([[False] * 7, [False] * 4 + [True] * 3])[:, None, None]


def near(found, wanted):
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


def projections(module: MultiHeadAttention) -> int:
    """Weights that make queries, keys and values: no biases, no output projection."""
    named = module.named_parameters()
    return sum(p.numel() for n, p in named if n.endswith("weight") and n != "output.weight")


@pytest.mark.parametrize("is_cross", [False, True])
def test_counts_of_the_rows(is_cross):
    """One head, dim 50, d 10: 7,500 in full, 1,000 without values, 2,000 factorised."""
    full = MultiHeadAttention(50, 1, 50, dropout=0.0, is_cross=is_cross)
    one = {r: ReducedValues((0,), 1, r) for r in (0, 10)}
    free, low = (
        ReducedValueAttention(50, one[r], 10, dropout=0.0, is_cross=is_cross) for r in (0, 10)
    )
    assert projections(full) == 3 * 50 * 50 == 7_500
    assert projections(free) == 2 * 10 * 50 == 1_000
    assert projections(low) == 4 * 50 * 10 == 2_000


def as_full(reduced: ReducedValueAttention) -> MultiHeadAttention:
    """Full attention with W_v multiplied out: U V, or the identity."""
    full = MultiHeadAttention(D, H, K, dropout=0.0, is_cross=reduced.is_cross).eval()
    weight, bias = torch.eye(D), torch.zeros(D)
    if reduced.values.rank:
        weight = reduced.value_out.weight @ reduced.value_in.weight
        bias = reduced.value_out.bias
    own, theirs = dict(reduced.state_dict()), full.state_dict()
    query_key = [
        own[f"{n}.{p}"]
        for p in ("weight", "bias")
        for n in ("key", "query_key")
        if f"{n}.{p}" in own
    ]
    name = "key_value" if reduced.is_cross else "query_key_value"
    theirs |= {n: t for n, t in own.items() if n in theirs}
    theirs |= {f"{name}.weight": torch.cat([query_key[0], weight])}
    theirs |= {f"{name}.bias": torch.cat([query_key[1], bias])}
    full.load_state_dict(theirs)
    return full


@pytest.mark.parametrize("rank", [0, 1, 5, D])
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("path", ["plain", "fused"])
def test_equals_full_attention_with_the_product(x_BTD, hidden, rank, is_cross, path, monkeypatch):
    if path == "fused":
        monkeypatch.setattr(attention, "_PLAIN_SCORES", -1)
    ours = layer(rank, is_cross=is_cross)
    full = as_full(ours)
    memory = [m.remember(x_BTD * 2) if is_cross else None for m in (ours, full)]
    near(ours(x_BTD, memory=memory[0], hidden=hidden), full(x_BTD, memory=memory[1], hidden=hidden))


@pytest.mark.parametrize("rank", [1, 4, D])
def test_the_product_has_at_most_that_rank(rank):
    ours = layer(rank)
    product = ours.value_out.weight.double() @ ours.value_in.weight.double()
    assert product.shape == (D, D)
    assert int(torch.linalg.matrix_rank(product)) == rank


def test_full_rank_reaches_any_full_projection(x_BTD):
    """At d = dim, U = 1 and V = W_v give full attention itself."""
    torch.manual_seed(3)
    full = MultiHeadAttention(D, H, K, dropout=0.0).eval()
    ours = layer(D)
    weight, bias = full.query_key_value.weight.data, full.query_key_value.bias.data
    ours.query_key.weight.data, ours.value_out.weight.data = weight[: 2 * D], weight[2 * D :]
    ours.query_key.bias.data, ours.value_out.bias.data = bias[: 2 * D], bias[2 * D :]
    ours.value_in.weight.data = torch.eye(D)
    ours.output.load_state_dict(full.output.state_dict())
    near(ours(x_BTD, is_causal=True), full(x_BTD, is_causal=True))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("head_dim", [K, 3])
def test_steps_equal_the_causal_whole(x_BTD, rank, head_dim):
    ours = layer(rank, head_dim=head_dim)
    cache = ours.new_cache(2, 7, x_BTD)
    steps = [ours.step(x_BTD[:, t : t + 1], cache=cache) for t in range(7)]
    near(torch.cat(steps, 1), ours(x_BTD, is_causal=True))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("is_cross", [False, True])
@pytest.mark.parametrize("alive", [(0, 2), (1,), ()])
def test_closed_gates_equal_removed_heads(x_BTD, rank, is_cross, alive):
    gated = layer(rank, is_cross=is_cross, has_gates=True)
    # One open gate is between 0 and 1: its value goes into the output projection.
    logs = torch.tensor([0.4, 5.0, 5.0])
    gated.gates.log_alpha.data = torch.where(
        torch.tensor([h in alive for h in range(H)]), logs, -5.0
    )
    smaller = layer(rank, heads=alive, is_cross=is_cross)
    smaller.load_state_dict(gated.kept(list(alive), gated.gates.deterministic()))
    memory = [m.remember(x_BTD * 2) if is_cross else None for m in (gated, smaller)]
    near(smaller(x_BTD, memory=memory[1]), gated(x_BTD, memory=memory[0]))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="24 is no multiple of 5 heads"):
        ReducedValueAttention(D, ReducedValues((0,), 5), 4, dropout=0.0)
