"""Recordings through the whole house: shards, training, a bundle, and text from a path."""

import hashlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.short_run import Reports
from vinedresser.bundle import Bundle, load_bundle
from vinedresser.cli import main
from vinedresser.config import Batching, Experiment, Task
from vinedresser.data.batching import pools
from vinedresser.data.batching.pools import ShardPool
from vinedresser.data.batching.reader import Batches, load_split
from vinedresser.data.corpora.corpus import read
from vinedresser.data.shards import ShardSet, prepare, tokenizers
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.errors import ConfigError, DataError
from vinedresser.evaluate import Scoring, evaluate, tokenized
from vinedresser.tracking import NullTracker
from vinedresser.training.device import Device
from vinedresser.training.run import Run
from vinedresser.workspace.layout import RunFolder

soundfile = pytest.importorskip("soundfile", reason="the extra `speech` is not installed")
pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")

RATE = 8000
PITCH = {"L": 300, "M": 800, "H": 2200}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Two to four tones a string; each split has recordings of its own."""
    folder, draw = tmp_path_factory.mktemp("tones"), random.Random(0)
    noise = np.random.default_rng(0)
    for split, takes, strings in (("train", 6, 300), ("dev", 2, 20)):
        for name, hertz in PITCH.items():
            for take in range(takes):
                times = np.arange(draw.randint(800, 1000)) / RATE
                wave = 0.2 * np.sin(2 * np.pi * (hertz + 5 * take) * times)
                wave += noise.normal(0, 0.01, len(wave))
                soundfile.write(str(folder / f"{split}-{name}{take}.wav"), wave, RATE)
        rows = []
        for _ in range(strings):
            names = draw.choices("LMH", k=draw.randint(2, 4))
            audio = [f"{split}-{name}{draw.randrange(takes)}.wav" for name in names]
            rows.append(json.dumps({"audio": audio, "text": " ".join(names)}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    corpus = {"kind": "speech", **{s: str(folder / f"{s}.jsonl") for s in ("train", "dev")}}
    return Task.from_json(
        {
            "name": "tones",
            "corpus": corpus,
            "source_tokenizer": {"kind": "frames", "sample_rate": RATE, "num_mels": 20},
            "target_tokenizer": {"kind": "symbols"},
            "metric": "per",
            "max_source_length": 60,
            "max_target_length": 8,
        }
    )


@pytest.fixture(scope="module")
def shards(task: Task, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return prepare(task, tmp_path_factory.mktemp("shards"), executor="in_process")


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != "manifest.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_shards_hold_the_frames(task, shards):
    assert (shards.features, shards.source_size, shards.is_joint) == (20, 0, False)
    assert shards.counts == {"train": 300, "dev": 20}
    dev = load_split(shards, "dev")
    rows = list(read(task, "dev"))
    assert dev.references == [row.target for row in rows]
    assert dev.sources[0] == " ".join(Path(path).name for path in rows[0].source)
    batch = dev.batch(np.arange(len(dev)))
    for frames_SF, length, row in zip(
        batch.source_BS.numpy(), batch.source_lengths_B.tolist(), rows, strict=True
    ):
        assert np.array_equal(
            frames_SF[:length], Filterbank(task.source_tokenizer).encode(row.source)
        )
        assert (frames_SF[length:] == 0).all()
    lengths = shards.meta["lengths"]["train"]
    assert lengths["source"]["unknown"] == 0
    assert len(shards.meta["shards"]["train"]) == 2  # 200 utterances a block


def test_batches_keep_the_budget_in_frames(shards):
    batches = Batches(shards, Batching(max_padded_tokens=400), seed=1)
    seen = []
    for index in range(batches.per_epoch):
        batch = batches[index]
        assert batch.source_BS.shape[0] * batch.source_BS.shape[1] <= 400
        seen += batch.rows_B.tolist()
    assert sorted(seen) == list(range(300))


def test_a_window_of_frames_has_so_many_bytes(shards, monkeypatch):
    mean = shards.meta["lengths"]["train"]["source"]["mean"]
    assert len(ShardPool(shards, "train")) == 1
    monkeypatch.setattr(pools, "CHUNK_BYTES", 200 * mean * 20 * 2 + 1)
    assert len(ShardPool(shards, "train")) == 2
    batches = Batches(shards, Batching(max_padded_tokens=400), seed=1)
    rows = [row for i in range(batches.per_epoch) for row in batches[i].rows_B.tolist()]
    assert sorted(rows) == list(range(300))


@pytest.mark.ray
def test_ray_writes_the_same_bytes(task, shards, tmp_path, local_ray):
    other = prepare(task, tmp_path, executor="ray")
    assert other.digest == shards.digest
    assert hashes(other.folder) == hashes(shards.folder)


@pytest.fixture(scope="module")
def bundle(task, shards, one_thread, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A listener that has learned tones, from 200 updates."""
    experiment = Experiment.from_json(
        {
            "name": "tones",
            "task": task.to_json(),
            "model": {
                "kind": "attention_rnn", "width": 32, "encoder_units": 24, "encoder_layers": 2,
                "dropout": 0, "subsampling": {"kind": "concat", "factor": 2, "layers": 1},
            },
            "optim": {"lr": 1e-2, "warmup_steps": 20},
            "batch": {"max_padded_tokens": 800},
            "evaluation": {"num_evaluations": 1},
            "compute": {"device": "cpu", "precision": "fp32"},
            "steps": 200,
        }
    )  # fmt: skip
    workspace = tmp_path_factory.mktemp("space")
    device = Device(torch.device("cpu"), None)
    run = Run(
        experiment,
        shards,
        RunFolder(workspace / "run"),
        device=device,
        tracker=NullTracker(),
        listener=Reports(print),
    )
    outcome = run.execute()
    assert outcome is not None
    return load_bundle(Path(outcome.bundle))


