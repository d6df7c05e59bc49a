"""Pruning a finished model: a search over the L0 coefficient, the choice, the compacted bundle."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from vinedresser.batch import Batch
from vinedresser.bundle import Bundle, load_bundle, save_bundle, vocabulary_of
from vinedresser.config import MetricName, Section
from vinedresser.config.study import Distribution, Study
from vinedresser.data.batching.reader import in_order, load_split
from vinedresser.data.shards import ShardSet
from vinedresser.distributed import Site
from vinedresser.evaluate import evaluate
from vinedresser.metrics import is_lower_better
from vinedresser.pruning.heads import (
    attention_layers,
    certify,
    compact,
    count_heads,
    decode_speeds,
    num_parameters,
    pruning_experiment,
)
from vinedresser.sweep import SweepOutcome, TrialRow, sweep
from vinedresser.workspace.commit import is_committed

Say = Callable[[str], None]

# Sentences on which parity and decoding speed are measured.
_SAMPLE = 500


class Pruning(Section):
    """The search over the L0 coefficient, and which of its models is taken."""

    # Keys of the finalist's experiment that differ while pruning: steps, learning rate, ...
    overrides: Mapping[str, Any] = Field(default_factory=dict)
    # The coefficient's range; methods.md 90 and its trap on conventions.
    space: Mapping[str, Distribution]
    # Attention kinds that get gates; empty takes all that the model has.
    kinds: tuple[str, ...] = ()
    num_trials: PositiveInt = 3
    concurrent: NonNegativeInt = 0
    # Points of the metric on dev that the pruned model may be worse than the finalist. Of the
    # models within it the one with the fewest heads is taken, or else the best one.
    max_regression: NonNegativeFloat = 1.0


class Pruner:
    """Prunes one model; every step is recognised when it was done before.

    Attributes:
        name: prefix of folders and runs.
        whole: the model to prune, trained to convergence.
    """

    def __init__(
        self, name: str, pruning: Pruning, whole: Path, *, shards: ShardSet, site: Site, say: Say
    ) -> None:
        self.name, self.pruning, self.whole = name, pruning, load_bundle(whole)
        self.shards, self.site, self.say = shards, site, say
        self.task = shards.task
        self.metric: MetricName = self.task.metric

    def run(self) -> Path:
        """Search, choice and compaction; the folder of the pruned bundle."""
        return self.compact(self.choose(self.search()))

    def search(self) -> SweepOutcome:
        """Gates from the converged model, a search over the L0 coefficient."""
        pruning, bundle = self.pruning, self.whole
        kinds = pruning.kinds or tuple(attention_layers(bundle.model))
        name = f"{self.name}-heads"
        base = pruning_experiment(bundle, {"name": name, **pruning.overrides}, kinds=kinds)
        study = Study(
            name=name,
            base=base,
            space=pruning.space,
            objective="inferred_and_heads",
            num_trials=pruning.num_trials,
            concurrent=pruning.concurrent,
            stopping=None,
            seed=bundle.experiment.seed,
        )
        self.say(f"prune: {study.num_trials} trials over {', '.join(study.space)}")
        site = replace(self.site, kind="prune")
        return sweep(study, site, shards_digest=self.shards.digest, say=self.say)

    def choose(self, trials: SweepOutcome) -> TrialRow:
        """The trial with the fewest heads that is not much worse than the whole one on dev."""
        sign = 1 if is_lower_better(self.metric) else -1
        limit = sign * float(self.whole.scores["dev"][self.metric]) + self.pruning.max_regression
        front = trials.pareto()
        for trial in front:
            self.say(f"prune: {trial.heads:.0f} heads at dev {self.metric} {trial.value:.2f}")
        good = [trial for trial in front if sign * trial.value <= limit]
        chosen = good[0] if good else min(front, key=lambda trial: sign * trial.value)
        self.say(f"prune: taking {chosen.heads:.0f} heads")
        return chosen

    def compact(self, pruned: TrialRow) -> Path:
        """Heads removed, parity proved, both models scored held out; the bundle's folder."""
        gated, whole = load_bundle(Path(pruned.bundle)), self.whole
        target = Path(self.site.workspace) / "models" / f"{self.name}-{gated.digest[:12]}"
        if is_committed(target):
            self.say(f"compact: {target.name} unchanged")
            return target
        vocabulary = vocabulary_of(
            gated.source_tokenizer,
            gated.target_tokenizer,
            joint=self.task.has_joint_vocabulary,
        )
        config, small = compact(gated.model, gated.experiment.model, vocabulary)
        cap, tokens = self.task.max_target_length, gated.experiment.evaluation.tokens
        dev = load_split(self.shards, "dev")

        def sample() -> Iterator[Batch]:
            return in_order(dev, tokens=tokens, sentences=min(_SAMPLE, len(dev.references)))

        parity = certify(gated.model, small, sample(), cap=cap)
        before, after = decode_speeds([whole.model, small], sample, cap=cap)
        experiment = gated.experiment.model_copy(
            update={"model": config, "objective": gated.experiment.objective.override({"l0": 0.0})}
        )
        scores = {
            "metric": self.metric,
            "lower_is_better": is_lower_better(self.metric),
            "dev": self._score(replace(gated, model=small), "dev"),
            self.held_out: self._score(replace(gated, model=small), self.held_out),
            "finalist": self._score(whole, self.held_out),
            "reference_digest": self.shards.reference_digest(self.held_out),
            "parity": parity.to_json(),
            "parity_max_abs": parity.max_abs,
            "heads": {kind: asdict(heads) for kind, heads in count_heads(gated.model).items()},
            "parameters": [num_parameters(whole.model), num_parameters(small)],
            "sentences_per_second": [round(before, 1), round(after, 1)],
        }
        self.say(
            f"compact: logits differ by {parity.max_abs:.1e} at most, greedy outputs of "
            f"{parity.sentences} sentences identical"
        )
        return save_bundle(
            target,
            experiment=experiment,
            weights=small.state_dict(),
            tokenizers=(gated.source_tokenizer, gated.target_tokenizer),
            scores=scores,
        )

    @property
    def held_out(self) -> str:
        """The split that models are compared on: test, or dev where there is no test."""
        return "test" if "test" in self.shards.counts else "dev"

    def _score(self, bundle: Bundle, split: str) -> dict[str, Any]:
        evaluated = evaluate(
            bundle.model,
            load_split(self.shards, split),
            bundle.target_tokenizer,
            metric=self.metric,
            config=bundle.experiment.evaluation.override({"sentences": 0}),
            cap=self.task.max_target_length,
        )
        return evaluated.scores.to_json()
