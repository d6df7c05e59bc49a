"""Exponential moving average of the weights."""

import pytest
import torch
from torch import nn

from vinedresser.training.ema import AveragedWeights


class TestAverage:
    def model(self, value: float) -> nn.Linear:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, value)
        return model

    def test_no_decay_is_the_models_own_weights(self):
        model = self.model(1.0)
        averaged = AveragedWeights(model, 0.0)
        for step in range(1, 4):
            nn.init.constant_(model.weight, 0.1 * step)
            averaged.update(step)
            assert torch.equal(averaged.tensors["weight"], model.weight)

    def test_recursion_by_hand(self):
        model = self.model(1.0)
        averaged = AveragedWeights(model, 0.5)
        wanted = 1.0
        for step in range(1, 31):
            nn.init.constant_(model.weight, float(step))
            averaged.update(step)
            decay = min(0.5, step / (step + 10))
            wanted = decay * wanted + (1 - decay) * step
            assert averaged.tensors["weight"].item() == pytest.approx(wanted, rel=1e-5)

    def test_constant_weights_stay(self):
        model = self.model(0.3)
        averaged = AveragedWeights(model, 0.99)
        for step in range(1, 200):
            averaged.update(step)
        assert averaged.tensors["weight"].item() == pytest.approx(0.3, rel=1e-5)

    def test_it_is_a_copy_and_follows_the_optimizer(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        averaged = AveragedWeights(model, 0.9)
        before = {name: t.clone() for name, t in averaged.tensors.items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        assert all(torch.equal(averaged.tensors[n], t) for n, t in before.items())
        averaged.update(1000)
        for name, tensor in before.items():
            torch.testing.assert_close(averaged.tensors[name], tensor + 0.1)
