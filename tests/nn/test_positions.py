"""methods.md 57."""

import pytest
import torch

from vinedresser.nn.positions import Positions, sinusoids


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


class TestAdded:
    @pytest.mark.parametrize("kind", ["sinusoidal", "learned", "one_hot", "none"])
    def test_whole_equals_one_position_at_a_time_beyond_any_table(self, kind):
        torch.manual_seed(0)
        added = Positions(kind, 8, max_positions=20)
        x_BTD = torch.randn(2, 300, 8)
        whole = added(x_BTD)
        steps = [added(x_BTD[:, t : t + 1], t) for t in range(300)]
        torch.testing.assert_close(torch.cat(steps, 1), whole)
        torch.testing.assert_close(added(x_BTD[:, 7:30], 7), whole[:, 7:30])

    def test_a_grown_table_keeps_its_precision(self):
        positions = Positions("sinusoidal", 8).bfloat16()
        assert positions(torch.zeros(1, 600, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_sinusoids_are_what_is_added(self):
        zeros = torch.zeros(1, 300, 8)
        torch.testing.assert_close(Positions("sinusoidal", 8)(zeros)[0], sinusoids(300, 8))

    def test_one_hot_rows_are_sqrt_2_apart_until_the_features_end(self):
        rows = Positions("one_hot", 8)(torch.zeros(1, 12, 8))[0]
        distances = torch.cdist(rows[:8], rows[:8])
        wanted = torch.full((8, 8), 2**0.5).fill_diagonal_(0)
        torch.testing.assert_close(distances, wanted)
        assert torch.equal(rows[:8], torch.eye(8))
        assert torch.equal(rows[8:], rows[7:8].expand(4, 8))  # clamped

    def test_learned_positions_share_the_last_row_beyond_the_table(self):
        added = Positions("learned", 4, max_positions=5)
        rows = added(torch.zeros(1, 9, 4))[0]
        assert torch.equal(rows[:5], added.table)
        assert torch.equal(rows[5:], added.table[4:5].expand(4, 4))
        rows[3].sum().backward()
        assert added.table.grad.abs().sum(1).tolist() == [0, 0, 0, 4, 0]

    def test_none_adds_nothing(self):
        x_BTD = torch.randn(2, 3, 4)
        assert Positions("none", 4)(x_BTD) is x_BTD

    def test_only_learned_positions_are_weights(self):
        for kind in ("sinusoidal", "one_hot", "none"):
            assert not Positions(kind, 8).state_dict()
        assert list(Positions("learned", 8).state_dict()) == ["table"]
