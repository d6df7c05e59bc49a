"""CheckResult: one row of the preflight table."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: of the check.
        passed: None where it could not be decided here, which is no failure.
        found: the measured value, with its unit.
        wanted: the values of a healthy experiment.
        pointer: meaning of a failure, what to do, and which key; or a remark on a pass; or empty.
        figures: the measured values as numbers, for scripts.
    """

    name: str
    passed: bool | None
    found: str
    wanted: str
    pointer: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
