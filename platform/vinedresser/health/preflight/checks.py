"""Preflight checks of one experiment, in reading order."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vinedresser.bundle import load_bundle, refuse_other_pieces, vocabulary_of, warm_start
from vinedresser.config import Experiment, ModelConfig
from vinedresser.data.batching.reader import in_order, load_split, stream
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.decode import length_limits
from vinedresser.health.preflight import data
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.independence import (
    check_batch_invariance,
    check_stepwise_equality,
)
from vinedresser.health.preflight.learning import (
    check_conditioning,
    check_first_loss,
    check_gradients,
    check_overfitting,
    short,
)
from vinedresser.health.preflight.resources import (
    check_cost,
    check_memory,
    evaluation_seconds,
    speed,
)
from vinedresser.health.preflight.sentences import (
    collated,
    distinct,
    sentences_of,
    spread,
)
from vinedresser.model import Seq2Seq
from vinedresser.objective import Objective
from vinedresser.training.device import refuse_too_large, resolve_device, seed_step
from vinedresser.training.optimizer import freeze

# Batches from which sentences are taken, each of one length: enough for all lengths.
_SAMPLED = 12
# Sentences that are overfitted, compared alone and together, and decoded in both ways.
_OVERFITTED, _COMPARED, _DECODED = 8, 16, 4
# Dev rows that the conditioning gap is measured on.
_HELD_OUT = 256
# The short training's batches hold this share of the budget: more updates in less time; but at
# least this number of the longest rows.
_SHARE, _LONGEST_ROWS = 0.25, 8

Begin = Callable[[str], None]


def checks(
    experiment: Experiment,
    shards: ShardSet,
    *,
    price: float = 0.0,
    begin: Begin = lambda _: None,
) -> Iterator[CheckResult]:
    """Run all checks, one after another; write nothing.

    `price` is that of an hour of one worker, for the cost, 0 if unknown; `begin` is called with the
    name of each part before it starts.

    Raises:
        ConfigError: the model cannot be built for these vocabularies, or a pattern of optim.freeze
            names nothing.
        DataError: a row is longer than the batch budget.
        MachineError: the device is not here.
    """
    subject = _Subject(experiment, shards)
    begin("data")
    yield data.check_content(shards, subject.sample, subject.encoders)
    yield data.check_lengths(shards, experiment, subject.dev)
    yield from _of_a_dry_model(subject, begin)
    yield from _of_the_model(subject, begin, price)


class _Subject:
    """An experiment with its opened data, and models of it."""

    def __init__(self, experiment: Experiment, shards: ShardSet) -> None:
        self.experiment, self.shards = experiment, shards
        self.device = resolve_device(experiment.compute.model_copy(update={"workers": 1}))
        self.encoders = tokenizers(shards)
        self.vocabulary = vocabulary_of(*self.encoders, joint=shards.task.has_joint_vocabulary)
        self.dev = load_split(shards, "dev")
        self.cap = experiment.task.max_target_length
        with closing(stream(shards, experiment.batch, seed=experiment.seed)) as batches:
            self.sample = [s for b in islice(batches, _SAMPLED) for s in sentences_of(b)]
        self.dry: Seq2Seq | None = None

    def build(self, config: ModelConfig) -> Seq2Seq:
        """Build the model as a run has it before its first update, in training mode."""
        experiment = self.experiment
        refuse_too_large(config, self.vocabulary)
        seed_step(experiment.seed, 0, 0)
        model = config.instantiate(self.vocabulary)
        if experiment.init is not None:
            bundle = load_bundle(Path(experiment.init))
            refuse_other_pieces(bundle, *self.encoders)
            warm_start(model, bundle, config, partial=experiment.init_partial)
        return model.to_devices(
            encoder=self.device.encoder_device, decoder=self.device.primary
        ).train()

    @property
    def short_tokens(self) -> int:
        """Return the padded tokens per batch of the short training."""
        tokens = self.experiment.batch.max_padded_tokens
        longest = max(s.longest for s in self.sample)
        return min(tokens, max(int(_SHARE * tokens), _LONGEST_ROWS * longest))


def dry(config: ModelConfig) -> ModelConfig:
    """Return the model's configuration with every key named dropout at 0."""
    return config.override(dict.fromkeys(_dropouts(config.to_json()), 0.0))


def _dropouts(tree: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dropouts(value, f"{at}{key}.")
        elif "dropout" in key and isinstance(value, float | int) and value:
            yield f"{at}{key}"


def _of_a_dry_model(subject: _Subject, begin: Begin) -> Iterator[CheckResult]:
    """Run the checks without dropout: first loss, gradients, stepwise equality, overfitting."""
    is_fresh = subject.experiment.init is None
    begin("first loss")
    model = subject.build(dry(subject.experiment.model))
    some = collated(spread(subject.sample, _COMPARED))
    size = subject.vocabulary.target
    yield check_first_loss(model, some, vocabulary=size, is_fresh=is_fresh)
    yield check_gradients(model, some)
    exact = subject.build(dry(subject.experiment.model))
    yield check_stepwise_equality(exact, spread(subject.sample, _DECODED))
    begin("overfitting one batch")
    # Of the shorter half: short sentences show as much as long ones.
    # Decoding must be able to become as long as the target.
    unique = distinct(subject.sample)
    limits_B = length_limits(torch.tensor([len(s.source_S) for s in unique]), subject.cap)
    able = [s for s, limit in zip(unique, limits_B, strict=True) if len(s.target_T) <= int(limit)]
    able.sort(key=lambda s: s.longest)
    subject.dry = model
    if not able:
        yield CheckResult(
            "overfit one batch", None, "no target within an output's limit", "8 sentences",
            "raise task.max_target_length; see `lengths`",
        )  # fmt: skip
        return
    yield check_overfitting(
        model, spread(able[: max(_OVERFITTED, len(able) // 2)], _OVERFITTED), subject.device,
        cap=subject.cap,
    )  # fmt: skip


def _of_the_model(subject: _Subject, begin: Begin, price: float) -> Iterator[CheckResult]:
    """Run the checks with dropout, precision, objective and optimizer as configured."""
    experiment, shards, device = subject.experiment, subject.shards, subject.device
    model = subject.build(experiment.model)
    freeze(model, experiment.optim.freeze)
    objective = Objective(experiment.objective, model, subject.encoders[1])
    begin("a short training")
    brief = short(experiment, tokens=subject.short_tokens)
    dev = list(
        in_order(subject.dev, tokens=experiment.decoding.max_padded_tokens, sentences=_HELD_OUT)
    )
    with closing(stream(shards, brief.batch, seed=experiment.seed)) as batches:
        yield check_conditioning(
            objective, batches, dev, brief, device, vocabulary=subject.vocabulary.target
        )
    begin("batch invariance")
    assert subject.dry is not None
    compared = spread(subject.sample, _COMPARED)
    yield check_batch_invariance(
        model, subject.dry, compared, vocabulary=subject.vocabulary.source, cap=subject.cap
    )
    begin("memory")
    yield check_memory(objective, collated(compared[: _COMPARED // 2]), experiment, device)
    begin("speed")
    with closing(stream(shards, experiment.batch, seed=experiment.seed)) as batches:
        found = speed(objective, batches, experiment, device)
    begin("one evaluation")
    seconds = evaluation_seconds(model, subject.dev, subject.encoders[1], experiment)
    yield check_cost(experiment, shards, found, seconds, price=price)
