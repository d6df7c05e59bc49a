"""Follows a run by its monitors and rules, and says what is wrong with it (methods.md 107)."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vinedresser.diagnostics.monitors import Reading
from vinedresser.diagnostics.symptoms import Facts, Finding, Log, details, findings
from vinedresser.tracking import Tracker

_log = logging.getLogger("vinedresser")


class Diagnosis:
    """Says what is wrong with one run: each rule once, on the terminal and in the tracking store.

    Attributes:
        log: everything that was logged.
        findings: rule -> what was found, the first time.
    """

    def __init__(self, facts: Facts, tracker: Tracker) -> None:
        self.log = Log(facts)
        self.findings: dict[str, Finding] = {}
        self._tracker = tracker

    def note(self, metrics: Mapping[str, float], step: int, reading: Reading | None = None) -> None:
        """Takes in what was logged at a step, and the reading of that step if there is one."""
        self.log.add(metrics, step)
        if reading is not None:
            self.log.add(details(reading), reading.step)
        for found in findings(self.log):
            self.tell(found)

    def tell(self, found: Finding) -> None:
        """Warns and annotates the run, unless the rule has spoken before."""
        if found.rule in self.findings:
            return
        self.findings[found.rule] = found
        _log.warning("%s", found)
        self._tracker.tag({"vinedresser.symptoms": ", ".join(self.findings)})
        lines = [
            f"- **{f.rule}** at step {f.step}: {f.text}. {f.advice}" for f in self.findings.values()
        ]
        self._tracker.text(
            "\n".join(["# What is wrong with this run", "", *lines, ""]), "symptoms.md"
        )

    def diverged(self, reason: str, step: int, *, is_finite: bool) -> None:
        """Takes in that training has stopped because it diverged."""
        rule = "exploding_gradients" if is_finite else "non_finite"
        advice = "Lower optim.lr or optim.clip_norm, or lengthen optim.warmup_steps."
        self.tell(Finding(rule, reason, advice, step))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, for a checkpoint."""
        told = [asdict(found) for found in self.findings.values()]
        return {"log": self.log.to_json(), "findings": told}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; what was told stays told."""
        self.log = Log(self.log.facts, stored["log"])
        self.findings = {one["rule"]: Finding(**one) for one in stored["findings"]}
