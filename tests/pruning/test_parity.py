"""The certificate: rounding passes, a wrong weight does not (methods.md 85)."""

import copy
import math
import random

import pytest
import torch

from tests.batches import pad_ids
from trainables.transformer import TransformerConfig
from vinedresser.batch import Batch
from vinedresser.errors import TrainingError
from vinedresser.metrics import PARITY_TOLERANCE
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.nn.gates import head_gates
from vinedresser.pruning.heads import compact
from vinedresser.pruning.parity import certify
from vinedresser.special_ids import EOS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

VOCABULARY = Vocabulary(12, 12, joint=True)
CLOSED, OPEN, AJAR = -4.0, 4.0, 0.7


@pytest.fixture
def batch() -> Batch:
    draw = random.Random(1)
    rows = [
        [[draw.randint(4, 11) for _ in range(draw.randint(0, 8))] + [EOS] for _ in range(6)]
        for _ in range(2)
    ]
    return Batch(*pad_ids(rows[0]), *pad_ids(rows[1]), torch.arange(6))


@pytest.fixture
def pair() -> tuple[Seq2Seq, Seq2Seq]:
    """A model with closed, open and undecided gates, and what `compact` makes of it."""
    small = {"d_model": 16, "d_ff": 32, "num_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    kinds = ("enc_self", "dec_self", "dec_enc")
    config = TransformerConfig.from_json({**small, "concrete_heads": kinds, "tie": "none"})
    torch.manual_seed(2)
    draw, model = random.Random(2), config.build(VOCABULARY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for gates in head_gates(model):
        gates.log_alpha.data = torch.tensor([draw.choice([CLOSED, OPEN, AJAR]) for _ in range(4)])
    return model, compact(model, config, VOCABULARY)[1]


def test_holds_for_a_compacted_model(pair, batch):
    parity = certify(*pair, iter([batch, batch]), cap=20)
    assert parity.holds
    assert 0 < parity.max_abs < PARITY_TOLERANCE / 10
    assert parity.max_abs < parity.max_abs_fp32 < 1e-4
    assert (parity.sentences, parity.tokens) == (12, 2 * int(batch.tokens))
    assert parity.to_json() == {
        "max_abs": parity.max_abs,
        "max_abs_fp32": parity.max_abs_fp32,
        "is_same_output": True,
        "sentences": 12,
        "tokens": 2 * int(batch.tokens),
        "precision": "fp64",
        "tolerance": 1e-5,
    }


def test_rounding_of_large_scores_in_fp32_is_not_taken_for_a_difference(pair, batch):
    """Real models reach log-probabilities of -40, and fp32 then errs by more than the tolerance."""
    model, smaller = (copy.deepcopy(one) for one in pair)
    for one in (model, smaller):
        one.output.weight.data *= 40
    parity = certify(model, smaller, iter([batch]), cap=20)
    assert parity.holds
    assert parity.max_abs_fp32 > PARITY_TOLERANCE


def test_models_and_their_weights_are_not_changed(pair, batch):
    before = [{name: t.clone() for name, t in one.state_dict().items()} for one in pair]
    certify(*pair, iter([batch]), cap=20)
    for one, weights in zip(pair, before, strict=True):
        assert all(torch.equal(one.state_dict()[name], t) for name, t in weights.items())
        assert {t.dtype for t in one.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["output.bias", "decoder.1.feed_forward.outer.weight"])
@pytest.mark.parametrize("change", [0.05, 5e-4])
def test_refuses_a_perturbed_weight(pair, batch, name, change):
    weight = dict(pair[1].named_parameters())[name]
    weight.data.view(-1)[5] += change
    with pytest.raises(TrainingError, match="not the trained one"):
        certify(*pair, iter([batch]), cap=20)


def test_refuses_what_is_not_a_number(pair, batch):
    for model in pair:
        model.output.bias.data[4] = math.nan
    with pytest.raises(TrainingError, match="not the trained one"):
        certify(*pair, iter([batch]), cap=20)


def test_refuses_to_certify_on_nothing(pair):
    with pytest.raises(TrainingError, match="no sentences"):
        certify(*pair, iter([]), cap=20)


def test_the_message_names_the_difference(pair, batch):
    pair[1].output.bias.data[EOS] += 0.001  # too little to change an output
    with pytest.raises(TrainingError, match=r"differ by [3-9]\.\d\de-04.*greedy outputs agree"):
        certify(*pair, iter([batch]), cap=20)
