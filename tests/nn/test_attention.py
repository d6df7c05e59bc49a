import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vinedresser.nn import attention
from vinedresser.nn.attention import MultiHeadAttention

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

D, H, K = 24, 3, 8


def layer(**settings) -> MultiHeadAttention:
    torch.manual_seed(0)
    built = MultiHeadAttention(D, H, K, dropout=0.0, **settings)
    for name, parameter in built.named_parameters():  # biases too
        if "gates" not in name:
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


def reference(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(D, H, batch_first=True).eval()
    parts = [ours.query, ours.key_value] if ours.is_cross else [ours.query_key_value]
    theirs.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    return theirs


@pytest.fixture(params=["plain", "fused"])
def _path(request, monkeypatch):
    if request.param == "fused":
        monkeypatch.setattr(attention, "_PLAIN_SCORES", -1)


@pytest.fixture
def x_BTD() -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden_BS() -> Tensor:
    return torch.tensor([[False] * 7, [False] * 4 + [True] * 3])


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


@pytest.mark.usefixtures("_path")
class TestAgainstTorch:
    def test_self_attention_with_padding(self, x_BTD, hidden_BS):
        ours = layer()
        wanted, _ = reference(ours)(x_BTD, x_BTD, x_BTD, key_padding_mask=hidden_BS)
        near(ours(x_BTD, hidden=hidden_BS[:, None, None]), wanted)

    def test_causal_self_attention(self, x_BTD):
        ours = layer()
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        wanted, _ = reference(ours)(x_BTD, x_BTD, x_BTD, attn_mask=future)
        near(ours(x_BTD, is_causal=True), wanted)

    def test_attention_to_a_memory(self, x_BTD, hidden_BS):
        ours, queries = layer(is_cross=True), x_BTD[:, :5] * 2
        wanted, _ = reference(ours)(queries, x_BTD, x_BTD, key_padding_mask=hidden_BS)
        found = ours(queries, memory=ours.remember(x_BTD), hidden=hidden_BS[:, None, None])
        near(found, wanted)

    def test_steps_equal_the_causal_whole(self, x_BTD):
        ours = layer()
        cache = ours.new_cache(2, 7, x_BTD)
        steps = [ours.step(x_BTD[:, t : t + 1], cache=cache) for t in range(7)]
        near(torch.cat(steps, 1), ours(x_BTD, is_causal=True))

    def test_no_head_left_adds_the_output_bias(self, x_BTD, hidden_BS):
        ours = MultiHeadAttention(D, 0, K, dropout=0.5)
        nn.init.normal_(ours.output.bias)
        found = ours.train()(x_BTD, hidden=hidden_BS[:, None, None])
        assert torch.equal(found, ours.output.bias.expand_as(found))

    def test_gradients_equal_torch(self, x_BTD):
        ours = layer()
        theirs = reference(ours)
        ours(x_BTD, is_causal=True).square().sum().backward()
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        theirs(x_BTD, x_BTD, x_BTD, attn_mask=future)[0].square().sum().backward()
        wanted = theirs.in_proj_weight.grad
        torch.testing.assert_close(ours.query_key_value.weight.grad, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["padded", "causal", "cross", "gated"])
def test_both_implementations_give_the_same_numbers(x_BTD, hidden_BS, form, monkeypatch):
    """Outputs and gradients; which one runs depends on device and length alone."""
    hidden = None if form == "causal" else hidden_BS[:, None, None]
    results = []
    for limit in (10**9, -1):
        monkeypatch.setattr(attention, "_PLAIN_SCORES", limit)
        ours = layer(is_cross=form == "cross", has_gates=form == "gated")
        x = x_BTD.clone().requires_grad_()
        memory = ours.remember(2 * x) if form == "cross" else None
        out = ours(x, memory=memory, hidden=hidden, is_causal=form == "causal")
        out.square().mean().backward()
        results.append((out.detach(), x.grad, *(p.grad for p in ours.parameters())))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


def test_length_and_device_choose_the_implementation(monkeypatch):
    called = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or real(*a, **k)
    )
    for length, is_fused in ((128, False), (129, True)):
        layer()(torch.zeros(1, length, D))
        assert bool(called) == is_fused
    called.clear()
    layer().to("meta")(torch.zeros(1, 3, D, device="meta"))
    assert called


def test_scores_are_scaled_dot_products(x_BTD):
    ours = layer()
    queries, keys, values = ours._split(ours.query_key_value(x_BTD), 3)
    found = ours._attend(queries, keys, values, None, is_causal=False)
    near(found, F.scaled_dot_product_attention(queries, keys, values))


