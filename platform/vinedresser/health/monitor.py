"""Monitor of one run: readings of the model, health rules, findings in the log and tracking store.

`RunMonitor` is the `Monitor` that a training loop takes. The launcher of a run builds it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vinedresser.figures.monitoring import gradients_by_layer, readings_over_steps
from vinedresser.health.readings import Readings
from vinedresser.health.rules import USUAL_UPDATE_RATIO, Finding, apply_rules
from vinedresser.health.series import Log, RunFacts, reading_details
from vinedresser.model import Seq2Seq
from vinedresser.tracking import Tracker

_log = logging.getLogger(__name__)

# Least number of steps between readings: a reading adds 4 to 24% to a step, so 0.5 to 3% of the
# time (one core; transformer-small, rnn-small and conv-small at 2,048 tokens in fp32 and bf16, the
# demo's model at 512). At the default interval of 800 updates and more it is 0.2 to 1.5%.
_MIN_STEPS = 8

# Artifacts of a run.
FINDINGS, GRADIENTS, LAYERS = "health.md", "monitors/gradients.png", "monitors/layers.png"
TABLE = "monitors/layers.json"
# Tags: the rules that fired, and the description that MLflow's pages show.
TAG, _DESCRIPTION = "vinedresser.health", "mlflow.note.content"


class RunMonitor:
    """Log of metrics with health rules; each rule reports once per run.

    `series` is everything that was logged, `findings` maps a rule to its first finding.
    """

    def __init__(self, model: Seq2Seq, facts: RunFacts, tracker: Tracker, *, every: int) -> None:
        every = max(every, _MIN_STEPS)
        self.readings = Readings(model, every=every, is_fresh=facts.is_fresh)
        self.series = Log(facts)
        self.findings: dict[str, Finding] = {}
        self._tracker = tracker
        # The hooks of a `StepMonitor` are those of the readings.
        self.watching, self.gradients = self.readings.watching, self.readings.gradients
        self.updated = self.readings.updated

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a step with the readings since the last call, and apply the rules."""
        seen = self.readings.take()
        logged = {**metrics, **seen}
        self._tracker.log(logged, step)
        self.series.add(logged, step)
        if seen:
            reading = self.readings.history[-1]
            self.series.add(reading_details(reading), reading.step)
        for found in apply_rules(self.series):
            self.report(found)

    def diverged(self, reason: str, step: int, *, is_finite: bool) -> None:
        """Annotate the run that diverged; the error that ends it is logged elsewhere.

        The reason is the error's line, `step 80: observation; what to do`; `is_finite` is true if
        the numbers still were finite.
        """
        rule = "exploding_gradients" if is_finite else "non_finite"
        advice = "Lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps."
        seen = reason.split(";")[0].partition(": ")[2]
        self.report(Finding(rule, seen, advice, step), level=logging.DEBUG)

    def report(self, found: Finding, *, level: int = logging.WARNING) -> None:
        """Log a finding and annotate the run, unless its rule has fired before."""
        if found.rule in self.findings:
            return
        self.findings[found.rule] = found
        _log.log(level, "%s", found)
        lines = "".join(
            f"- **{f.rule}** at step {f.step}: {f.text}. {f.advice}\n"
            for f in self.findings.values()
        )
        self._tracker.tag({TAG: ", ".join(self.findings), _DESCRIPTION: lines})
        self._tracker.text(f"# Findings of the health rules\n\n{lines}", FINDINGS)

    def picture(self) -> None:
        """Store the readings as figures and as a table; nothing without readings."""
        history = self.readings.history
        if not any("gradient_norm" in reading.overall for reading in history):
            return
        self._tracker.figure(gradients_by_layer(history), GRADIENTS)
        figure = readings_over_steps(history, usual_ratio=USUAL_UPDATE_RATIO)
        self._tracker.figure(figure, LAYERS)
        rows = [(r.step, layer, values) for r in history for layer, values in r.layers.items()]
        names = dict.fromkeys(name for _, _, values in rows for name in values)
        columns: dict[str, list[Any]] = {
            "step": [step for step, _, _ in rows],
            "layer": [layer for _, layer, _ in rows],
        }
        columns |= {name: [values.get(name) for _, _, values in rows] for name in names}
        self._tracker.table(columns, TABLE)

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON for a checkpoint; 200 kB in the middle of a run of 12 layers."""
        return {
            "series": self.series.points,
            "findings": [asdict(found) for found in self.findings.values()],
            "readings": self.readings.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a checkpoint; rules that have fired stay silent."""
        self.series = Log(self.series.facts, state["series"])
        self.findings = {one["rule"]: Finding(**one) for one in state["findings"]}
        self.readings.load_state_dict(state["readings"])
