"""The zoo on real data: every architecture with the same budget of CPU time and tokens.

`make bench NAME=zoo`. CMUdict (PER and WER on 2,000 test words that nothing else uses) and Multi30k
De-En (sacreBLEU, greedy, test_2016_flickr) with models of equal size; FSDD digit strings with the
pyramidal ones (PER, and what subsampling by 4 does to the time of a step). One thread a run.

The budget counts CPU seconds of the process in training steps, so that a busy machine changes
little. A first probe of the same steps says how many updates fit into it; the learning rate is
annealed to exactly that number. A run ends earlier where `--epochs` are done.

Every finished run is a line in `--results`; the same command goes on after an interruption. The
defaults take 4 models x 3 seeds x 2 tasks x 240 s + 4 x 3 x 240 s of CPU, halved by `--jobs 2`.
"""

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.corpora.multi30k import multi30k
from benchmarks.measuring.figures import half_width
from search_spaces import demo, digits, translation
from vinedresser.bundle import Bundle, load_bundle, vocabulary_of
from vinedresser.config import Evaluation, Experiment
from vinedresser.data.batching.reader import Batches, load_split, stream
from vinedresser.data.shards import ShardSet, prepare, tokenizers
from vinedresser.evaluate import Scores, Scoring, evaluate
from vinedresser.objective import Objective
from vinedresser.tracking import NullTracker
from vinedresser.training.device import Device, resolve_device
from vinedresser.training.listener import Listener
from vinedresser.training.optimizer import build_optimizer
from vinedresser.training.run import Run
from vinedresser.training.step import training_steps
from vinedresser.workspace.layout import RunFolder

_log = logging.getLogger(__name__)

# Share of the budget that the probe may take; it is not counted.
_PROBE = 0.05


@dataclass(frozen=True)
class Entrant:
    """A model in a task's form: overrides of an experiment, its own learning rate among them."""

    model: Mapping[str, Any]
    lr: float


# Parameters of a task lie within 10 % of each other: 0.94 M for CMUdict (33 and 43 symbols) and
# 9.6 M for Multi30k (8,000 joint pieces; source and target tables apart, because only the
# Transformer could tie them). Learning rates: on CMUdict half of them was worse for all four (30 s,
# one seed: PER 22.9, 14.8, 14.9, 18.4 against 17.6, 13.3, 13.5, 17.0); twice was not tried. On
# Multi30k conv has twice the rate of the others: after 150 updates of 4,096 tokens it stood at 4.53
# nats with 3e-3, at 5.29 with 1e-3. The Transformer does worse with twice its rate (BLEU 21.7
# against 29.5 at 240 s). `--lr-factor` tries others.
CMUDICT = {
    "rnn": Entrant({"kind": "rnn", "width": 240, "encoder_units": 240}, 2e-3),
    "rnn-small": Entrant({"kind": "rnn-small", "width": 200, "encoder_units": 100}, 2e-3),
    "conv-small": Entrant(
        {"kind": "conv-small", "d_model": 136, "encoder_layers": 3, "decoder_layers": 3}, 2e-3
    ),
    "transformer-small": Entrant({"kind": "transformer-tiny", "attention_dropout": 0.0}, 2e-3),
}
MULTI30K = {
    "rnn": Entrant(
        {"kind": "rnn", "width": 352, "encoder_units": 352, "bidirectional": True}, 1.2e-3
    ),
    "rnn-small": Entrant({"kind": "rnn-small", "width": 336, "encoder_units": 336}, 1.2e-3),
    "conv-small": Entrant({"kind": "conv-small"}, 2.4e-3),
    "transformer-small": Entrant({"kind": "transformer-small"}, 1.2e-3),
}
_LISTENER = {"kind": "listener", "width": 128, "encoder_units": 128, "decoder_layers": 1}
_SHORTER = {"kind": "conv", "factor": 2, "layers": 2}
_SPEECH = {"kind": "transformer-tiny", "attention_dropout": 0.0}
FSDD = {
    "listener-by-8": Entrant(_LISTENER, 2e-3),
    "listener-by-4": Entrant({**_LISTENER, "subsampling": {"layers": 2}}, 2e-3),
    "listener-by-1": Entrant({**_LISTENER, "subsampling": {"kind": "none"}}, 2e-3),
    "transformer-by-4": Entrant({**_SPEECH, "subsampling": _SHORTER}, 1e-3),
    "transformer-by-1": Entrant(_SPEECH, 1e-3),
}
ENTRANTS = {"cmudict": CMUDICT, "multi30k": MULTI30K, "fsdd": FSDD}


