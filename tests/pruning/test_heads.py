"""Random gates in, a smaller model that is the same function out (methods.md 85-87)."""

import random

import pytest
import torch

from tests.batches import pad_ids
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.config.kinds import ZOO, ModelConfig, kind_class
from vinedresser.decode import greedy
from vinedresser.errors import ConfigError
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.pruning.heads import (
    Heads,
    attention_layers,
    compact,
    count_heads,
    decode_speeds,
    num_parameters,
)
from vinedresser.special_ids import EOS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

KINDS = ("enc_self", "dec_self", "dec_enc")
VOCABULARY = Vocabulary(12, 12, joint=True)
CLOSED, OPEN, AJAR = -4.0, 4.0, 0.7


def config_of(**changes: object) -> TransformerConfig:
    small = {"d_model": 16, "d_ff": 32, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    return TransformerConfig.from_json({**small, "concrete_heads": KINDS, **changes})


def gated(config: TransformerConfig, seed: int) -> Seq2Seq:
    """Weights and gates at random: about half closed, some in between, some layers all closed."""
    torch.manual_seed(seed)
    draw, model = random.Random(seed), config.build(VOCABULARY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layers in attention_layers(model).values():
        for number, (_, layer) in enumerate(layers):
            if layer.gates is None:
                continue
            heads = layer.num_heads
            values = [draw.choice([CLOSED, CLOSED, OPEN, AJAR, -AJAR]) for _ in range(heads)]
            if (seed + number) % 3 == 0:
                values = [CLOSED] * heads
            layer.gates.log_alpha.data = torch.tensor(values)
    return model


@pytest.fixture
def batch() -> Batch:
    draw = random.Random(1)
    rows = [
        [[draw.randint(4, 11) for _ in range(draw.randint(0, 8))] + [EOS] for _ in range(6)]
        for _ in range(2)
    ]
    return Batch(*pad_ids(rows[0]), *pad_ids(rows[1]), torch.arange(6))


def log_probs(model: Seq2Seq, batch: Batch) -> torch.Tensor:
    return model.output.log_probs(model(batch)).detach()


FORMS = {
    "pre": {},
    "post": {"norm": "post"},
    "head_dim": {"head_dim": 6, "tie": "none"},
    "one_kind": {"concrete_heads": ("dec_enc",)},
    "pruned_before": {
        "concrete_heads": ("enc_self",),
        "alive_heads": {"dec_self": ((1, 0, 0, 1), (0, 0, 0, 0))},
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_the_compacted_model_is_the_same_function(form, seed, batch):
    config = config_of(**FORMS[form])
    model = gated(config, seed)
    smaller_config, smaller = compact(model, config, VOCABULARY)
    real = batch.is_real_BT
    scale = float(log_probs(model, batch)[real].abs().max())
    difference = (log_probs(model, batch) - log_probs(smaller, batch))[real].abs().max()
    assert float(difference) < 1e-5 * max(1, scale)
    outputs = [
        greedy(m, batch.source_BS, batch.source_lengths_B, cap=20).ids for m in (model, smaller)
    ]
    assert outputs[0] == outputs[1]
    before, after = count_heads(model), count_heads(smaller)
    assert {kind: (h.kept, 0) for kind, h in before.items()} == {
        kind: (h.total, h.undecided) for kind, h in after.items()
    }
    assert num_parameters(smaller) < num_parameters(model)
    assert isinstance(smaller_config, TransformerConfig)
    assert smaller_config.concrete_heads == ()


@pytest.mark.parametrize("seed", range(3))
def test_the_configuration_rebuilds_the_smaller_model(seed, batch):
    config = config_of()
    smaller_config, smaller = compact(gated(config, seed), config, VOCABULARY)
    plain = smaller_config.to_json()
    again = kind_class(ZOO, plain["kind"], ModelConfig).from_json(plain)
    assert again == smaller_config
    torch.manual_seed(seed + 100)
    rebuilt = again.build(VOCABULARY).eval()
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(log_probs(rebuilt, batch), log_probs(smaller, batch))


def test_fixed_alive_heads_equal_the_pruned_model(batch):
    """methods.md 87: the same 0/1 matrices, written by hand, build the same shapes."""
    config = config_of(encoder_layers=1, decoder_layers=1)
    model = gated(config, 0)
    gates = {"enc_self": [1, 0, 0, 1], "dec_self": [0, 0, 0, 0], "dec_enc": [1, 1, 1, 0]}
    for kind, ((_, layer),) in attention_layers(model).items():
        values = [OPEN if alive else CLOSED for alive in gates[kind]]
        layer.gates.log_alpha.data = torch.tensor(values)
    by_hand = config.override(
        {"concrete_heads": [], "alive_heads": {kind: [row] for kind, row in gates.items()}}
    )
    found, smaller = compact(model, config, VOCABULARY)
    assert found == by_hand
    other = by_hand.build(VOCABULARY).eval()
    other.load_state_dict(smaller.state_dict())
    torch.testing.assert_close(
        log_probs(other, batch), log_probs(model, batch), atol=1e-5, rtol=1e-5
    )


def test_parameters_saved_by_hand():
    config = config_of()
    model = gated(config, 3)
    _, smaller = compact(model, config, VOCABULARY)
    closed = sum(h.total - h.kept for h in count_heads(model).values())
    gates = sum(h.total for h in count_heads(model).values())
    per_head = 3 * (16 * 4 + 4) + 4 * 16  # query, key, value with bias, and the output's columns
    assert num_parameters(model) - num_parameters(smaller) == closed * per_head + gates


def test_heads_are_counted_by_kind():
    config = config_of(concrete_heads=("enc_self", "dec_enc"))
    model = gated(config, 0)
    for _, layer in attention_layers(model)["enc_self"]:
        layer.gates.log_alpha.data = torch.tensor([OPEN, AJAR, CLOSED, CLOSED])
    for _, layer in attention_layers(model)["dec_enc"]:
        layer.gates.log_alpha.data = torch.tensor([OPEN, OPEN, OPEN, -AJAR])
    assert count_heads(model) == {
        "enc_self": Heads(kept=4, total=8, undecided=2),
        "dec_self": Heads(kept=8, total=8, undecided=0),
        "dec_enc": Heads(kept=8, total=8, undecided=2),
    }


def test_the_larger_model_is_left_alone(batch):
    config = config_of()
    model = gated(config, 1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    _, smaller = compact(model, config, VOCABULARY)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter += 1
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert model.training
    assert not smaller.training


def test_a_model_without_gates_has_nothing_to_close():
    config = config_of(concrete_heads=())
    with pytest.raises(ConfigError, match=r"no gates to close.*concrete_heads"):
        compact(config.build(VOCABULARY), config, VOCABULARY)


def test_speeds_are_sentences_per_second(batch):
    config = config_of()
    model = gated(config, 0)
    speeds = decode_speeds([model, model], lambda: iter([batch]), cap=3, rounds=2)
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)


def test_gates_start_open_from_a_finished_model():
    config = config_of()
    assert all(h.kept == h.total for h in count_heads(config.build(VOCABULARY)).values())
    corpus = {"train": {"source": "a", "target": "b"}, "dev": {"source": "c", "target": "d"}}
    task = {"name": "t", "corpus": corpus, "tokenizer": {"kind": "symbols"}, "metric": "per"}
    with pytest.raises(ConfigError, match="no gates"):
        Experiment.from_json(
            {
                "task": task,
                "model": {"kind": "transformer"},
                "objective": {"head_penalty": {"weight": 0.1}},
            }
        )
