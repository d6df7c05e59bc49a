"""Planted faults through the real loop, each found by the right rule; healthy runs raise none."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.memory_tracker import MemoryTracker
from tests.short_run import MonitoredRun
from vinedresser.config import Experiment, Task, Tokenizer
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.shards import ShardSet, prepare
from vinedresser.errors import DivergedError
from vinedresser.health.monitor import RunMonitor
from vinedresser.health.rules import Finding
from vinedresser.health.series import RunFacts
from vinedresser.model import Memory
from vinedresser.training.device import Device
from vinedresser.workspace.layout import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

TRANSFORMER = {
    "kind": "transformer", "d_model": 32, "d_ff": 64, "num_heads": 4, "encoder_layers": 2,
    "decoder_layers": 2, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
LSTM = {"kind": "attention_rnn", "width": 32, "encoder_units": 16}


def run_of(shards: ShardSet, folder: Path, **changes: object) -> MonitoredRun:
    base = {
        "task": shards.task.to_json(), "model": TRANSFORMER, "steps": 100,
        "optim": {"lr": 5e-3, "warmup_steps": 10}, "batch": {"max_padded_tokens": 256},
        "evaluation": {"num_evaluations": 2}, "compute": {"device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    config = Experiment.from_json({**base, **changes})
    here, tracker = Device(torch.device("cpu"), None), MemoryTracker()
    return MonitoredRun(config, shards, RunFolder(folder), device=here, tracker=tracker)


def fired(run: MonitoredRun) -> set[str]:
    """Return the rules that fired; the tracking store and the artifact must name the same."""
    tracker = run.health._tracker
    assert isinstance(tracker, MemoryTracker)
    rules = tracker.tags.get("vinedresser.health", "")
    found = set(rules.split(", ")) - {""}
    assert found == set(run.health.findings)
    text = tracker.artifacts.get("health.md", "")
    assert all(f"**{rule}**" in text for rule in found)
    return found


def corpus(folder: Path, rows: Callable[[random.Random], tuple[str, str]]) -> ShardSet:
    draw, pairs = random.Random(0), {}
    for split, count in (("train", 400), ("dev", 60)):
        drawn = [rows(draw) for _ in range(count)]
        for i, side in enumerate(("source", "target")):
            (folder / f"{split}.{side}").write_text("".join(row[i] + "\n" for row in drawn))
        sides = (folder / f"{split}.source", folder / f"{split}.target")
        pairs[split] = Pair(source=str(sides[0]), target=str(sides[1]))
    task = Task(
        name="planted",
        corpus=TextCorpus(**pairs),
        tokenizer=Tokenizer(kind="symbols"),
        metric="per",
        max_source_length=20,
        max_target_length=20,
    )
    return prepare(task, folder / "shards", executor="in_process")


MODELS = {
    "transformer": TRANSFORMER,
    "lstm": LSTM,
    "gru_feeding": {**LSTM, "cell": "gru", "input_feeding": True},
    "conv": {"kind": "conv", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    "rnn": {"kind": "rnn", "width": 32, "encoder_units": 32},
}


class TestHealthy:
    @pytest.mark.parametrize("name", MODELS)
    def test_a_reversal_raises_nothing(self, name, reversal, tmp_path):
        run = run_of(reversal, tmp_path, model=MODELS[name], steps=150)
        run.execute()
        assert fired(run) == set()
        assert run.health.series.of("dev/conditioning_gap")[-1][1] > 1  # methods.md 2

    @pytest.mark.slow
    def test_pronunciations_and_sampling_raise_nothing(self, shared_data, tmp_path):
        from vinedresser.data.corpora.kinds.lexicon import LexiconCorpus

        words = LexiconCorpus(
            path=str(shared_data / "cmudict/cmudict.dict"), dev_words=200, test_words=200
        )
        symbols, letters = Tokenizer(kind="symbols"), Tokenizer(kind="characters")
        task = Task(
            name="g2p",
            corpus=words,
            source_tokenizer=letters,
            target_tokenizer=symbols,
            metric="per",
            max_source_length=40,
            max_target_length=40,
        )
        shards = prepare(task, tmp_path / "shards", executor="in_process")
        sampling = {"probability": 0.1, "decay_steps": 100}
        changes = {
            "steps": 200,
            "batch": {"max_padded_tokens": 512},
            "objective": {"likelihood": {"sampling": sampling}},
        }
        run = run_of(shards, tmp_path / "run", optim={"lr": 2e-3, "warmup_steps": 50}, **changes)
        run.execute()
        assert fired(run) == set()


class TestPlanted:
    def test_a_detached_encoder(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path)
        encode = run.model.encode

        def detached(source_BS: Tensor, source_lengths_B: Tensor) -> Memory:
            memory = encode(source_BS, source_lengths_B)
            return Memory(memory.states_BSD.detach(), memory.is_real_BS)

        run.model.encode = detached
        run.execute()
        assert fired(run) == {"source_ignored"}
        assert "encoder's share" in run.health.findings["source_ignored"].text

    def test_targets_that_belong_to_other_sources(self, tmp_path):
        def unpaired(draw: random.Random) -> tuple[str, str]:
            sides = [draw.choices("abcdef", k=draw.randint(2, 6)) for _ in range(2)]
            return " ".join(sides[0]), " ".join(sorted(sides[1]))

        run = run_of(corpus(tmp_path, unpaired), tmp_path / "run")
        run.execute()
        assert fired(run) == {"source_ignored"}
        assert "shuffled sources cost" in run.health.findings["source_ignored"].text

    def test_output_weights_five_times_too_large(self, reversal, tmp_path):
        """3 to 7 nats above ln 10: within the 9 nats that the rule once allowed."""
        run = run_of(reversal, tmp_path, steps=10)
        with torch.no_grad():
            run.model.target_embedding.weight.mul_(5.0)
        run.execute()
        assert "first_loss" in fired(run)

    def test_targets_of_another_vocabulary(self, tmp_path):
        def noise(draw: random.Random) -> tuple[str, str]:
            words = [str(draw.randrange(300)) for _ in range(draw.randint(2, 6))]
            return " ".join(draw.choices("abcdef", k=draw.randint(2, 6))), " ".join(words)

        run = run_of(corpus(tmp_path, noise), tmp_path / "run")
        run.execute()
        assert fired(run) & {"source_ignored", "loss_stuck"}
        assert fired(run) <= {"source_ignored", "loss_stuck"}

    def test_a_relu_layer_with_a_negative_bias(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path)
        layer = run.model.encoder[0].feed_forward
        with torch.no_grad():
            layer.inner.bias.fill_(-50.0)
        run.execute()
        assert fired(run) == {"dead_units"}
        assert "100% of the units of encoder.0.feed_forward" in str(
            run.health.findings["dead_units"]
        )

    def test_a_recurrent_layer_at_its_ends(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path, model={**LSTM, "encoder_layers": 2})
        layer = run.model.encoder.layers[1].ahead
        with torch.no_grad():
            layer.rnn.bias_hh_l0.fill_(50.0)
        run.execute()
        assert fired(run) == {"saturated_units"}
        text = run.health.findings["saturated_units"].text
        assert "100% of the outputs of encoder.layers.1.ahead.rnn gates" in text

    @pytest.mark.parametrize("metric", ["per", "bleu"])
    def test_a_model_that_trips_over_its_own_words(self, metric, reversal, tmp_path):
        """Under teacher forcing it gets better; of its own words it misreads more and more."""
        task = reversal.task.override({"metric": metric})
        shards = prepare(task, tmp_path / "shards", executor="in_process")
        run = run_of(shards, tmp_path, evaluation={"num_evaluations": 4}, steps=200)
        evaluator, step = run.evaluator, run.evaluator.model.step

        def tripping(state: object, tokens_B: Tensor) -> tuple[Tensor, object]:
            count = len(evaluator.history) * len(tokens_B) // 4
            return step(state, torch.cat([tokens_B[:count] * 0 + 5, tokens_B[count:]]))

        evaluator.model.step = tripping
        run.execute()
        assert fired(run) == {"exposure_gap"}
        assert "decoded minus teacher-forced error" in run.health.findings["exposure_gap"].text
        forced = [v for _, v in run.health.series.of("dev/teacher_forced_error")]
        assert forced == sorted(forced, reverse=True)

    @pytest.mark.parametrize("model", [TRANSFORMER, LSTM], ids=["transformer", "lstm"])
    def test_a_learning_rate_of_1000(self, model, reversal, tmp_path):
        optim = {"lr": 1e3, "warmup_steps": 0}
        run = run_of(reversal, tmp_path, model=model, optim=optim)
        with pytest.raises(DivergedError):
            run.execute()
        assert fired(run) & {"exploding_gradients", "non_finite"}
        assert fired(run) <= {"exploding_gradients", "non_finite", "update_ratio"}

    def test_a_learning_rate_of_next_to_nothing(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path, model=LSTM, optim={"lr": 1e-8, "warmup_steps": 0})
        run.execute()
        assert fired(run) == {"loss_stuck", "update_ratio"}

    def test_a_leak(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path, steps=200)
        logits, kept = run.model.decode, []

        def leaking(*args: object) -> Tensor:
            kept.append(torch.zeros(200, 1024))  # 0.8 MB
            return logits(*args)

        run.model.decode = leaking
        run.execute()
        assert len(kept) >= 200
        assert fired(run) == {"memory_growth"}
        text = run.health.findings["memory_growth"].text
        a_step = float(text.split(", ")[1].split()[0])
        assert a_step == pytest.approx(0.78, rel=0.15)

    def test_gradients_that_vanish_on_their_way_down(self, reversal, tmp_path):
        run = run_of(reversal, tmp_path)
        for p in run.model.encoder[0].parameters():
            p.register_hook(lambda grad: grad * 1e-5)
        run.execute()
        assert fired(run) == {"vanishing_gradients"}


def test_a_finding_is_told_once_and_survives_a_checkpoint(caplog, reversal, tmp_path):
    run = run_of(reversal, tmp_path)
    facts = RunFacts(uniform=2.0, steps=100, warmup=0, anneal=0.0, clip_norm=1.0)
    tracker = MemoryTracker()
    monitor = RunMonitor(run.model, facts, tracker, every=1)
    with caplog.at_level(logging.WARNING, logger="vinedresser"):
        for step in (10, 20, 30):
            monitor.log({"train/skipped_updates": step / 10}, step)
    assert len(caplog.records) == 1
    assert "1 updates were not finite" in caplog.text
    assert tracker.tags["vinedresser.health"] == "non_finite"
    assert "**non_finite** at step 10: 1 updates" in tracker.tags["mlflow.note.content"]
    resumed = RunMonitor(run.model, facts, tracker, every=1)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    with caplog.at_level(logging.WARNING, logger="vinedresser"):
        resumed.log({"train/skipped_updates": 4.0}, 40)
        resumed.report(Finding("dead_units", "seen", "Do.", 41))
    assert len(caplog.records) == 2
    assert tracker.tags["vinedresser.health"] == "non_finite, dead_units"
    assert tracker.artifacts["health.md"].count("- **") == 2
    assert tracker.tags["mlflow.note.content"] in tracker.artifacts["health.md"]
    assert resumed.series.of("train/skipped_updates")[-1] == (40, 4.0)


def test_a_resumed_run_goes_on_with_what_was_seen(reversal, tmp_path):
    run = run_of(
        reversal, tmp_path, model=LSTM, checkpoint_every=25, evaluation={"num_evaluations": 4}
    )

    def fails(metrics: object) -> None:
        if run.step == 50:
            raise RuntimeError("the host is gone")

    run.listener.evaluated = fails
    with pytest.raises(RuntimeError, match="gone"):
        run.execute()
    again = run_of(
        reversal, tmp_path, model=LSTM, checkpoint_every=25, evaluation={"num_evaluations": 4}
    )
    again.execute()
    assert [r.step for r in again.health.readings.history] == [1, *range(8, 97, 8)]
    for key in ("train/loss", "monitor/gradient_norm", "dev/conditioning_gap"):
        steps = [step for step, _ in again.health.series.of(key)]
        assert steps == sorted(set(steps))
        assert steps[0] < 30
        assert steps[-1] > 90


def test_a_run_is_pictured(reversal, tmp_path):
    run = run_of(reversal, tmp_path, steps=20, model=LSTM)
    run.health.picture()
    tracker = run.health._tracker
    assert not tracker.artifacts  # nothing was seen yet
    run.execute()
    run.health.picture()
    table = tracker.artifacts["monitors/layers.json"]
    assert len({len(column) for column in table.values()}) == 1
    assert set(table["layer"]) == set(run.health.readings.layers)
    assert set(table["step"]) == {1, 8, 16}
    for name in ("monitors/gradients.png", "monitors/layers.png"):
        figure = tracker.artifacts[name]
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000
    bars = tracker.artifacts["monitors/gradients.png"].axes[0]
    assert bars.get_xscale() == "log"
    assert [t.get_text() for t in bars.get_yticklabels()] == run.health.readings.layers


def test_the_four_curves_are_logged(reversal, tmp_path):
    """methods.md 106: train and test loss, total norm, mean gradient norm."""
    run = run_of(reversal, tmp_path, steps=20, model=LSTM)
    run.execute()
    keys = {key for key, _, _ in run.health._tracker.metrics}
    assert keys >= {
        "train/loss",
        "dev/teacher_forced_loss",
        "monitor/parameter_norm",
        "train/gradient_norm_mean",
        "train/first_loss",
    }
    first = [v for k, v, _ in run.health._tracker.metrics if k == "train/first_loss"]
    assert first == pytest.approx([2.3], abs=0.3)  # ln 10
