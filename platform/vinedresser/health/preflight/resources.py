"""Checks of resources: memory growth per update, time and cost of the full run."""

import ctypes
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch

from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.data.batching.reader import Batches, Split
from vinedresser.data.shards import ShardSet
from vinedresser.data.tokenizers.tokenizer import TextTokenizer
from vinedresser.evaluate import Scoring, evaluate
from vinedresser.health.preflight.check import CheckResult
from vinedresser.health.preflight.learning import alone
from vinedresser.health.rules import MAX_LEAK
from vinedresser.model import Seq2Seq
from vinedresser.objective import Objective
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.step import training_steps

# Updates that are timed, after those that warm up; or as many as fit into the seconds.
_WARM_UP, _TIMED, _SECONDS = 5, 30, 15.0
# Rows of the split that one evaluation is timed on.
_EVALUATED = 128
MAX_EVALUATION_SHARE = 0.5
# Blocks of updates, after as many for warm-up as one block has. A leak grows in every block, an
# arena or a cache that is filled once in one or two of them: the median separates them.
BLOCKS, UPDATES_PER_BLOCK = 8, 25


def check_memory(
    objective: Objective, batch: Batch, experiment: Experiment, device: Device
) -> CheckResult:
    """Check the growth of resident and GPU memory over updates of one shape (methods.md 37).

    The objective is trained further, with the same batch for each update; growth is projected to
    the experiment's `steps`.
    """
    updates = UPDATES_PER_BLOCK * (BLOCKS + 1)
    once = alone(experiment, steps=updates)
    optimizer = build_optimizer(objective, once.optim)
    process, trim = psutil.Process(), getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    read: dict[str, Callable[[], int]] = {"RSS": lambda: int(process.memory_info().rss)}
    if device.primary.type == "cuda":
        read["GPU"] = lambda: torch.cuda.memory_allocated(device.primary)
    seen: dict[str, list[int]] = {name: [] for name in read}
    # Collections pass over what is here already, half a million objects of imports: 0.35 s each.
    gc.collect()
    gc.freeze()
    for step in training_steps(objective, itertools.repeat(batch), optimizer, once, device=device):
        if step.index % UPDATES_PER_BLOCK == 0:
            # Free what waits for the collector or the heap: otherwise a leak stays unseen in the
            # room that earlier, larger batches left in the heap.
            gc.collect()
            if trim is not None:
                trim(0)
            for name, gauge in read.items():
                seen[name].append(gauge())
    gc.unfreeze()
    slopes = {name: slope(readings) / UPDATES_PER_BLOCK for name, readings in seen.items()}
    worst = max(slopes, key=lambda name: slopes[name])
    passed = slopes[worst] <= MAX_LEAK
    growth = slopes[worst] * experiment.steps
    pointer = "" if passed else (
        f"{growth / 1e9:.2g} GB more {worst} by the end of {experiment.steps:,} updates: tensors "
        "of past updates are kept; look for lists and attributes that losses or states are "
        "appended to without detach() and float()"
    )  # fmt: skip
    return CheckResult(
        "memory slope", passed,
        ", ".join(f"{name} {value / 1024:+.1f} KiB/update" for name, value in slopes.items()),
        f"≤ {MAX_LEAK // 1024} KiB", pointer,
        {f"{name.lower()}_bytes_per_update": value for name, value in slopes.items()},
    )  # fmt: skip


def slope(readings: list[int]) -> float:
    """Return the median growth from one reading to the next; single jumps do not count."""
    return float(statistics.median(b - a for a, b in itertools.pairwise(readings)))


@dataclass(frozen=True)
class Speed:
    """Training speed of one worker.

    Tokens are real target tokens; seconds and tokens per update are those of this worker's batches.
    """

    tokens_per_second: float
    seconds_per_update: float
    tokens_per_update: float


def speed(
    objective: Objective, batches: Iterator[Batch], experiment: Experiment, device: Device
) -> Speed:
    """Time updates on real batches, in the experiment's precision, threads and objective."""
    count = experiment.batches_per_rank
    timed = alone(experiment, steps=_WARM_UP + _TIMED, per_update=count)
    optimizer = build_optimizer(objective, timed.optim)
    seconds: list[float] = []
    tokens: list[int] = []
    since = begun = time.perf_counter()
    for step in training_steps(objective, batches, optimizer, timed, device=device):
        tokens.append(int(step.tokens + 0 * step.nll))  # waits for the device
        now = time.perf_counter()
        seconds.append(now - since)
        since = now
        if now - begun > _SECONDS:
            break
    # The median: other load on the machine, or a window that is opened, is not the run's speed.
    pairs = list(zip(seconds, tokens, strict=True))
    each = statistics.median(
        second / count for second, count in pairs[min(_WARM_UP, len(pairs) - 1) :]
    )
    mean = sum(tokens) / len(tokens)
    return Speed(1 / each, each * mean, mean)


def evaluation_seconds(
    model: Seq2Seq, dev: Split, tokenizer: TextTokenizer, experiment: Experiment
) -> float:
    """Return the seconds of one evaluation, scaled up from a slice.

    Outputs are limited to the length of the references: a model that was hardly trained decodes up
    to its limit, a trained one does not.
    """
    sentences, total = experiment.evaluation.sentences, len(dev)
    rows = min(sentences, total) if sentences else total
    slice_ = min(rows, _EVALUATED)
    since = time.perf_counter()
    evaluate(
        model,
        dev,
        tokenizer,
        Scoring(
            experiment.task.metric,
            experiment.decoding,
            cap=math.ceil(float(dev.target_lengths.mean())),
            sentences=slice_,
        ),
    )
    return (time.perf_counter() - since) * rows / slice_


def check_cost(
    experiment: Experiment, shards: ShardSet, speed: Speed, evaluation: float, *, price: float
) -> CheckResult:
    """Return time and money of the full run; other workers are assumed as fast, without overhead.

    `evaluation` is the seconds of one, `price` that of an hour of one worker, in any currency, 0 if
    unknown.
    """
    training = experiment.steps * speed.seconds_per_update
    judging = experiment.evaluation.num_evaluations * evaluation
    total, workers = training + judging, experiment.compute.workers
    per_epoch = Batches(shards, experiment.batch, seed=experiment.seed).per_epoch
    epochs = experiment.steps * experiment.batches_per_update / per_epoch
    share = judging / total
    found = (
        f"{timedelta(seconds=round(total))} = {experiment.steps:,} updates ({epochs:.2g} epochs) x "
        f"{_unit(speed.seconds_per_update)} + "
        f"{experiment.evaluation.num_evaluations} evaluations x {_unit(evaluation)}; "
        f"{speed.tokens_per_second * workers:,.0f} tokens/s"
    )
    money = total / 3600 * workers * price
    if price:
        found += f"; costs {money:,.2f}"
    passed = share <= MAX_EVALUATION_SHARE
    pointer = "" if passed else (
        f"{share:.0%} of the time goes into evaluation: lower evaluation.num_evaluations or "
        "evaluation.sentences, or decoding.beam"
    )  # fmt: skip
    return CheckResult(
        "time and cost", passed, found, f"evaluation ≤ {MAX_EVALUATION_SHARE:.0%} of it", pointer,
        {"seconds": total, "training_seconds": training, "evaluation_seconds": judging,
         "tokens_per_second": speed.tokens_per_second * workers, "epochs": epochs,
         "tokens_per_update": speed.tokens_per_update * workers,
         **({"price": money} if price else {})},
    )  # fmt: skip


def _unit(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"
