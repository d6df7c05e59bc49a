"""What the full run takes: lengths against limits, tokens a second, hours, money."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch

from vinedresser.batch import Batch
from vinedresser.config import Experiment
from vinedresser.data.batching.plan import plan_cells
from vinedresser.data.batching.reader import Batches, Split
from vinedresser.data.shards import ShardSet
from vinedresser.data.tokenizers.tokenizer import TextTokenizer
from vinedresser.decode import length_limits
from vinedresser.evaluate import evaluate
from vinedresser.figures.corpus import histogram_of
from vinedresser.health.verdict import Check
from vinedresser.model import Seq2Seq
from vinedresser.training.device import Device
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.step import training_steps

# Shares above which a limit or budget does harm: dropped rows are training data lost, references
# that no output can reach are points lost in every score.
MAX_DROPPED, MAX_OUT_OF_REACH, MIN_REAL = 0.05, 0.01, 0.5
# A batch should hold several of the longest rows, or its updates follow single sentences.
MIN_LONGEST_ROWS = 2
# Updates that are timed, after those that warm up; or as many as go into so many seconds.
_WARM_UP, _TIMED, _SECONDS = 5, 30, 15.0
# Rows of the split that one evaluation is timed on.
_EVALUATED = 128
MAX_EVALUATION_SHARE = 0.5


def lengths(shards: ShardSet, experiment: Experiment, dev: Split) -> Check:
    """Drops by length, the longest row against the budget, padding, references out of reach."""
    account, tokens = shards.meta["account"]["train"], experiment.batch.max_padded_tokens
    dropped = sum(n for why, n in account["dropped"].items() if "long" in why)
    share = dropped / max(1, account["rows_in"])
    cells = histogram_of(shards, "train")
    longest = int(cells.longest[cells.counts > 0].max())
    real = plan_cells(cells, tokens=tokens, order=experiment.batch.order).padding(cells).both
    cap = experiment.task.max_target_length
    limits = length_limits(torch.from_numpy(dev.source_lengths), cap).numpy()
    beyond = float(np.mean(dev.target_lengths > limits))
    pointers = []
    if share > MAX_DROPPED:
        pointers.append(
            f"{dropped:,} train rows are too long and left out; raise task.max_source_length, "
            "task.max_target_length"
        )
    if longest * MIN_LONGEST_ROWS > tokens:
        pointers.append(
            f"the longest row has {longest} tokens and fills a batch of {tokens} alone; raise "
            "batch.max_padded_tokens or lower task.max_source_length, task.max_target_length"
        )
    if beyond > MAX_OUT_OF_REACH:
        pointers.append(
            f"{beyond:.1%} of dev's references are longer than any output may be, "
            "min(task.max_target_length, 2 x source + 10); raise it or take shorter targets"
        )
    if real < MIN_REAL:
        pointers.append(
            "more than half of a batch is padding; set batch.order=alternating_max, or a larger "
            "batch.max_padded_tokens"
        )
    return Check(
        "lengths", not pointers,
        f"{share:.1%} dropped, longest {longest} of {tokens}, {real:.0%} real tokens",
        f"≤ {MAX_DROPPED:.0%}, ≤ {tokens // MIN_LONGEST_ROWS}, ≥ {MIN_REAL:.0%}",
        "; ".join(pointers),
        {"dropped_share": share, "longest": float(longest), "real_share": real,
         "out_of_reach_share": beyond},
    )  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """How fast one worker trains.

    Attributes:
        tokens_per_second: real target tokens.
        seconds_per_update: of this worker's batches of one update.
        tokens_per_update: real target tokens of this worker.
    """

    tokens_per_second: float
    seconds_per_update: float
    tokens_per_update: float


def pace(model: Seq2Seq, batches: Iterator[Batch], experiment: Experiment, device: Device) -> Pace:
    """Times updates on real batches, in the experiment's precision, threads and objective."""
    count = experiment.batches_a_rank
    alone = experiment.model_copy(
        update={
            "steps": _WARM_UP + _TIMED,
            "batch": experiment.batch.model_copy(update={"per_update": count}),
            "compute": experiment.compute.model_copy(update={"workers": 1}),
        }
    )
    optimizer = build_optimizer(model, alone.optim, gate_lr_factor=alone.objective.gate_lr_factor)
    seconds: list[float] = []
    tokens: list[int] = []
    since = begun = time.perf_counter()
    for step in training_steps(model, batches, optimizer, alone, device=device):
        tokens.append(int(step.tokens + 0 * step.nats))  # waits for the device
        now = time.perf_counter()
        seconds.append(now - since)
        since = now
        if now - begun > _SECONDS:
            break
    # The median: a neighbour on the machine, or a window that is opened, is not the run's pace.
    pairs = list(zip(seconds, tokens, strict=True))
    each = statistics.median(
        second / said for second, said in pairs[min(_WARM_UP, len(pairs) - 1) :]
    )
    mean = sum(tokens) / len(tokens)
    return Pace(1 / each, each * mean, mean)


def evaluation_seconds(
    model: Seq2Seq, dev: Split, tokenizer: TextTokenizer, experiment: Experiment
) -> float:
    """Of one evaluation: a slice of it, with outputs as long as the references, scaled up.

    A model that was hardly trained says too much, up to its limit; a trained one does not.
    """
    config, total = experiment.evaluation, len(dev)
    rows = min(config.sentences, total) if config.sentences else total
    slice_ = min(rows, _EVALUATED)
    since = time.perf_counter()
    evaluate(
        model,
        dev,
        tokenizer,
        metric=experiment.task.metric,
        config=config.model_copy(update={"sentences": slice_}),
        cap=math.ceil(float(dev.target_lengths.mean())),
    )
    return (time.perf_counter() - since) * rows / slice_


def cost(
    experiment: Experiment, shards: ShardSet, pace: Pace, evaluation: float, *, price: float
) -> Check:
    """Time and money of the full run; other workers are taken to be as fast and to cost nothing.

    Args:
        experiment: the full one.
        shards: its data.
        pace: of one worker.
        evaluation: seconds of one.
        price: of an hour of one worker, in any currency; 0 if unknown.
    """
    training = experiment.steps * pace.seconds_per_update
    judging = experiment.evaluation.times * evaluation
    total, workers = training + judging, experiment.compute.workers
    per_epoch = Batches(shards, experiment.batch, seed=experiment.seed).per_epoch
    epochs = experiment.steps * experiment.batches_an_update / per_epoch
    share = judging / total
    found = (
        f"{_written(total)} = {experiment.steps:,} updates ({epochs:.2g} epochs) x "
        f"{_unit(pace.seconds_per_update)} + {experiment.evaluation.times} evaluations x "
        f"{_unit(evaluation)}; {pace.tokens_per_second * workers:,.0f} tokens/s"
    )
    money = total / 3600 * workers * price
    if price:
        found += f"; costs {money:,.2f}"
    passed = share <= MAX_EVALUATION_SHARE
    pointer = "" if passed else (
        f"{share:.0%} of the time goes into evaluation: lower evaluation.times or "
        "evaluation.sentences, or evaluation.beam"
    )  # fmt: skip
    return Check(
        "time and cost", passed, found, f"evaluation ≤ {MAX_EVALUATION_SHARE:.0%} of it", pointer,
        {"seconds": total, "training_seconds": training, "evaluation_seconds": judging,
         "tokens_per_second": pace.tokens_per_second * workers, "epochs": epochs,
         "tokens_per_update": pace.tokens_per_update * workers,
         **({"price": money} if price else {})},
    )  # fmt: skip


def _written(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _unit(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"
