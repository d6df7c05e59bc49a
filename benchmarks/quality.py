"""BLEU after an equal CPU budget: ours, JoeyNMT and transformers on Multi30k De-En, 3 seeds.

`make bench NAME=quality`. Every system gets the same pieces, the same shape of model (the small
Transformer, layer norm first, embeddings tied three ways, the same variances at the start), the
same optimizer and dropout, as many real target tokens an update, and the learning rate of every
update from our schedule, stretched over as many updates as it can do within the budget: CPU seconds
of one thread, evaluation and reading of the corpus excluded. That number comes from a short run
before. All decode greedily, and one sacreBLEU scores the same detokenised text.

What stays each system's own: which rows share a batch (JoeyNMT random, transformers grouped by
length, in sentences instead of tokens), precision (JoeyNMT knows no bf16 on CPUs) and the averaging
of weights, which the peers lack and which gains nothing once the learning rate has fallen.

Beside this, bf16 against fp32 after the SAME number of updates, seed by seed.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.corpora.multi30k import multi30k
from benchmarks.measuring.figures import figures_of, half_width
from benchmarks.train import JOEY, JOEY_MODELS, ROOT, environment, write_pieces
from search_spaces.translation import EXPERIMENT
from vinedresser.config import Decoding, Experiment
from vinedresser.data.batching.reader import load_split, stream
from vinedresser.data.shards import open_shards, prepare, tokenizers
from vinedresser.evaluate import Scoring, evaluate
from vinedresser.metrics import measure
from vinedresser.model import Vocabulary
from vinedresser.objective import Objective
from vinedresser.training.device import resolve_device, seed_step
from vinedresser.training.ema import AveragedWeights
from vinedresser.training.optimizer import build_optimizer, learning_rate
from vinedresser.training.step import training_steps
from vinedresser.workspace.commit import digest_of

SYSTEMS = ("ours", "ours fp32", "transformers bf16", "joeynmt")
# fp32 with the updates that bf16 can do: whether precision costs quality.
SAME_UPDATES = "ours fp32, updates of bf16"
# Updates of the short run that tells how many a budget holds; its first ones are slower.
_PROBE = 24
# Pieces of the longest hypothesis.
_CAP = 100


@dataclass(frozen=True)
class Job:
    """One training run; what its process is told, as JSON.

    Attributes:
        system: one of SYSTEMS or SAME_UPDATES.
        seed: of weights, order and dropout.
        rates: learning rate of each update.
        shards: our own folder of the corpus.
        folder: the same pieces as text, for peers.
        out: where the hypotheses go, a line each; empty where nothing is decoded.
        batch: padded tokens.
        dropout: everywhere.
        cap: pieces of the longest hypothesis.
    """

    system: str
    seed: int
    rates: Sequence[float]
    shards: str
    folder: str
    out: str
    batch: int
    dropout: float
    cap: int = _CAP


def corpus(folder: Path) -> Path:
    """Prepares Multi30k, its dev split being test_2016_flickr; answers the shards' folder."""
    task = multi30k(dev="test_2016_flickr")
    return prepare(task, folder, executor="in_process").folder


def experiment_of(job: Job) -> Experiment:
    """The preset over the corpus, for as many updates as there are rates."""
    steps = len(job.rates)
    precision = "fp32" if "fp32" in job.system else "auto"
    plain = EXPERIMENT.to_json() | {"task": open_shards(Path(job.shards)).task.to_json()}
    return Experiment.from_json(plain).override(
        {
            "steps": steps,
            "evaluation.num_evaluations": 1,
            "optim.warmup_steps": warm_up(steps),
            "compute.threads": 1,
            "compute.precision": precision,
            "seed": job.seed,
        }
    )


def warm_up(steps: int) -> int:
    """The preset's share of a run."""
    return max(1, round(steps * EXPERIMENT.optim.warmup_steps / EXPERIMENT.steps))


def rates(steps: int) -> list[float]:
    """The preset's schedule over so many updates."""
    optim = EXPERIMENT.optim.model_copy(update={"warmup_steps": warm_up(steps)})
    return [learning_rate(optim, step=i + 1, steps=steps) for i in range(steps)]


