"""Parameter tables: every number counted once, closed forms of the Transformer, FLOPs by hand."""

import pytest
import torch

from vinedresser.config.kinds import named_model
from vinedresser.health.summary import ModelSummary, summarise
from vinedresser.model import Vocabulary

JOINT = Vocabulary(100, 100, joint=True)
NAMES = ("rnn", "rnn-small", "listener", "conv-small", "transformer-tiny")


def summary_of(name: str, vocabulary: Vocabulary = JOINT, **changes: object) -> ModelSummary:
    torch.manual_seed(0)
    return summarise(named_model(name, changes).build(vocabulary), vocabulary)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_part(name):
    model = named_model(name).build(JOINT)
    found = summarise(model, JOINT, flops=False)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert sum(part.parameters for part in found.parts) == found.parameters == found.trainable
    for part in found.parts:
        counted = sum(count * torch.Size(shape).numel() for shape, count in part.shapes)
        assert counted == part.parameters
    assert len({part.name for part in found.parts}) == len(found.parts)
    assert found.flops == 0


def test_equal_layers_are_one_part_with_the_counts_of_the_paper():
    wide = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "encoder_layers": 2, "decoder_layers": 3}
    found = {part.name: part for part in summary_of("transformer", **wide).parts}
    # methods.md 50 and 51: 1,050,624 with bias; 2,099,712, beside a LayerNorm of 1,024.
    assert found["encoder.enc_self"].copies == 2
    assert found["encoder.enc_self"].parameters == 2 * 1_050_624
    assert found["decoder.feed_forward"].copies == 3
    assert found["decoder.feed_forward"].parameters == 3 * (2_099_712 + 1024)


def test_shared_parameters_count_once_and_are_named():
    tied = summary_of("transformer-tiny", tie="all")
    apart = summary_of("transformer-tiny", tie="none")
    assert apart.parameters - tied.parameters == 2 * 100 * 128
    names = [name for part in tied.parts for name in part.tied]
    assert len(names) == 2
    assert all("target_embedding.weight" in name for name in names)
    assert not any(part.tied for part in apart.parts)


def test_frozen_parameters_are_not_trainable():
    model = named_model("rnn").build(JOINT)
    model.output.bias.requires_grad = False
    assert (
        summarise(model, JOINT, flops=False).parameters - 100
        == summarise(model, JOINT, flops=False).trainable
    )


def test_flops_are_those_of_the_matrix_products():
    # One LSTM layer a side: 8 h^2 weights a step, and the output layer; 2 FLOPs a weight.
    found = summary_of("rnn", width=64, encoder_units=64)
    assert found.flops == pytest.approx(2 * (2 * 8 * 64 * 64 + 64 * 100))
    # Attention adds QK and AV of 20 x 20 positions to the weights per layer (kernels pad to 32).
    found = summary_of("transformer-tiny")
    weights = 2 * (4 * 128**2 + 2 * 128 * 512) + 2 * (8 * 128**2 + 2 * 128 * 512) + 128 * 100
    attention = 6 * 2 * 20 * 128
    assert found.flops == pytest.approx(2 * (weights + attention))


def test_doubling_both_lengths_quadruples_attention():
    """methods.md 22: O(T U), whatever the kernels pad."""
    model = named_model("transformer-tiny").build(JOINT)
    once, twice = (n * summarise(model, JOINT, source=n, target=n).flops for n in (15, 30))
    attention = twice - 2 * once  # the rest is linear
    assert attention == 2 * (15 * 2 * 6 * 2 * 15 * 128)


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_leaves_the_model_as_it_was(name):
    model = named_model(name).build(JOINT).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert summarise(model, JOINT).flops > 0
    assert model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_frames():
    found = summary_of("listener", Vocabulary(0, 43, features=40))
    source = next(part for part in found.parts if part.name == "source_embedding")
    assert ((256, 40), 1) in source.shapes
    assert found.flops > 0
