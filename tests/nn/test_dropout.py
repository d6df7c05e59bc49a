import math

import pytest
import torch

from vinedresser.nn.dropout import Dropout

N = 200_000


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_rate_and_mean(p):
    torch.manual_seed(0)
    dropped = Dropout(p).train()(torch.ones(N))
    rounded = round(p * 256) / 256
    sigma = math.sqrt(rounded * (1 - rounded) / N)
    assert abs(float((dropped == 0).float().mean()) - rounded) < 4 * sigma
    assert abs(float(dropped.mean()) - 1) < 4 * sigma / (1 - rounded)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rounded)))


def test_neighbours_are_independent():
    torch.manual_seed(0)
    kept = (Dropout(0.5).train()(torch.ones(N)) != 0).float() - 0.5
    for lag in range(1, 17):  # eight masks come from one draw
        assert abs(float((kept[lag:] * kept[:-lag]).mean())) < 4 * 0.25 / math.sqrt(N)


def test_evaluation_and_zero_are_the_identity():
    x = torch.randn(3, 4)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.ones(5, 7, requires_grad=True)
    out = Dropout(0.5).train()(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_same_seed_same_mask():
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(Dropout(0.3).train()(torch.ones(100)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (3, 5)], ids=str)
def test_any_shape_and_type(shape):
    drop = Dropout(0.5).train()
    for dtype in (torch.float32, torch.bfloat16):
        found = drop(torch.ones(shape, dtype=dtype))
        assert found.shape == shape
        assert found.dtype == dtype


def test_the_input_is_left_alone():
    x = torch.ones(100)
    Dropout(0.5).train()(x)
    assert (x == 1).all()


def test_a_rate_that_rounds_to_one_still_keeps_some():
    torch.manual_seed(0)
    found = Dropout(0.999).train()(torch.ones(N))
    assert found.isfinite().all()
    assert (found != 0).any()


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_what_is_no_rate_is_refused(p):
    with pytest.raises(ValueError, match="expected 0 <= p < 1"):
        Dropout(p)
