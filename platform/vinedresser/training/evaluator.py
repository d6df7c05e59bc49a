"""Evaluator: decode the averaged weights on the dev split and keep the weights that ship."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vinedresser.bundle import vocabulary_of
from vinedresser.conditioning import conditioning_gap
from vinedresser.config import Experiment
from vinedresser.data.batching.reader import in_order, load_split
from vinedresser.data.shards import ShardSet
from vinedresser.errors import TrainingError
from vinedresser.evaluate import Evaluated, evaluate, exposure_gap
from vinedresser.figures.attention_maps import AttentionWatch, Tokenizers
from vinedresser.metrics import is_better, worst
from vinedresser.nn.gates import head_gates
from vinedresser.tracking import NullTracker, Tracker
from vinedresser.training.device import Device
from vinedresser.training.listener import Best

# Dev sentences whose sources are exchanged at each evaluation: the standard error of the gap is
# below 0.2 nats a token from 64 sentences on.
_EXCHANGED = 128


class Evaluator:
    """Decodes dev with a second copy of the model, on rank 0; all ranks know the history.

    Attributes:
        best: the weights that ship, by name; empty before the first evaluation with a finite loss.
        best_step: the update after which they were taken.
        best_scores: dev Scores of them as plain JSON.
        history: one entry an evaluation: step, value, teacher_forced_nats, and heads where gated.
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
        """The update of the last evaluation, 0 before the first."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def best_value(self) -> float:
        """The best inferred metric of any evaluation with a finite loss; NaN before the first.

        Samplers and early stopping read it, so it never gets worse. In runs with gates the last
        weights ship, and their value is `best_scores`: with gates open a model is better and has
        not yet paid for its heads (methods.md 13).
        """
        best = math.nan
        for entry in self.history:
            if math.isfinite(entry["teacher_forced_nats"]) and (
                math.isnan(best) or is_better(self._experiment.task.metric, entry["value"], best)
            ):
                best = entry["value"]
        return best

    @property
    def standing(self) -> Best | None:
        """The best so far, for whoever shows progress."""
        metric = self._experiment.task.metric
        if not self.best_scores:
            return None
        return Best(metric, float(self.best_scores[metric]), self.best_step)

    def evaluate(
        self, weights: Mapping[str, Tensor], step: int, should_stop: Callable[[], bool] | None
    ) -> dict[str, float]:
        """Decodes dev, keeps the weights if they ship, leaves samples; returns what to log.

        Raises:
            InterruptedRunError: `should_stop` said so; nothing has changed.
            TrainingError: at the last step, if the loss on dev was finite at none.
        """
        task = self._experiment.task
        self.model.load_state_dict(weights)
        evaluated = evaluate(
            self.model,
            self._dev,
            self._tokenizers[1],
            metric=task.metric,
            decoding=self._experiment.decoding,
            sentences=self._experiment.evaluation.sentences,
            cap=task.max_target_length,
            should_stop=should_stop,
        )
        heads = self._keep(evaluated, weights, step)
        rows = ["source\treference\thypothesis", *("\t".join(r) for r in evaluated.samples())]
        self._tracker.text("\n".join(rows) + "\n", f"samples/step-{step:08d}.tsv")
        scores = evaluated.scores
        return {
            f"dev/{task.metric}": scores.value,
            f"best/{task.metric}": self.best_value,
            "dev/teacher_forced_nats": scores.teacher_forced_nats,
            "dev/teacher_forced_error": scores.teacher_forced_error,
            "dev/exposure_gap": exposure_gap(evaluated, self._tokenizers[1]),
            **self._conditioning(),
            **self._attention(step),
            **heads,
            "dev/parameters": float(sum(p.numel() for p in self.model.parameters())),
        }

    def _keep(
        self, evaluated: Evaluated, weights: Mapping[str, Tensor], step: int
    ) -> dict[str, float]:
        """Adds to the history, and to the best if it is; returns the number of open heads."""
        scores, metric = evaluated.scores, self._experiment.task.metric
        gates = head_gates(self.model)
        heads = float(sum(int((g.deterministic() > 0).sum()) for g in gates))
        entry = {
            "step": float(step),
            "value": scores.value,
            "teacher_forced_nats": scores.teacher_forced_nats,
            **({"heads": heads} if gates else {}),
        }
        self.history.append(entry)
        so_far = float(self.best_scores.get(metric, worst(metric)))
        # Gates are still closing while the metric is at its best: with gates the last weights
        # ship, without them the best by the inferred metric (methods.md 13).
        is_best = bool(gates) or is_better(metric, scores.value, so_far) or not self.best
        # Weights that are not finite decode to something too: they never ship (fault T01).
        if is_best and math.isfinite(scores.teacher_forced_nats):
            self.best = {name: t.clone() for name, t in weights.items()}
            self.best_step, self.best_scores = step, scores.to_json()
        if step == self._experiment.steps and not self.best:
            raise TrainingError(
                f"step {step}: no model to ship, the teacher-forced loss on dev was finite at none "
                f"of {len(self.history)} evaluations; lower optim.lr or optim.clip_norm, or "
                "lengthen optim.warmup_steps"
            )
        return {"dev/heads": heads} if gates else {}

    def _attention(self, step: int) -> Mapping[str, float]:
        """Pictures and diagonality of the attention to the source, where they are due."""
        every = self._experiment.evaluation.attention_every
        if self._watch is None or not every or len(self.history) % every:
            return {}
        return self._watch.look(self.model, self._tracker, step)

    def _conditioning(self) -> dict[str, float]:
        """What sources of other sentences cost on a slice of dev, nats a token (methods.md 2)."""
        tokens = self._experiment.decoding.max_padded_tokens
        with contextlib.suppress(ValueError):  # no batch of two sentences
            batches = in_order(self._dev, tokens=tokens, sentences=_EXCHANGED)
            found = conditioning_gap(self.model, batches)
            return {"dev/conditioning_gap": found.gap, "dev/conditioning_error": found.error}
        return {}