def base_of(task: str, data: Path) -> Experiment:
    """What all entrants of a task share: corpus, batches, dropout, evaluation."""
    shared = {
        "compute.threads": 1,
        "evaluation": Evaluation(num_evaluations=4, sentences=500).to_json(),
        "checkpoint_every": 1_000_000,
        "optim.warmup_steps": 0,
        "objective.likelihood.sampling.probability": 0.0,
    }
    if task == "cmudict":
        return demo.EXPERIMENT.override({"name": task, **shared})
    if task == "fsdd":
        shared |= {"decoding.max_padded_tokens": 8192, "evaluation.num_evaluations": 2}
        corpus = {"task.corpus.path": str(data / "fsdd/recordings")}
        return digits.EXPERIMENT.override({"name": task, **shared, **corpus})
    corpus = {
        "task.name": task,
        "task.corpus": multi30k(test="test_2016_flickr").corpus.to_json(),
    }
    # The preset's own batches are for many more updates.
    shared |= {"batch.max_padded_tokens": 2048, "optim.anneal": 1 / 3}
    return translation.EXPERIMENT.override({"name": task, **shared, **corpus})


@dataclass(frozen=True)
class Job:
    """One run; all that a process needs."""

    task: str
    model: str
    seed: int
    seconds: float
    epochs: float
    lr: float
    data: str
    workspace: str

    @property
    def key(self) -> list[Any]:
        """What makes a finished run this one."""
        return [self.task, self.model, self.seed, self.seconds, self.epochs, self.lr]

    def named(self) -> dict[str, Any]:
        """The same by name, for the results."""
        return {"key": self.key, "task": self.task, "model": self.model, "seed": self.seed}

    def experiment(self) -> Experiment:
        """Of one update; the number is set by the probe."""
        base = base_of(self.task, Path(self.data))
        model = {"dropout": 0.0 if self.task == "cmudict" else 0.1}
        model |= ENTRANTS[self.task][self.model].model
        change = {"model": model, "optim.lr": self.lr, "seed": self.seed}
        return base.override({**change, "name": f"{self.task}-{self.model}"})


class CpuClock(Listener):
    """CPU seconds of this process in training: from the start, or an evaluation, to a log line.

    The loop logs just before it evaluates, and an evaluation logs its scores at its end.
    """

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, time.process_time()

    def log(self, metrics: Mapping[str, float], step: int) -> None:  # noqa: ARG002 - Listener
        """Counts what came before a line of training."""
        now = time.process_time()
        if "train/loss" in metrics:
            self.seconds += now - self._since
        self._since = now


