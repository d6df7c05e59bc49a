"""Planted faults are found by the right check and by no other; healthy models pass all."""

import gc
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from trainables.transformer import Transformer, TransformerConfig
from vinedresser.config import Experiment, Task, Tokenizer
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import ShardSet, prepare
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.checks import checks
from vinedresser.model import Memory, Vocabulary
from vinedresser.nn.output import FullOutput
from vinedresser.special_ids import PAD

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
NAMES = [
    "data", "lengths", "first loss", "gradients reach", "stepwise equality",
    "overfit one batch", "conditioning", "batch invariance", "memory slope", "time and cost",
]  # fmt: skip


class _Deaf(Transformer):
    """Its decoder attends to nothing."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        memory = super().encode(source_BS, source_lengths_B)
        return Memory(memory.states_BSD * 0, memory.is_real_BS)


class _Detached(Transformer):
    """Its encoder is heard and never taught."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        memory = super().encode(source_BS, source_lengths_B)
        return Memory(memory.states_BSD.detach(), memory.is_real_BS)


class _Biased(Transformer):
    """Its output layer starts out sure of one token."""

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        self.output.bias.data[PAD] = 5.0


class _Skewed(FullOutput):
    """It trains on its scores and decodes with more than that."""

    def log_probs(self, states: Tensor) -> Tensor:
        scores = super().log_probs(states)
        scores[..., PAD] += 5.0
        return scores.log_softmax(-1)


class _Split(Transformer):
    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        self.output = _Skewed(config.d_model, vocabulary.target)


class _Mixing(Transformer):
    """Its sentences see each other."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        memory = super().encode(source_BS, source_lengths_B)
        mean_1SD = memory.states_BSD.mean(0, keepdim=True)
        return Memory(memory.states_BSD + 0.1 * mean_1SD, memory.is_real_BS)


class _Leaking(Transformer):
    """It keeps what it has seen, with the whole graph behind it."""

    def encode(self, source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
        memory = super().encode(source_BS, source_lengths_B)
        if torch.is_grad_enabled():
            self.__dict__.setdefault("kept", []).append(memory.states_BSD)
        return memory


_FAULTS = {
    "deaf": _Deaf, "detached": _Detached, "biased": _Biased, "split": _Split, "mixing": _Mixing,
    "leaking": _Leaking,
}  # fmt: skip


class FaultyConfig(TransformerConfig):
    """A Transformer with one fault."""

    fault: Literal["deaf", "detached", "biased", "split", "mixing", "leaking"]

    def build(self, vocabulary: Vocabulary) -> Transformer:
        return _FAULTS[self.fault](self, vocabulary)


def written(folder: Path, *, is_shuffled: bool = False) -> ShardSet:
    """Strings and their reversals, all distinct; or each with the reversal of another."""
    draw, rows = random.Random(0), set()
    while len(rows) < 900:
        rows.add(" ".join(draw.choices("abcdef", k=draw.randint(4, 8))))
    strings, pairs = sorted(rows), {}
    draw.shuffle(strings)
    for split, part in (("train", strings[:800]), ("dev", strings[800:])):
        ends = [row[::-1] for row in part]
        if is_shuffled:
            draw.shuffle(ends)
        paths = {}
        for side, lines in (("source", part), ("target", ends)):
            path = folder / f"{split}.{side}"
            path.write_text("".join(f"{line}\n" for line in lines))
            paths[side] = str(path)
        pairs[split] = Pair(**paths)
    task = Task(
        name="reversal", corpus=TextCorpus(**pairs), tokenizer=Tokenizer(kind="symbols"),
        metric="per", max_source_length=20, max_target_length=20,
    )  # fmt: skip
    return prepare(task, folder / "shards", executor="in_process")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return written(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def experiment(tiny_study: dict[str, Any], shards: ShardSet) -> Experiment:
    return Experiment.from_json({**tiny_study["base"], "task": shards.task.to_json()})


def ran(experiment: Experiment, shards: ShardSet, **options: float) -> dict[str, CheckResult]:
    found = {check.name: check for check in checks(experiment, shards, **options)}
    gc.collect()
    assert list(found) == NAMES
    return found


def failed(found: Mapping[str, CheckResult]) -> set[str]:
    """Names of the failures, each of which has a pointer."""
    names = {name for name, check in found.items() if check.passed is False}
    assert all(found[name].pointer for name in names)
    return names


@pytest.mark.slow
def test_a_healthy_experiment_passes(experiment, shards):
    found = ran(experiment, shards, price=3600.0)
    assert failed(found) == set()
    assert all(check.passed for check in found.values())
    # A currency unit a second: the price is the time.
    figures = found["time and cost"].figures
    assert figures["price"] == pytest.approx(figures["seconds"])
    parts = figures["training_seconds"] + figures["evaluation_seconds"]
    assert figures["seconds"] == pytest.approx(parts)
    assert found["conditioning"].figures["gap"] > 0.02
    assert found["overfit one batch"].figures["loss"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        # Eight sentences that begin alike cannot be told apart without their sources.
        ("deaf", {"conditioning", "overfit one batch", "gradients reach"}),
        # Random states of the source are enough to be heard.
        ("detached", {"gradients reach"}),
        ("biased", {"first loss"}),
        ("split", {"first loss"}),
        ("mixing", {"batch invariance"}),
        ("leaking", {"memory slope"}),
    ],
)
def test_a_fault_fails_what_it_must(experiment, shards, fault, wanted):
    model = FaultyConfig.from_json(
        {**{k: v for k, v in experiment.model.to_json().items() if k != "kind"}, "fault": fault}
    )
    found = ran(experiment.model_copy(update={"model": model}), shards)
    assert failed(found) == wanted


@pytest.mark.slow
def test_mis_encoded_targets_fail_conditioning(experiment, tmp_path):
    found = ran(experiment, written(tmp_path, is_shuffled=True))
    assert failed(found) >= {"conditioning"}
    # Lengths tell it too, before anything is trained.
    assert failed(found) == {"conditioning", "data"}
    assert abs(found["conditioning"].figures["gap"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"kind": "rnn", "width": 64, "encoder_units": 64},
        {"kind": "attention_rnn", "width": 32, "encoder_units": 16},
        {"kind": "conv", **SMALL},
        {"kind": "transformer", **SMALL, "concrete_heads": ["enc_self", "dec_self", "dec_enc"]},
        {"kind": "transformer", **SMALL, "norm_kind": "batch"},
    ],
    ids=["rnn", "attention_rnn", "conv", "gated", "batch_norm"],
)
def test_healthy_models_pass(experiment, shards, model):
    changed = Experiment.from_json({**experiment.to_json(), "model": model})
    assert failed(ran(changed, shards)) == set()
