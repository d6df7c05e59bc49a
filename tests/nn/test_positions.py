"""methods.md 57."""

import pytest
import torch

from vinedresser.nn.positions import sinusoids


def test_position_zero_is_zeros_and_ones():
    assert sinusoids(1, 8)[0].tolist() == [0, 1] * 4


@pytest.mark.parametrize("features", [2, 64, 512])
def test_squared_norm_is_half_the_features(features):
    squared = sinusoids(300, features).square().sum(-1)
    torch.testing.assert_close(squared, torch.full((300,), features / 2))


def test_distance_depends_on_the_difference_only():
    encoded = sinusoids(200, 64)
    distances = (encoded[3:] - encoded[:-3]).norm(dim=-1)
    assert float(distances[0]) == pytest.approx(3.58133, abs=1e-5)
    torch.testing.assert_close(distances, distances[:1].expand_as(distances), atol=1e-5, rtol=0)
    assert float((encoded[4] - encoded[0]).norm()) != pytest.approx(3.58133, abs=0.1)


def test_wavelengths_by_hand():
    encoded = sinusoids(10, 4)
    wanted = [torch.tensor(7.0).sin(), torch.tensor(7.0).cos(), torch.tensor(0.07).sin()]
    torch.testing.assert_close(encoded[7, :3], torch.stack(wanted))


def test_a_longer_table_begins_with_the_shorter():
    assert torch.equal(sinusoids(50, 16)[:20], sinusoids(20, 16))


def test_odd_features_are_refused():
    with pytest.raises(ValueError, match="7 features"):
        sinusoids(3, 7)
