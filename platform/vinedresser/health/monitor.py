"""Follows one run: monitors and rules, told on the terminal and in the tracking store."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vinedresser.figures.training import gradients_by_layer, monitors_over_steps
from vinedresser.health.log import Facts, Log
from vinedresser.health.monitors import Monitor
from vinedresser.health.rules import Finding, details, findings
from vinedresser.model import Seq2Seq
from vinedresser.tracking import Tracker

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("vinedresser")

# Steps between those that are watched, at least: watching adds 4 to 24% to a step, so 0.5 to 3% of
# the time (one core; transformer-small, rnn-small and conv-small at 2,048 tokens in fp32 and bf16,
# the demo's model at 512). At the default interval of 800 updates and more it is 0.2 to 1.5%.
_LEAST = 8

# Artifacts of a run.
SYMPTOMS, GRADIENTS, LAYERS = "symptoms.md", "monitors/gradients.png", "monitors/layers.png"
TABLE = "monitors/layers.json"
# The tag that MLflow's pages show as a run's description.
_NOTE = "mlflow.note.content"


class Diagnosis:
    """Says what is wrong with a run as soon as it shows, each rule once a run.

    Attributes:
        monitor: to be handed to the loop.
        log: everything that was logged.
        findings: rule -> what was found, the first time.
    """

    def __init__(self, model: Seq2Seq, facts: Facts, tracker: Tracker, *, every: int) -> None:
        self.monitor = Monitor(model, every=max(every, _LEAST))
        self.log = Log(facts)
        self.findings: dict[str, Finding] = {}
        self._tracker = tracker
        self._first: tuple[Tensor, Tensor] | None = None

    def begin(self, nats: "Tensor", tokens: "Tensor") -> None:
        """Takes the loss of an untrained model's first step, without waiting for the device."""
        self._first = nats, tokens

    def note(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at a step, with what the monitor has seen since the last time."""
        seen = self.monitor.take()
        if self._first is not None:
            nats, tokens = self._first
            seen["train/first_nats_per_token"] = float(nats) / float(tokens)
            self._first = None
        logged = {**metrics, **seen}
        self._tracker.log(logged, step)
        self.log.add(logged, step)
        if seen and self.monitor.history:
            reading = self.monitor.history[-1]
            self.log.add(details(reading), reading.step)
        for found in findings(self.log):
            self.tell(found)

    def diverged(self, reason: str, step: int, *, is_finite: bool) -> None:
        """Annotates the run that diverged; the error that ends it says so on the terminal.

        Args:
            reason: the error's line, `step 80: what was seen; what to do`.
            step: of the reason.
            is_finite: whether the numbers still were.
        """
        rule = "exploding_gradients" if is_finite else "non_finite"
        advice = "Lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps."
        seen = reason.split(";")[0].partition(": ")[2]
        self.tell(Finding(rule, seen, advice, step), is_aloud=False)

    def tell(self, found: Finding, *, is_aloud: bool = True) -> None:
        """Annotates the run and warns, unless the rule has spoken before."""
        if found.rule in self.findings:
            return
        self.findings[found.rule] = found
        if is_aloud:
            _log.warning("%s", found)
        told = "".join(
            f"- **{f.rule}** at step {f.step}: {f.text}. {f.advice}\n"
            for f in self.findings.values()
        )
        self._tracker.tag({"vinedresser.symptoms": ", ".join(self.findings), _NOTE: told})
        self._tracker.text(f"# What is wrong with this run\n\n{told}", SYMPTOMS)

    def picture(self) -> None:
        """Stores the monitors as figures and as a table; nothing where nothing was seen."""
        history = self.monitor.history
        if not any("gradient_norm" in reading.overall for reading in history):
            return
        self._tracker.figure(gradients_by_layer(history), GRADIENTS)
        self._tracker.figure(monitors_over_steps(history), LAYERS)
        rows = [(r.step, layer, values) for r in history for layer, values in r.layers.items()]
        names = dict.fromkeys(name for _, _, values in rows for name in values)
        columns: dict[str, list[Any]] = {
            "step": [step for step, _, _ in rows],
            "layer": [layer for _, layer, _ in rows],
        }
        columns |= {name: [values.get(name) for _, _, values in rows] for name in names}
        self._tracker.table(columns, TABLE)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint; 200 kB in the middle of a run of 12 layers."""
        told = [asdict(found) for found in self.findings.values()]
        return {
            "log": self.log.to_json(), "findings": told, "readings": self.monitor.to_json()
        }  # fmt: skip

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; what was told stays told."""
        self.log = Log(self.log.facts, stored["log"])
        self.findings = {one["rule"]: Finding(**one) for one in stored["findings"]}
        self.monitor.restore(stored["readings"])
