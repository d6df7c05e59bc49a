"""CheckResult: one row of the preflight table."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    `passed` is None where it could not be decided here, which is no failure. `found` is the
    measured value, with its unit, `wanted` that of healthy experiments. `pointer` holds the meaning
    of a failure, what to do, and which key; or a remark on a pass. `figures` are the measured
    values as numbers, for scripts.
    """

    name: str
    passed: bool | None
    found: str
    wanted: str
    pointer: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
