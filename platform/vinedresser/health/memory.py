"""Does memory grow from update to update?"""

import contextlib
import ctypes
import gc
import itertools
import statistics
from collections.abc import Callable

import psutil
import torch

from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.health.verdict import Check
from vinedresser.model import Seq2Seq
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.step import training_steps

# Blocks of updates, after as many for warm-up as one block has. A leak grows in every block, an
# arena or a cache that is filled once in one or two of them: the median over blocks knows which.
BLOCKS, UPDATES_A_BLOCK = 8, 25
# Bytes an update: a kept scalar is less, a kept state of one sentence more; 1.6 GB in 10^5 updates.
MAX_SLOPE = 16 * 1024


def memory_slope(model: Seq2Seq, batch: Batch, experiment: Experiment, device: Device) -> Check:
    """Resident and GPU memory over updates of one and the same shape (methods.md 37).

    Args:
        model: on its device, in training mode; trained further.
        batch: on the CPU; each update gets it again.
        experiment: as it is trained; its `steps` are what growth is projected to.
        device: device and precision.
    """
    updates = UPDATES_A_BLOCK * (BLOCKS + 1)
    once = experiment.model_copy(
        update={
            "steps": updates,
            "batch": experiment.batch.model_copy(update={"per_update": 0}),
            "compute": experiment.compute.model_copy(update={"workers": 1}),
        }
    )
    optimizer = build_optimizer(model, once.optim, gate_lr_factor=once.objective.gate_lr_factor)
    process = psutil.Process()
    read: dict[str, Callable[[], int]] = {"RSS": lambda: int(process.memory_info().rss)}
    if device.primary.type == "cuda":
        read["GPU"] = lambda: torch.cuda.memory_allocated(device.primary)
    seen: dict[str, list[int]] = {name: [] for name in read}
    for step in training_steps(model, itertools.repeat(batch), optimizer, once, device=device):
        if step.index % UPDATES_A_BLOCK == 0:
            _give_back()
            for name, gauge in read.items():
                seen[name].append(gauge())
    slopes = {name: slope(readings) / UPDATES_A_BLOCK for name, readings in seen.items()}
    worst = max(slopes, key=lambda name: slopes[name])
    passed = slopes[worst] <= MAX_SLOPE
    growth = slopes[worst] * experiment.steps
    pointer = "" if passed else (
        f"{growth / 1e9:.2g} GB more {worst} by the end of {experiment.steps:,} updates: something "
        "keeps tensors of past updates; look for lists and attributes that losses or states are "
        "appended to without detach() and float()"
    )  # fmt: skip
    return Check(
        "memory slope", passed,
        ", ".join(f"{name} {value / 1024:+.1f} KiB/update" for name, value in slopes.items()),
        f"≤ {MAX_SLOPE // 1024} KiB", pointer,
        {f"{name.lower()}_bytes_an_update": value for name, value in slopes.items()},
    )  # fmt: skip


def _give_back() -> None:
    """Hands back what nothing holds: what only waits for the collector or the heap is no leak.

    Without it a leak fills the room that earlier, larger batches left in the heap, unseen.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def slope(readings: list[int]) -> float:
    """The median growth from one reading to the next: steps that happen once do not count."""
    return float(statistics.median(b - a for a, b in itertools.pairwise(readings)))