def train_ours(job: Job) -> dict[str, Any]:
    """The loop is training_steps() with averaged weights, as a run has it."""
    experiment, shards = experiment_of(job), open_shards(Path(job.shards))
    here = resolve_device(experiment.compute)
    seed_step(job.seed, 0, 0)
    vocabulary = Vocabulary(shards.source_size, shards.target_size, joint=True)
    model = experiment.model.build(vocabulary).train()
    objective = Objective(experiment.objective, model)
    optimizer = build_optimizer(objective, experiment.optim)
    averaged = AveragedWeights(model, experiment.optim.ema_decay)
    batches = stream(shards, experiment.batch, seed=job.seed)
    begun, tokens = time.process_time(), 0
    for step in training_steps(objective, batches, optimizer, experiment, device=here):
        averaged.update(step.index)
        tokens += int(step.tokens)
    seconds = time.process_time() - begun
    batches.close()
    if job.out:
        model.load_state_dict(averaged.tensors)
        test = load_split(shards, "dev")
        evaluated = evaluate(
            model.eval(), test, tokenizers(shards)[1], Scoring("bleu", Decoding(), _CAP)
        )
        Path(job.out).write_text("\n".join(evaluated.hypotheses) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    return {"cpu_seconds": seconds, "tokens": tokens, "parameters": parameters}


def joeynmt_config(job: Job) -> str:
    """JoeyNMT's file: the one of the speed benchmark with what differs here."""
    plain = yaml.safe_load(
        JOEY.format(
            folder=job.folder, model="quality", run=job.seed, sizes=JOEY_MODELS["transformer"]
        )
    )
    model = plain["model"]
    # Its default gives the tied table, which is also the output layer, a quarter of our variance.
    model |= {"embed_initializer": "normal", "embed_init_weight": 256**-0.5}
    for part in (model["encoder"], model["decoder"]):
        part["dropout"] = part["embeddings"]["dropout"] = job.dropout
    plain["training"] |= {
        "updates": len(job.rates),
        "learning_rate": job.rates[0],
        "adam_betas": list(EXPERIMENT.optim.betas),
        "weight_decay": EXPERIMENT.optim.weight_decay,
        "clip_grad_norm": EXPERIMENT.optim.clip_norm,
        # Its batches are random, half of them is padding: as many real tokens as ours have.
        "batch_size": 2 * job.batch,
    }
    plain["testing"] |= {"beam_size": 1, "max_output_length": job.cap}
    path = Path(job.folder) / f"quality-{job.seed}.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


def run(job: Job) -> dict[str, Any]:
    """One job in a process of its own, on one thread."""
    plain = asdict(job)
    command = [sys.executable, __file__, "--worker"]
    if job.system == "joeynmt":
        plain["config"] = joeynmt_config(job)
        command = [str(environment()), str(ROOT / "benchmarks/peers/joeynmt_quality.py")]
    elif job.system.startswith("transformers"):
        # 60 sentences have as many real target tokens as our batches of 1,024: 930.
        plain |= {"sentences": job.batch // 17, "bf16": "bf16" in job.system}
        command = [str(environment("hf")), str(ROOT / "benchmarks/peers/hf_quality.py")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(plain))
        return figures_of([*command, str(path)])


def bleu(job: Job) -> tuple[float, str]:
    """Score and signature of what a job decoded. Peers' lines are pieces, ours are text."""
    import sentencepiece

    references = load_split(open_shards(Path(job.shards)), "dev").references
    lines = Path(job.out).read_text().split("\n")[:-1]
    if not job.system.startswith("ours"):
        pieces = sentencepiece.SentencePieceProcessor(model_file=f"{job.shards}/joint.model")
        lines = [pieces.decode_pieces(line.split()) for line in lines]
    measured = measure("bleu", lines, references, folds_case=False)
    return measured.value, measured.signature


def updates_within(seconds: float, job: Job) -> int:
    """How many updates of a system a budget holds, from two short runs of it."""
    short, long = (
        float(run(Job(**{**asdict(job), "rates": rates(n)}))["cpu_seconds"])
        for n in (_PROBE // 4, _PROBE)
    )
    return max(8, int(seconds / ((long - short) / (_PROBE - _PROBE // 4))))


def show(rows: Mapping[str, Sequence[Mapping[str, Any]]], signature: str) -> None:
    """A row a system."""
    print(f"{'':28}{'BLEU, 95% interval':>20}{'by seed':>22}{'updates':>9}{'CPU s':>7}")
    for system, runs in rows.items():
        scores = [row["bleu"] for row in runs]
        mean = f"{statistics.mean(scores):.2f} ± {half_width(scores):.2f}"
        each = " ".join(f"{score:.2f}" for score in scores)
        seconds = statistics.mean(row["cpu_seconds"] for row in runs)
        print(f"{system:28}{mean:>20}{each:>22}{runs[0]['updates']:9d}{seconds:7.0f}")
    print(signature)


def figures(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The same as plain numbers; and bf16 minus fp32 after equal updates, paired by seed."""
    found: dict[str, Any] = {}
    for system, runs in rows.items():
        scores = [row["bleu"] for row in runs]
        found[system] = {
            "bleu": round(statistics.mean(scores), 2),
            "half_width": round(half_width(scores), 2),
            "bleu_by_seed": [round(score, 2) for score in scores],
            "updates": runs[0]["updates"],
            "cpu_seconds": round(statistics.mean(row["cpu_seconds"] for row in runs), 1),
        }
    if "ours" in rows and SAME_UPDATES in rows:
        pairs = zip(rows["ours"], rows[SAME_UPDATES], strict=True)
        gains = [bf16["bleu"] - fp32["bleu"] for bf16, fp32 in pairs]
        found["bf16_minus_fp32_same_updates"] = round(statistics.mean(gains), 2)
        found["bf16_minus_fp32_half_width"] = round(half_width(gains), 2)
    return found


def main() -> None:
    """Runs what is not in the results yet, then prints a table and the figures as JSON."""
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(train_ours(Job(**json.loads(Path(sys.argv[2]).read_text())))))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="CPU seconds a run")
    parser.add_argument("--seeds", type=int, default=3, help="2 to 5")
    parser.add_argument("--systems", nargs="+", default=[*SYSTEMS, SAME_UPDATES])
    parser.add_argument("--workspace", default="workspace/quality", help="shards and results")
    given = parser.parse_args()
    workspace = Path(given.workspace).resolve()
    shards = corpus(workspace / "shards")
    folder = workspace / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    write_pieces(shards, folder)
    for side in ("de", "en"):  # the peers' name of what they decode
        (folder / f"test.{side}").write_bytes((folder / f"dev.{side}").read_bytes())
    results = workspace / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.dumps(row["key"]): row for row in map(json.loads, lines)}
    # Results of another budget or preset are left alone. What a budget holds is measured once a
    # system, so that its seeds do equally much.
    preset = digest_of(EXPERIMENT.to_json())[:12]
    updates = {
        row["key"][2]: row["key"][4]
        for row in done.values()
        if row["key"][:2] == [preset, given.seconds]
    }
    rows: dict[str, list[dict[str, Any]]] = {system: [] for system in given.systems}
    signature = ""
    for seed, system in itertools.product(range(1, given.seeds + 1), given.systems):
        twin = "ours" if system == SAME_UPDATES else system
        job = Job(
            system, seed, (), str(shards), str(folder), "", EXPERIMENT.batch.max_padded_tokens,
            EXPERIMENT.model.to_json()["dropout"],
        )  # fmt: skip
        if twin not in updates:
            updates[twin] = updates_within(given.seconds, job)
        key = [preset, given.seconds, system, seed, updates[twin]]
        out = str(workspace / f"{'-'.join(map(str, key))}.txt".replace(" ", "_"))
        job = Job(**{**asdict(job), "rates": rates(updates[twin]), "out": out})
        row = done.get(json.dumps(key))
        if row is None:
            row = {"key": key, **run(job), "updates": updates[twin], "load": os.getloadavg()[0]}
            row["bleu"], row["signature"] = bleu(job)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            said = f"seed {seed}: BLEU {row['bleu']:.2f}, {row['cpu_seconds']:.0f} CPU s"
            print(time.strftime("%H:%M:%S"), system, said, file=sys.stderr, flush=True)
        signature = row["signature"]
        rows[system].append(row)
    show(rows, signature)
    print(json.dumps({"seconds": given.seconds, **figures(rows)}))


if __name__ == "__main__":
    main()
