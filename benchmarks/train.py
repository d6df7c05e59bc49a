"""Training speed of the zoo against peers: real target tokens per processor second, one thread.

`make bench NAME=train`; the settings are those of the peers' counterparts: Multi30k De-En, a joint
BPE of 8,000 pieces tied three ways, dropout .1, label smoothing .1, batches of 4,096 padded
tokens; transformers takes 128 sentences, grouped by length. Each peer lives in an environment of
its own, made once under `.peers`, and gets the very same pieces. Rounds alternate; a ratio is the
median over rounds of the ratios in one round.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring.figures import figures_of

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".peers"
WARM_UP = 3
# Ours -> JoeyNMT's counterpart. Its attention LSTM feeds the attentional state back.
PEER_OF = {"transformer-small": "transformer", "rnn-small": "lstm"}
# These are compared with a Marian model under transformers' Trainer too.
HAVE_HF = {"transformer-small"}
# The others share weights between target embedding and output layer only.
TIES_ALL = {"transformer-small"}

EMBEDDINGS = "{embedding_dim: 256, scale: %s, dropout: 0.1}"
JOEY_MODELS = {
    "transformer": f"""
  tied_embeddings: true
  tied_softmax: true
  encoder: {{type: transformer, num_layers: 3, num_heads: 4, embeddings: {EMBEDDINGS % "true"},
    hidden_size: 256, ff_size: 1024, dropout: 0.1, layer_norm: pre}}
  decoder: {{type: transformer, num_layers: 3, num_heads: 4, embeddings: {EMBEDDINGS % "true"},
    hidden_size: 256, ff_size: 1024, dropout: 0.1, layer_norm: pre}}
""",
    "lstm": f"""
  tied_embeddings: true
  tied_softmax: true
  encoder: {{type: recurrent, rnn_type: lstm, embeddings: {EMBEDDINGS % "false"},
    hidden_size: 256, bidirectional: true, dropout: 0.1, num_layers: 1}}
  decoder: {{type: recurrent, rnn_type: lstm, embeddings: {EMBEDDINGS % "false"},
    hidden_size: 256, dropout: 0.1, num_layers: 1, input_feeding: true, attention: luong,
    init_hidden: bridge}}
""",
}
JOEY = """
name: bench
joeynmt_version: "2.3.0"
model_dir: "{folder}/{model}-{run}"
use_cuda: false
fp16: false
random_seed: {run}
data:
  train: "{folder}/train"
  dev: "{folder}/dev"
  dataset_type: plain
  src: {{lang: de, level: word, lowercase: false, max_length: 256, voc_file: "{folder}/voc.txt"}}
  trg: {{lang: en, level: word, lowercase: false, max_length: 256, voc_file: "{folder}/voc.txt"}}
testing: {{batch_size: 4096, batch_type: token, eval_metrics: [bleu]}}
training:
  optimizer: adamw
  learning_rate: 0.001
  scheduling: warmupinversesquareroot
  learning_rate_warmup: 100
  normalization: tokens
  loss: crossentropy
  label_smoothing: 0.1
  clip_grad_norm: 1.0
  batch_size: 4096
  batch_type: token
  epochs: 100
  validation_freq: 1000000
  logging_freq: 1000000
  shuffle: true
  overwrite: true
model:
  initializer: xavier_uniform
{sizes}
"""


def corpus(folder: Path) -> Path:
    """Prepares Multi30k; answers the shards' folder."""
    from benchmarks.corpora.multi30k import multi30k
    from vinedresser.data.shards import prepare

    return prepare(multi30k(), folder, executor="in_process").folder


def write_pieces(shards: Path, folder: Path) -> None:
    """The same pieces as words, for a peer that reads text; and their vocabulary."""
    import sentencepiece

    from vinedresser.data.batching.reader import load_split
    from vinedresser.data.shards import open_shards
    from vinedresser.special_ids import EOS

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(shards / "joint.model"))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    (folder / "voc.txt").write_text("\n".join(["<unk>", "<pad>", "<s>", "</s>", *names[4:]]) + "\n")
    opened = open_shards(shards)
    for split in ("train", "dev"):
        rows = load_split(opened, split)
        for side, language in ((rows.source, "de"), (rows.target, "en")):
            ids = (side.values[a:b] for a, b in itertools.pairwise(side.offsets))
            lines = (" ".join(names[i] for i in row if i != EOS) for row in ids)
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")


# What pip is given, one call after another. torch first, the project's own version.
# JoeyNMT's pins (protobuf < 3.21) and sentencepiece 0.2.3 do not work together: no dependencies of
# its own choice.
INSTALLS = {
    "joeynmt": [
        "torch==2.13.0",
        "--no-deps joeynmt==2.3.0",
        "numpy tensorboard sacrebleu sacremoses sentencepiece==0.2.0 subword-nmt pyyaml packaging "
        "datasets pandas matplotlib seaborn six setuptools importlib_metadata",
    ],
    "hf": ["torch==2.13.0", "transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0"],
}