def run(job: Job) -> dict[str, Any]:
    """Trains one entrant within the budget and scores it on the test split."""
    experiment = job.experiment()
    where = resolve_device(experiment.compute)
    shards = prepare(experiment.task, Path(job.workspace) / "shards", executor="in_process")
    epoch = Batches(shards, experiment.batch, seed=experiment.seed).per_epoch
    seconds_a_step = probe(experiment, shards, where, _PROBE * job.seconds)
    steps = int(min(job.seconds / seconds_a_step, job.epochs * epoch))
    steps = max(steps, experiment.evaluation.num_evaluations)
    change = {"steps": steps, "optim.warmup_steps": min(max(steps // 10, 1), 150)}
    with tempfile.TemporaryDirectory(dir=job.workspace) as folder:
        clock = CpuClock()
        outcome = Run(
            experiment.override(change), shards, RunFolder(Path(folder) / "run"), device=where,
            tracker=NullTracker(), listener=clock,
        ).execute()  # fmt: skip
        assert outcome is not None
        bundle = load_bundle(Path(outcome.bundle))
    tokens = round(steps / epoch * target_tokens(shards))
    scores = test_scores(bundle, shards, experiment)
    return {
        **job.named(),
        experiment.task.metric: scores.value,
        "wer": scores.exact_error,
        "signature": scores.signature,
        "test_loss": scores.teacher_forced_loss,
        "dev": outcome.value,
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "steps": steps,
        "epochs": steps / epoch,
        "cpu_seconds": clock.seconds,
        "tokens_per_cpu_second": tokens / clock.seconds,
        "cpu_seconds_a_step": clock.seconds / steps,
        "precision": "fp32" if where.autocast_dtype is None else "bf16",
    }


def test_scores(bundle: Bundle, shards: ShardSet, experiment: Experiment) -> Scores:
    """Greedy, on all of the test split."""
    return evaluate(
        bundle.model,
        load_split(shards, "test"),
        bundle.target_tokenizer,
        Scoring.of(experiment),
    ).scores


def target_tokens(shards: ShardSet) -> int:
    """Real target tokens of an epoch."""
    table = pq.read_table(shards.folder / "lengths.parquet")
    train = table.filter(pc.equal(pc.cast(table["split"], "string"), "train"))
    return int(pc.sum(pc.multiply(train["target"], train["count"])).as_py())


def probe(experiment: Experiment, shards: ShardSet, where: Device, seconds: float) -> float:
    """CPU seconds of an update, over about `seconds` of them and 8 at least."""
    vocabulary = vocabulary_of(*tokenizers(shards), joint=shards.task.has_joint_vocabulary)
    model = experiment.model.build(vocabulary).train()
    objective = Objective(experiment.objective, model)
    optimizer = build_optimizer(objective, experiment.optim)
    endless = experiment.override({"steps": 1_000_000})
    started = 0.0
    with contextlib.closing(stream(shards, experiment.batch, seed=99)) as batches:
        for step in training_steps(objective, batches, optimizer, endless, device=where):
            spent = time.process_time() - started
            if step.index == 3:  # buffers and kernels are there
                started = time.process_time()
            elif step.index >= 11 and spent > seconds:
                break
    return spent / (step.index - 3)


def interval(values: Sequence[float]) -> str:
    """Mean and the half-width of its 95 % interval by Student's t, over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {half_width(values):.2f}"


def show(task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One table a task, a row an architecture."""
    metric = {"cmudict": ["per", "wer"], "multi30k": ["bleu"], "fsdd": ["per", "wer"]}[task]
    head = ["model", "parameters", *metric, "tokens/CPU-s", "s a step", "updates", "epochs"]
    head += ["CPU s", "runs"]
    table = Table(title=f"{task}, test split, greedy", title_justify="left", box=None)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for model in ENTRANTS[task]:
        runs = [row for row in rows if row["task"] == task and row["model"] == model]
        if not runs:
            continue

        def mean(key: str, runs: Sequence[Mapping[str, Any]] = runs) -> float:
            return statistics.mean(row[key] for row in runs)

        table.add_row(
            model,
            f"{runs[0]['parameters']:,}",
            *(interval([row[key] for row in runs]) for key in metric),
            f"{mean('tokens_per_cpu_second'):,.0f}",
            f"{mean('cpu_seconds_a_step'):.3f}",
            f"{mean('steps'):,.0f}",
            f"{mean('epochs'):.1f}",
            f"{mean('cpu_seconds'):.0f}",
            str(len(runs)),
        )
    Console(width=max(120, Console().width)).print(table, "")


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per architecture: mean scores; parameters and speed by task; the step-time ratio on FSDD."""
    found: dict[str, Any] = {}
    for task, entrants in ENTRANTS.items():
        for model in entrants:
            runs = [row for row in rows if row["task"] == task and row["model"] == model]
            if not runs:
                continue
            own = found.setdefault(model, {"parameters": {}, "tokens_per_cpu_second": {}})
            prefix = "fsdd_" if task == "fsdd" else ""
            for key in ("bleu",) if task == "multi30k" else ("per", "wer"):
                own[prefix + key] = round(statistics.mean(row[key] for row in runs), 3)
                own[f"{prefix}{key}_by_seed"] = [round(row[key], 3) for row in runs]
            own["parameters"][task] = runs[0]["parameters"]
            speeds = [row["tokens_per_cpu_second"] for row in runs]
            own["tokens_per_cpu_second"][task] = round(statistics.mean(speeds), 1)
    for kind in ("listener", "transformer"):
        steps = {
            by: [r["cpu_seconds_a_step"] for r in rows if r["model"] == f"{kind}-by-{by}"]
            for by in (1, 4)
        }
        if all(steps.values()):
            ratio = statistics.mean(steps[1]) / statistics.mean(steps[4])
            found[f"{kind}-by-4"]["step_time_ratio"] = round(ratio, 2)
    return found


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tasks", default="cmudict,multi30k,fsdd", help="comma-separated")
    add("--models", default="", help="comma-separated; all by default")
    add("--seconds", type=float, default=240.0, help="CPU seconds of training a run")
    add("--epochs", type=float, default=20.0, help="at most so many, whatever the time")
    add("--seeds", default="1,2,3", help="comma-separated")
    add("--lr-factor", type=float, default=1.0, help="on the learning rates, to probe them")
    add("--jobs", type=int, default=1, help="runs at a time, one thread each")
    add("--data", default=str(Path(__file__).parents[2] / "shared/data"), help="FSDD's parent")
    add("--workspace", default="workspace/zoo", help="shards and temporary files")
    add("--results", default="", help="one JSON line a run; WORKSPACE/results.jsonl by default")
    return parser.parse_args()


def jobs(given: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, so that an interrupted benchmark has something of everything."""
    models = [name for name in given.models.split(",") if name]
    for seed, task in itertools.product(given.seeds.split(","), given.tasks.split(",")):
        for model, entrant in ENTRANTS[task].items():
            if not models or model in models:
                yield Job(
                    task, model, int(seed), given.seconds, given.epochs,
                    entrant.lr * given.lr_factor, given.data, given.workspace,
                )  # fmt: skip


def main() -> None:
    """Runs what is not in the results yet, then prints tables and the figures as JSON."""
    given = arguments()
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in ("vinedresser", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    Path(given.workspace).mkdir(parents=True, exist_ok=True)
    results = Path(given.results or f"{given.workspace}/results.jsonl")
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.dumps(row["key"]): row for row in map(json.loads, lines)}
    wanted = list(jobs(given))
    waiting = [job for job in wanted if json.dumps(job.key) not in done]
    for job in {job.task: job for job in waiting}.values():  # two runs must not prepare one task
        prepare(job.experiment().task, Path(given.workspace) / "shards", executor="in_process")
    context = multiprocessing.get_context("spawn")
    # A process a run: its CPU time and its memory are its own.
    with ProcessPoolExecutor(given.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run, job) for job in waiting]):
            row = future.result()
            done[json.dumps(row["key"])] = row
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            _log.info(
                "%s %s seed %d: %.0f CPU s, %d updates, dev %.2f",
                row["task"], row["model"], row["seed"], row["cpu_seconds"], row["steps"],
                row["dev"],
            )  # fmt: skip
    rows = [done[json.dumps(job.key)] for job in wanted]
    for task in given.tasks.split(","):
        show(task, rows)
    print(json.dumps({"seconds": given.seconds, "seeds": given.seeds, **figures(rows)}))


if __name__ == "__main__":
    main()
