"""Metrics window: sums over updates and ranks, updates that are not finite, divergence."""

import math

import pytest
import torch

from vinedresser.errors import DivergedError, TrainingError
from vinedresser.training.step import Step
from vinedresser.training.window import MetricsWindow


def step(index: int, nats: float, tokens: int, norm: float) -> Step:
    scalars = [torch.tensor(float(nats)), torch.tensor(tokens), torch.tensor(float(norm))]
    return Step(index, *scalars, learning_rate=index / 10, metrics={"some_share": 1 - index / 100})


def test_sums_travel():
    window = MetricsWindow(clip_norm=1.0)
    window.add(step(1, 10.0, 2, 0.5))
    window.add(step(2, 8.0, 16, 3.0))
    logged = window.close()
    assert logged.pop("train/tokens_per_second") > 0
    assert logged.pop("train/seconds_per_step") > 0
    assert logged == pytest.approx(
        {
            "train/loss": 1.0,
            "train/learning_rate": 0.2,
            "train/gradient_norm_max": 3.0,
            "train/gradient_norm_mean": 1.75,
            "train/skipped_updates": 0.0,
            "train/clipped_share": 0.5,
            "train/some_share": 0.98,
        }
    )


def test_loss_and_speed_are_those_of_all_ranks():
    alone = MetricsWindow(clip_norm=1.0)
    window = MetricsWindow(clip_norm=1.0, all_sum=lambda sums: sums + torch.tensor([30.0, 10.0]))
    for each in (alone, window):
        each.add(step(1, 6.0, 2, 0.5))
    assert alone.close()["train/loss"] == 3
    logged = window.close()
    assert logged["train/loss"] == 3  # (6 + 30) / (2 + 10)
    made = logged["train/tokens_per_second"] * logged["train/seconds_per_step"]
    assert made == pytest.approx(12)


def test_a_closed_window_is_empty():
    window = MetricsWindow(clip_norm=1.0)
    window.add(step(1, 100.0, 1, 1.0))
    window.close()
    window.add(step(2, 3.0, 3, 1.0))
    assert window.close()["train/loss"] == 1.0


@pytest.mark.parametrize(("nats", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)])
def test_what_is_not_finite_stops_the_run(nats, norm):
    window = MetricsWindow(clip_norm=1.0)
    window.add(step(1, 1.0, 1, 1.0))
    window.add(step(2, nats, 1, norm))
    window.add(step(3, 1.0, 1, 1.0))
    with pytest.raises(TrainingError, match=r"step 2: .*lower optim\.lr"):
        window.close()


def test_an_exploding_loss_of_finite_numbers_stops_the_run():
    uniform = math.log(10)
    window = MetricsWindow(1.0, uniform_loss=uniform)
    for index, loss in enumerate([uniform, 1.0], 1):
        window.add(step(index, 7 * loss, 7, 1.0))
        window.close()
    window.add(step(3, 35 * uniform, 7, 1.0))
    message = (
        "step 3: loss 11.5 nats per token, the lowest so far was 1, uniform guessing gives 2.3"
    )
    with pytest.raises(DivergedError, match=message):
        window.close()


def test_as_many_updates_may_be_left_out_as_are_allowed():
    for allowed in (2, 1):
        window = MetricsWindow(1.0, max_skipped=allowed)
        for index, norm in enumerate([1.0, math.nan, 1.0, 1.0, math.inf], 1):
            window.add(step(index, 1.0, 1, norm))
            if index == 3:
                assert window.close()["train/skipped_updates"] == 1
                assert [bad.index for bad in window.not_finite] == [2]
        if allowed == 2:
            assert window.close()["train/skipped_updates"] == 2
        else:
            with pytest.raises(DivergedError, match="step 5"):
                window.close()
        assert [bad.index for bad in window.not_finite] == [5]


def test_its_state_is_what_outlives_a_window():
    window, other = MetricsWindow(1.0, max_skipped=3), MetricsWindow(1.0, max_skipped=3)
    window.add(step(1, 4.0, 2, 1.0))
    window.add(step(2, 1.0, 1, math.nan))
    window.close()
    other.load_state_dict(window.state_dict())
    assert (other.skipped, other.lowest) == (1, 2.0)