def test_rows_of_the_relation_matrix_sum_to_one(x_BTD, hidden_BS):
    ours = layer()
    queries, keys, _ = ours._split(ours.query_key_value(x_BTD), 3)
    eye = torch.eye(7).expand(2, H, 7, 7)  # values that read the weights out
    weights = ours._attend(queries, keys, eye, hidden_BS[:, None, None], is_causal=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, 7))
    assert (weights[1, :, :, 4:] == 0).all()


def test_scaling_keeps_unit_variance():
    torch.manual_seed(0)
    d = 256
    queries, keys = torch.randn(2000, d), torch.randn(2000, d)
    scores = (queries * d**-0.5 * keys).sum(-1)
    assert float(scores.var()) == pytest.approx(1, abs=0.1)


class TestGates:
    def test_open_gates_equal_the_baseline(self, x_BTD):
        gated, plain = layer(has_gates=True), layer()
        plain.load_state_dict({n: t for n, t in gated.state_dict().items() if "gates" not in n})
        assert torch.equal(gated(x_BTD), plain(x_BTD))

    @pytest.mark.parametrize("is_cross", [False, True])
    def test_a_closed_gate_equals_a_removed_head(self, x_BTD, is_cross):
        gated = layer(has_gates=True, is_cross=is_cross)
        gated.gates.log_alpha.data = torch.tensor([5.0, -5.0, 5.0])
        smaller = MultiHeadAttention(D, 2, K, dropout=0.0, is_cross=is_cross)
        smaller.load_state_dict(gated.kept([0, 2], gated.gates.deterministic()))
        memory = [m.remember(x_BTD * 2) if is_cross else None for m in (gated, smaller)]
        wanted = gated(x_BTD, memory=memory[0])
        near(smaller(x_BTD, memory=memory[1]), wanted)
        gated.gates.log_alpha.data[1] = 5.0
        assert (gated(x_BTD, memory=memory[0]) - wanted).abs().max() > 0.01

    def test_a_gate_between_is_folded_into_the_output(self, x_BTD):
        gated = layer(has_gates=True)
        gated.gates.log_alpha.data = torch.tensor([0.3, 5.0, -1.0])
        gates = gated.gates.deterministic()
        assert ((gates > 0) & (gates < 1)).sum() == 2
        smaller = MultiHeadAttention(D, 3, K, dropout=0.0)
        smaller.load_state_dict(gated.kept([0, 1, 2], gates))
        near(smaller(x_BTD), gated(x_BTD))

    def test_no_gate_open_leaves_the_bias(self, x_BTD):
        gated = layer(has_gates=True)
        gated.gates.log_alpha.data.fill_(-5.0)
        near(gated(x_BTD), gated.output.bias.expand_as(x_BTD))
        smaller = MultiHeadAttention(D, 0, K, dropout=0.0)
        smaller.load_state_dict(gated.kept([], gated.gates.deterministic()))
        near(smaller(x_BTD), gated(x_BTD))

    def test_one_gate_a_sentence_in_training(self, x_BTD):
        gated = layer(has_gates=True).train()
        gated.gates.log_alpha.data.fill_(0.0)
        same = x_BTD[:1].expand(8, -1, -1)
        out = gated(same)
        assert len({tuple(row.flatten().tolist()) for row in out.detach()}) > 1


def test_parameter_count_of_vaswani():
    base = MultiHeadAttention(512, 8, 64, dropout=0.1)
    cross = MultiHeadAttention(512, 8, 64, dropout=0.1, is_cross=True)
    for built in (base, cross):
        assert sum(p.numel() for p in built.parameters()) == 1_050_624


def test_a_step_without_memory_or_cache_is_refused(x_BTD):
    with pytest.raises(ValueError, match="cache or a memory"):
        layer().step(x_BTD[:, :1])


@pytest.mark.usefixtures("_path")
def test_a_causal_layer_hides_padding_too(x_BTD):
    built, hidden = layer(), torch.zeros(2, 1, 1, 7, dtype=torch.bool)
    hidden[:, :, :, 2] = True
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 2] += 3
    found, other = (built(x, hidden=hidden, is_causal=True) for x in (x_BTD, changed_BTD))
    others = [t for t in range(7) if t != 2]
    torch.testing.assert_close(found[:, others], other[:, others], atol=1e-6, rtol=0)
    later_BTD = x_BTD.clone()
    later_BTD[:, 5] += 3
    later = built(later_BTD, hidden=hidden, is_causal=True)
    torch.testing.assert_close(found[:, :5], later[:, :5], atol=1e-6, rtol=0)
    assert (found[:, 6] - later[:, 6]).abs().max() > 1e-3