def test_it_learns_and_is_scored_the_same_from_files(task, shards, bundle):
    assert bundle.scores["dev"]["per"] < 10
    rows = [(row.source, row.target) for row in read(task, "dev")]
    split = tokenized(rows, bundle.source_tokenizer, bundle.target_tokenizer)
    assert split.sources[0] == " ".join(rows[0][0])
    again = evaluate(
        bundle.model,
        split,
        bundle.target_tokenizer,
        Scoring("per", bundle.experiment.decoding, task.max_target_length),
    )
    assert again.scores.value == bundle.scores["dev"]["per"]
    assert bundle.source_tokenizer.digest == tokenizers(shards)[0].digest


def test_translate_reads_paths(task, bundle, monkeypatch, capsys):
    rows = list(read(task, "dev"))[:5]
    lines = ["\t".join(row.source) for row in rows]
    texts = bundle.translate(lines)
    assert sum(text == row.target for text, row in zip(texts, rows, strict=True)) >= 4
    assert bundle.translate(lines[::-1]) == texts[::-1]
    assert bundle.translate([lines[0]]) == texts[:1]
    assert bundle.translate([]) == []
    given = "\n".join([*lines, "", lines[0]]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert main(["translate", str(bundle.folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [*texts, "", texts[0]]


def test_translate_refuses_in_one_line(task, bundle, tmp_path):
    (row, *_) = read(task, "dev")
    with pytest.raises(DataError, match=r"line 2: .*gone\.wav: no such file"):
        bundle.translate([row.source[0], str(tmp_path / "gone.wav")])
    with pytest.raises(DataError, match=r"line 1: \d+ frames; wanted 1 to 60 frames"):
        bundle.translate(["\t".join(row.source * 4)])


def test_wrong_tokenizers_for_a_corpus(task):
    with pytest.raises(ConfigError, match="needs a source_tokenizer of `kind: frames`"):
        task.override({"source_tokenizer": {"kind": "symbols"}})
