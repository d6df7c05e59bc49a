"""What every term of the objective keeps, whichever file it is in."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vinedresser.batch import Batch
from vinedresser.config import Experiment, Terms
from vinedresser.config.kinds import kinds
from vinedresser.config.terms import TERMS
from vinedresser.model import Seq2Seq, Vocabulary
from vinedresser.objective import Part, Pass, Term
from vinedresser.special_ids import EOS, PAD

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = sorted(kinds(TERMS))
TASK = {
    "name": "t",
    "corpus": {
        "train": {"source": "a", "target": "b"},
        "dev": {"source": "c", "target": "d"},
    },
    "tokenizer": {"kind": "symbols"},
    "metric": "per",
}
# Gated, without dropout, in float64: every shipped term applies, and differences are exact.
MODEL = {
    "kind": "transformer", "d_model": 16, "d_ff": 16, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1, "dropout": 0.0, "concrete_heads": ["enc_self", "dec_enc"],
}  # fmt: skip


def a_batch(rows: int = 4) -> Batch:
    torch.manual_seed(1)
    source, target = torch.randint(4, 10, (rows, 5)), torch.randint(4, 10, (rows, 4))
    lengths = torch.arange(rows) % 3 + 2
    for row, length in enumerate(lengths.tolist()):
        source[row, length], target[row, length - 1] = EOS, EOS
        source[row, length + 1 :], target[row, length:] = PAD, PAD
    return Batch(source, lengths + 1, target, lengths, torch.arange(rows))


Made = tuple[Seq2Seq, Term, Callable[[Batch], Part]]


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest) -> Made:
    config = Experiment.from_json({"task": TASK, "model": MODEL})
    torch.manual_seed(0)
    model = config.model.build(Vocabulary(10, 10)).double().eval()
    terms = Terms.from_json({"likelihood": {"weight": 0}, request.param: {"weight": 0.5}})
    assert Terms.from_json(json.loads(json.dumps(terms.to_json()))) == terms
    term = terms.active[request.param].build(model).double().eval()

    def part(batch: Batch) -> Part:
        memory = model.encode(batch.source_BS, batch.source_lengths_B)
        return term(Pass(model, batch, memory, 3, 7, None))

    return model, term, part


def test_a_batch_is_the_sum_of_its_halves(made: Made):
    """Sums travel, means do not; a part without tokens is independent of the batch."""
    _, _, part = made
    whole, halves = part(a_batch()), [part(a_batch().rows(0, 2)), part(a_batch().rows(2, None))]
    if whole.tokens is None:
        expected = halves[0].total
    else:
        expected = halves[0].total + halves[1].total
        assert float(whole.tokens) == sum(float(half.tokens) for half in halves) > 0
    torch.testing.assert_close(whole.total, expected, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing(made: Made):
    _, _, part = made
    batch = a_batch()
    padded = replace(
        batch,
        source_BS=F.pad(batch.source_BS, (0, 3), value=PAD),
        target_BT=F.pad(batch.target_BT, (0, 2), value=PAD),
    )
    torch.testing.assert_close(part(padded).total, part(batch).total, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_finite_difference(made: Made):
    model, term, part = made
    weights = [p for p in [*model.parameters(), *term.parameters()] if p.requires_grad]
    torch.manual_seed(5)
    direction = [torch.randn_like(p) for p in weights]
    found = torch.autograd.grad(part(a_batch()).total, weights, allow_unused=True)
    slope = sum(
        float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None
    )
    values, step = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for weight, d in zip(weights, direction, strict=True):
                weight += sign * step * d
            values.append(float(part(a_batch()).total))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    assert abs(slope) > 1e-3
