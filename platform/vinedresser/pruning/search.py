"""Pruning of a finished model: search over the L0 coefficient, choice, and the compacted bundle."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from vinedresser.batch import Batch
from vinedresser.bundle import Bundle, load_bundle, save_bundle, vocabulary_of
from vinedresser.config import Section
from vinedresser.config.study import INFERRED, Distribution, Study, StudyObjective
from vinedresser.data.batching.reader import in_order, load_split
from vinedresser.data.shards import ShardSet
from vinedresser.distributed.context import RunContext
from vinedresser.evaluate import Scoring, evaluate
from vinedresser.metrics import is_lower_better
from vinedresser.pruning.heads import (
    attention_layers,
    compact,
    count_heads,
    decode_speeds,
    num_parameters,
    pruning_experiment,
)
from vinedresser.pruning.parity import certify
from vinedresser.sweep import SweepOutcome, TrialRow, sweep
from vinedresser.sweep.search import locate_sweep, read_outcome
from vinedresser.workspace.commit import is_committed, read_manifest

_log = logging.getLogger(__name__)

# Reported by trials of models with gates: open heads in evaluation.
HEADS_METRIC = "dev/heads"
# Sentences on which parity and decoding speed are measured.
_SAMPLE = 500


class Pruning(Section):
    """The search over the L0 coefficient, and the choice among its models."""

    # Keys of the finalist's experiment that differ while pruning: steps, learning rate, ...
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    # The coefficient's range; in nats per token, see expected_open_share (methods.md 90).
    space: Mapping[str, Distribution]
    # Attention kinds that get gates; empty takes all kinds of the model.
    kinds: tuple[str, ...] = ()
    num_trials: PositiveInt = 3
    concurrent: NonNegativeInt = 0
    # Points of the metric on dev by which the pruned model may be worse than the finalist. Of the
    # models within it the one with the fewest heads is taken, or else the best one.
    max_regression: NonNegativeFloat = 1.0


def held_out(shards: ShardSet) -> str:
    """Return the split that models are compared on: test, or dev where there is no test."""
    return "test" if "test" in shards.counts else "dev"


class Pruner:
    """The steps of pruning one model; each recognises its result of an earlier call.

    `name` is the prefix of folders and runs; `whole`, the model to prune, is trained to
    convergence.
    """

    def __init__(self, name: str, pruning: Pruning, whole: Bundle, context: RunContext) -> None:
        self.name, self.pruning, self.whole = name, pruning, whole
        shards = context.shards
        self.shards, self.context = shards, context
        self.metric = shards.task.metric

    def run(self) -> Bundle:
        """Search, choose and compact; return the pruned model."""
        if not self.kinds:
            return self.finish(self.whole)
        return self.finish(load_bundle(Path(self.choose(self.search()).bundle)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Attention kinds to prune: those of the configuration that were not pruned before."""
        pruned = getattr(self.whole.experiment.model, "alive_heads", {})
        kinds = self.pruning.kinds or tuple(attention_layers(self.whole.model))
        return tuple(kind for kind in kinds if kind not in pruned)

    @property
    def study(self) -> Study:
        """Search over the L0 coefficient, each trial from the converged model with open gates."""
        pruning, bundle = self.pruning, self.whole
        name = f"{self.name}-heads"
        return Study(
            name=name,
            base=pruning_experiment(bundle, {"name": name, **pruning.overrides}, kinds=self.kinds),
            space=pruning.space,
            objectives=(StudyObjective(metric=INFERRED), StudyObjective(metric=HEADS_METRIC)),
            num_trials=pruning.num_trials,
            concurrent=pruning.concurrent,
            stopping=None,
            seed=bundle.experiment.seed,
        )

    def missing(self) -> str:
        """Return the first result that is missing; "" where all are known."""
        digest = self.whole.digest
        if self.kinds:
            _, folder = locate_sweep(self.study, self.context)
            trials = read_outcome(folder, self.context.workspace)
            if trials is None:
                return f"no sweep {folder.name} of heads has ended"
            digest = read_manifest(Path(self.choose(trials).bundle)).digest
        target = self.context.workspace.model(self.name, digest)
        return "" if is_committed(target) else f"no model {target.name}"

    def search(self) -> SweepOutcome:
        """Run the search over the L0 coefficient."""
        study = self.study
        _log.info("prune: %d trials over %s", study.num_trials, ", ".join(study.space))
        return sweep(study, replace(self.context, kind="prune"))

    def choose(self, trials: SweepOutcome) -> TrialRow:
        """Return the trial with the fewest heads that is not much worse than the whole on dev."""
        sign = 1 if is_lower_better(self.metric) else -1
        limit = sign * float(self.whole.scores["dev"][self.metric]) + self.pruning.max_regression
        front = trials.pareto()
        for trial in front:
            value = trial.values[self.metric]
            _log.info(
                "prune: %.0f heads at dev %s %.2f", trial.values[HEADS_METRIC], self.metric, value
            )
        good = [trial for trial in front if sign * trial.values[self.metric] <= limit]
        chosen = good[0] if good else min(front, key=lambda t: sign * t.values[self.metric])
        _log.info("prune: taking %.0f heads", chosen.values[HEADS_METRIC])
        return chosen

    def finish(self, gated: Bundle) -> Bundle:
        """Remove heads, prove parity, score both models on the held-out split; return the model.

        A model without gates, whose heads were all pruned before, stays as it is.
        """
        target = self.context.workspace.model(self.name, gated.digest)
        if is_committed(target):
            _log.info("compact: %s unchanged", target.name)
        elif self.context.is_remote:
            from vinedresser.distributed.remote import on_cluster

            words = (
                self.name,
                self.pruning,
                str(self.whole.folder),
                self.context,
                str(gated.folder),
            )
            on_cluster(_finish, *words, cpus=gated.experiment.compute.threads)
        else:
            self._compact(gated, target)
        return load_bundle(target)

    def _compact(self, gated: Bundle, target: Path) -> None:
        """Write the bundle of the model without the closed heads of a gated one."""
        whole, shards = self.whole, self.shards
        vocabulary = vocabulary_of(
            gated.source_tokenizer,
            gated.target_tokenizer,
            joint=shards.task.has_joint_vocabulary,
        )
        config, small = gated.experiment.model, gated.model
        if self.kinds:
            config, small = compact(small, config, vocabulary)
        cap, tokens = shards.task.max_target_length, gated.experiment.decoding.max_padded_tokens
        dev, split = load_split(shards, "dev"), held_out(shards)

        def sample() -> Iterator[Batch]:
            return in_order(dev, tokens=tokens, sentences=min(_SAMPLE, len(dev.references)))

        parity = certify(gated.model, small, sample(), cap=cap)
        _log.info(
            "compact: log-probabilities differ by %.1e in fp64 and %.1e in fp32, greedy outputs of "
            "%d sentences identical", parity.max_abs, parity.max_abs_fp32, parity.sentences,
        )  # fmt: skip
        before, after = decode_speeds([whole.model, small], sample, cap=cap)
        compacted = replace(gated, model=small)
        scores = {
            "metric": self.metric,
            "dev": self._score(compacted, "dev"),
            split: self._score(compacted, split),
            "finalist": self._score(whole, split),
            "reference_digest": shards.reference_digest(split),
            "corpus": shards.meta.get("corpus"),
            "parity": parity.to_json(),
            "parity_max_abs": parity.max_abs,
            "heads": {kind: asdict(heads) for kind, heads in count_heads(gated.model).items()},
            "parameters": [num_parameters(whole.model), num_parameters(small)],
            "sentences_per_second": [round(before, 1), round(after, 1)],
        }
        objective = gated.experiment.objective.override({"head_penalty.weight": 0.0})
        save_bundle(
            target,
            experiment=gated.experiment.model_copy(
                update={"model": config, "objective": objective}
            ),
            weights=small.state_dict(),
            tokenizers=(gated.source_tokenizer, gated.target_tokenizer),
            scores=scores,
        )

    def _score(self, bundle: Bundle, split: str) -> dict[str, Any]:
        evaluated = evaluate(
            bundle.model,
            load_split(self.shards, split),
            bundle.target_tokenizer,
            Scoring(self.metric, bundle.experiment.decoding, self.shards.task.max_target_length),
        )
        return evaluated.scores.to_json()


def _finish(*words: Any) -> None:
    """Run `Pruner.finish` in a task: with the models by their folders, on this node."""
    name, pruning, whole, context, gated = words
    pruner = Pruner(name, pruning, load_bundle(Path(whole)), replace(context, is_remote=False))
    pruner.finish(load_bundle(Path(gated)))
