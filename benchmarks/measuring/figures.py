"""What benchmarks share: figures of a child process, the interval of a mean."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Two-sided 95% points of Student's t, by the number of values.
_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def figures_of(command: Sequence[str]) -> dict[str, Any]:
    """The last JSON object that a process of its own prints, on one thread; ends if it has none."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if not lines:
        sys.exit(f"{' '.join(command)} said no figures:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean, by Student's t; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return _T.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