def environment(peer: str = "joeynmt") -> Path:
    """A peer's own Python; installed at the first call, about two minutes."""
    python = PEERS / peer / "bin/python"
    if not python.exists():
        print(f"installing {peer} into .peers/{peer}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS / peer)], check=True)
        for wanted in INSTALLS[peer]:
            command = [str(python), "-m", "pip", "install", "-q", *wanted.split()]
            subprocess.run(command, check=True)
    return python


def measure_joeynmt(model: str, seconds: float, folder: Path, run: int) -> float:
    """Tokens a processor second of JoeyNMT's loop."""
    config = folder / f"{model}-{run}.yaml"
    config.write_text(JOEY.format(folder=folder, model=model, run=run, sizes=JOEY_MODELS[model]))
    script = ROOT / "benchmarks/peers/joeynmt_steps.py"
    command = [str(environment()), str(script), str(config), str(seconds)]
    return figures_of(command)["tokens_per_cpu_second"]


def measure_hf(precision: str, seconds: float, folder: Path, run: int) -> float:
    """The same of transformers' Trainer with batches grouped by length."""
    script = ROOT / "benchmarks/peers/hf_steps.py"
    command = [str(environment("hf")), str(script), str(folder), str(seconds), precision, str(run)]
    return figures_of(command)["tokens_per_cpu_second"]


def measure_ours(model: str, precision: str, seconds: float, shards: Path, run: int) -> float:
    """The same of ours, in a process of its own."""
    command = [sys.executable, __file__, "--worker", model, precision, str(seconds), str(shards)]
    return figures_of([*command, str(run)])["tokens_per_cpu_second"]


def work(model: str, precision: str, seconds: float, shards: Path, seed: int) -> None:
    """Trains for some processor seconds and prints the rate; the loop is training_steps()."""
    import torch

    from vinedresser.config import Batching, Experiment
    from vinedresser.data.batching.reader import stream
    from vinedresser.data.shards import open_shards
    from vinedresser.model import Vocabulary
    from vinedresser.objective import Objective
    from vinedresser.training.device import resolve_device
    from vinedresser.training.optimizer import build_optimizer
    from vinedresser.training.step import training_steps

    opened = open_shards(shards)
    plain = {
        "task": opened.task.to_json(),
        "model": {"kind": model, **({"tie": "all"} if model in TIES_ALL else {})},
        "objective": {"likelihood": {"label_smoothing": 0.1}},
        "optim": {"lr": 1e-3},
        "compute": {"threads": 1, "precision": precision, "device": "cpu"},
        "steps": 10**6,
        "seed": seed,
    }
    experiment = Experiment.from_json(plain)
    here = resolve_device(experiment.compute)
    torch.manual_seed(seed)
    size = opened.source_size
    built = experiment.model.build(Vocabulary(size, size, joint=True)).train()
    objective = Objective(experiment.objective, built)
    optimizer = build_optimizer(objective, experiment.optim)
    batches = stream(opened, Batching(max_padded_tokens=4096), seed=seed)
    marks, tokens = [], 0
    for step in training_steps(objective, batches, optimizer, experiment, device=here):
        tokens += int(step.tokens)
        marks.append((time.process_time(), tokens))
        if len(marks) > WARM_UP + 1 and marks[-1][0] - marks[WARM_UP][0] > seconds:
            break
    (begun, before), (ended, after) = marks[WARM_UP], marks[-1]
    figures = {
        "tokens_per_cpu_second": (after - before) / (ended - begun),
        "steps": len(marks) - 1 - WARM_UP,
        "parameters": sum(p.numel() for p in built.parameters()),
    }
    print(json.dumps(figures))


def rounds(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, float]]:
    """One measurement of everything a round, in alternating order."""
    shards = corpus(folder)
    write_pieces(shards, folder)
    wanted, seconds = list(arguments.models), arguments.seconds
    for run in range(1, arguments.rounds + 1):
        found: dict[str, float] = {}
        for model in wanted if run % 2 else wanted[::-1]:
            for precision in ("fp32", "auto"):
                # Beside each other: what disturbs one of the pair likely disturbs the other.
                if model in HAVE_HF:
                    other = "bf16" if precision == "auto" else "fp32"
                    found[f"hf grouped {other}"] = measure_hf(other, seconds, folder, run)
                found[f"{model} {precision}"] = measure_ours(model, precision, seconds, shards, run)
                peer = PEER_OF.get(model)
                if peer and precision == "fp32":
                    found[f"joeynmt {peer}"] = measure_joeynmt(peer, seconds, folder, run)
        print(f"round {run}: " + ", ".join(f"{k} {v:.0f}" for k, v in found.items()), flush=True)
        yield found


def ratios(model: str, found: list[dict[str, float]]) -> dict[str, list[float]]:
    """Figure's name -> ours over the peer's in each round."""
    pairs = {}
    if model in HAVE_HF:
        pairs["fp32_vs_hf_grouped"] = (f"{model} fp32", "hf grouped fp32")
        pairs["default_vs_hf_grouped_bf16"] = (f"{model} auto", "hf grouped bf16")
    if model in PEER_OF:
        peer = PEER_OF[model]
        short = "" if peer == "transformer" else f"{peer}_"
        for precision, label in (("fp32", "fp32"), ("auto", "default")):
            pairs[f"{short}{label}_vs_joeynmt"] = (f"{model} {precision}", f"joeynmt {peer}")
    return {name: [run[ours] / run[peer] for run in found] for name, (ours, peer) in pairs.items()}


def main() -> None:
    """Runs the rounds and prints a table and the ratios."""
    if sys.argv[1:2] == ["--worker"]:
        model, precision, seconds, shards, seed = sys.argv[2:]
        work(model, precision, float(seconds), Path(shards), int(seed))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0, help="processor seconds a run")
    parser.add_argument("--models", nargs="+", default=[*PEER_OF, "conv-small"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = list(rounds(arguments, Path(folder)))
    print(f"{'':28}{'median':>8}{'min':>8}{'max':>8}  target tokens per CPU-second, one thread")
    for name in found[0]:
        values = [run[name] for run in found]
        print(f"{name:28}{statistics.median(values):8.0f}{min(values):8.0f}{max(values):8.0f}")
    figures: dict[str, float] = {}
    for model in arguments.models:
        for name, values in ratios(model, found).items():
            figures[name] = round(statistics.median(values), 3)
            print(f"{name:28}{figures[name]:8.2f}{min(values):8.2f}{max(values):8.2f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
