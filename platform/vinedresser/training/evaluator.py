"""Evaluator: decode the averaged weights on the dev split and keep the weights that ship."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vinedresser.breakdown import by_length, by_position, sentences
from vinedresser.bundle import vocabulary_of
from vinedresser.config import Experiment
from vinedresser.data.batching.reader import in_order, load_split
from vinedresser.data.shards import ShardSet
from vinedresser.errors import TrainingError
from vinedresser.evaluate import (
    Evaluated,
    Scoring,
    conditioning_gap,
    evaluate,
    measure_exposure_gap,
)
from vinedresser.figures.attention_maps import AttentionWatch, Tokenizers
from vinedresser.metrics import is_better, worst
from vinedresser.nn.gates import head_gates
from vinedresser.tracking import NullTracker, Tracker
from vinedresser.training.device import Device
from vinedresser.training.listener import Best

# Dev sentences whose sources are exchanged at each evaluation: the standard error of the gap is
# below 0.2 nats per token from 64 sentences on.
_EXCHANGED = 128


class Evaluator:
    """Evaluation of the averaged weights with a second copy of the model, on rank 0.

    Attributes:
        best: the weights that ship, by name; empty before the first evaluation with finite loss.
        best_step: the update after which they were taken.
        best_scores: dev Scores of them as plain JSON.
        history: one entry per evaluation: step, value, teacher_forced_loss, and heads where gated.
    """

    def __init__(
        self,
        experiment: Experiment,
        shards: ShardSet,
        tokenizers: Tokenizers,
        *,
        device: Device,
        tracker: Tracker,
    ) -> None:
        self._experiment, self._tokenizers, self._tracker = experiment, tokenizers, tracker
        self._device = device
        self.best: dict[str, Tensor] = {}
        self.best_step = 0
        self.best_scores: dict[str, Any] = {}
        self.history: list[dict[str, float]] = []
        self._shipping: Evaluated | None = None
        self._watch: AttentionWatch | None = None
        if device.rank > 0:
            return
        self._dev = load_split(shards, "dev")
        if not isinstance(tracker, NullTracker):
            self._watch = AttentionWatch(self._dev, tokenizers)
        joint = shards.task.has_joint_vocabulary
        self.model = experiment.model.build(vocabulary_of(*tokenizers, joint=joint))
        self.model.to_devices(encoder=device.encoder_device, decoder=device.primary).eval()

    def state_dict(self) -> dict[str, Any]:
        """Return `tensors` (the best weights by name) and `scalars` (plain JSON)."""
        scalars = {
            "best_step": self.best_step,
            "best_scores": self.best_scores,
            "history": self.history,
        }
        return {"tensors": self.best, "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, with the tensors on the device of this worker."""
        self.best = {name: t.to(self._device.primary) for name, t in state["tensors"].items()}
        scalars = state["scalars"]
        self.best_step, self.best_scores = scalars["best_step"], scalars["best_scores"]
        self.history = list(scalars["history"])

    @property
    def step(self) -> int:
        """Return the update of the last evaluation, 0 before the first."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def best_so_far(self) -> Best | None:
        """Return the best evaluation with a finite loss by the inferred metric, if there is one.

        Progress, samplers and early stopping read it, so it never gets worse. In runs with gates
        the last weights ship, and their value is in `best_scores`: with gates open a model is
        better and has not yet paid for its heads (methods.md 13).
        """
        metric = self._experiment.task.metric
        best: Best | None = None
        for entry in self.history:
            value = entry["value"]
            if math.isfinite(entry["teacher_forced_loss"]) and (
                best is None or math.isnan(best.value) or is_better(metric, value, best.value)
            ):
                best = Best(metric, value, int(entry["step"]))
        return best

    def evaluate(
        self, weights: Mapping[str, Tensor], step: int, should_stop: Callable[[], bool]
    ) -> dict[str, float]:
        """Decode dev, keep the weights if they ship, store samples and figures.

        Returns:
            Metrics of the evaluation.

        Raises:
            InterruptedRunError: `should_stop` returned true; nothing has changed.
            TrainingError: at the last step, if the loss on dev was finite at none.
        """
        experiment, metric = self._experiment, self._experiment.task.metric
        self.model.load_state_dict(weights)
        scoring = Scoring.of(experiment, sentences=experiment.evaluation.sentences)
        target = self._tokenizers[1]
        evaluated = evaluate(self.model, self._dev, target, scoring, should_stop=should_stop)
        gates = head_gates(self.model)
        open_heads = float(sum(int((g.deterministic() > 0).sum()) for g in gates))
        self._keep(evaluated, weights, step, {"heads": open_heads} if gates else {})
        rows = ["source\treference\thypothesis", *("\t".join(r) for r in evaluated.samples())]
        self._tracker.text("\n".join(rows) + "\n", f"samples/step-{step:08d}.tsv")
        best = self.best_so_far
        metrics = {
            f"dev/{metric}": evaluated.scores.value,
            f"best/{metric}": best.value if best else math.nan,
            "dev/teacher_forced_loss": evaluated.scores.teacher_forced_loss,
            "dev/teacher_forced_error": evaluated.scores.teacher_forced_error,
            "dev/exposure_gap": measure_exposure_gap(evaluated, target),
            "dev/length_ratio": evaluated.scores.length_ratio,
        }
        tokens = experiment.decoding.max_padded_tokens
        slice_ = in_order(self._dev, tokens=tokens, sentences=_EXCHANGED)
        if pairs := [batch for batch in slice_ if len(batch.rows_B) > 1]:
            found = conditioning_gap(self.model, pairs)
            metrics |= {"dev/conditioning_gap": found.gap, "dev/conditioning_error": found.error}
        every = experiment.evaluation.attention_every
        if self._watch is not None and every and len(self.history) % every == 0:
            metrics |= self._watch.look(self.model, self._tracker, step)
        if gates:
            metrics["dev/heads"] = open_heads
        if step == experiment.steps and not isinstance(self._tracker, NullTracker):
            self._log_tables(scoring, should_stop)
        return {**metrics, "dev/parameters": float(sum(p.numel() for p in self.model.parameters()))}

    def _keep(
        self,
        evaluated: Evaluated,
        weights: Mapping[str, Tensor],
        step: int,
        heads: Mapping[str, float],
    ) -> None:
        """Add an evaluation to the history; keep its weights if they are the best so far."""
        scores = evaluated.scores
        entry = {
            "step": float(step),
            "value": scores.value,
            "teacher_forced_loss": scores.teacher_forced_loss,
            **heads,
        }
        self.history.append(entry)
        so_far = float(self.best_scores.get(scores.metric, worst(scores.metric)))
        # Gates are still closing while the metric is at its best: with gates the last weights
        # ship, without them the best by the inferred metric (methods.md 13).
        is_best = bool(heads) or is_better(scores.metric, scores.value, so_far) or not self.best
        # Weights that are not finite decode to something too: they never ship.
        if is_best and math.isfinite(scores.teacher_forced_loss):
            self.best = {name: t.clone() for name, t in weights.items()}
            self.best_step, self.best_scores = step, scores.to_json()
            self._shipping = evaluated
        if step == self._experiment.steps and not self.best:
            raise TrainingError(
                f"step {step}: no model to ship, the teacher-forced loss on dev was finite at none "
                f"of {len(self.history)} evaluations; lower optim.lr or optim.clip_norm, or "
                "lengthen optim.warmup_steps"
            )

    def _log_tables(self, scoring: Scoring, should_stop: Callable[[], bool]) -> None:
        """Store what the weights that ship decode, sentence by sentence, and where they err."""
        if self._shipping is None:  # evaluated before this process resumed the run
            last = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.model.load_state_dict(self.best)
            target = self._tokenizers[1]
            self._shipping = evaluate(
                self.model, self._dev, target, scoring, should_stop=should_stop
            )
            self.model.load_state_dict(last)
        for name, columns in {
            "sentences": sentences(self._shipping),
            "worst": sentences(self._shipping, worst=20),
            "by_position": by_position(self._shipping),
            "by_length": by_length(self._shipping),
        }.items():
            self._tracker.table(columns, f"dev/{name}.json")
