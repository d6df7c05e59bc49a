"""What ships where the numbers went bad."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.memory_tracker import MemoryTracker
from tests.short_run import a_run, experiment
from vinedresser.bundle import load_bundle
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import ShardSet, tokenizers
from vinedresser.errors import DivergedError, TrainingError
from vinedresser.evaluate import Evaluated, Scores, Scoring, evaluate, measure_exposure_gap
from vinedresser.metrics import measure
from vinedresser.nn.gates import head_gates
from vinedresser.special_ids import EOS
from vinedresser.training import evaluator
from vinedresser.training.listener import Best
from vinedresser.training.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil_pass(run: Run, at: int) -> None:
    """Makes the source's embeddings of one update not a number."""

    def spoil(module: torch.nn.Module, _: Any, states_BSD: torch.Tensor) -> torch.Tensor:
        return states_BSD * math.nan if module.training and run.step + 1 == at else states_BSD

    run.model.source_embedding.register_forward_hook(spoil)


@pytest.mark.fault("T01")
@pytest.mark.parametrize("kind", ["layer", "batch", "power"])
def test_t01_a_pass_that_is_not_a_number_is_left_out(kind, reversal: ShardSet, tmp_path: Path):
    config = experiment(reversal, **{"model.norm_kind": kind, "optim.max_skipped": 1})
    run = a_run(config, reversal, tmp_path)
    spoil_pass(run, 7)
    outcome = run.execute()
    assert outcome is not None
    assert run.window.skipped == 1
    assert all(math.isfinite(entry["teacher_forced_loss"]) for entry in outcome.history)
    for tensors in (
        run.model.state_dict(), run.ema.tensors,
        load_bundle(Path(outcome.bundle)).model.state_dict(),
    ):  # fmt: skip
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def spoil_average(run: Run) -> None:
    """Makes one of the averaged weights not a number; it stays so."""
    run.ema.tensors["output.bias"][5] = math.nan


@pytest.mark.fault("T01")
@pytest.mark.parametrize("gated", [[], ["enc_self"]], ids=["best", "last, for gates"])
def test_t01_weights_that_are_not_a_number_never_ship(gated, reversal: ShardSet, tmp_path: Path):
    told: list[dict[str, float]] = []

    def report(values: Any) -> None:
        told.append(dict(values))
        spoil_average(run)

    config = experiment(reversal, **{"model.concrete_heads": gated})
    run = a_run(config, reversal, tmp_path, report=report)
    outcome = run.execute()
    assert outcome is not None
    nats = [entry["teacher_forced_loss"] for entry in outcome.history]
    assert [math.isfinite(value) for value in nats] == [True, False, False]
    assert (outcome.best_step, run.evaluator.best_step) == (8, 8)
    shipped = load_bundle(Path(outcome.bundle)).model.state_dict()
    assert all(tensor.isfinite().all() for tensor in shipped.values())
    best = told[0]["best/per"]
    assert [values["best/per"] for values in (*told, outcome.last_report)] == [best] * 3
    # All numbers on dev at the end are those of the weights that ship.
    on_dev = [{k: v for k, v in values.items() if k.startswith("dev/")} for values in told]
    assert on_dev[0].items() <= outcome.last_report.items()
    assert not on_dev[1].items() <= outcome.last_report.items()


@pytest.mark.fault("T01")
def test_t01_a_run_without_a_finite_evaluation_fails(reversal: ShardSet, tmp_path: Path):
    told: list[dict[str, float]] = []
    run = a_run(experiment(reversal), reversal, tmp_path, report=lambda v: told.append(dict(v)))
    spoil_average(run)
    with pytest.raises(TrainingError, match=r"step 24: no model to ship.* at none of 3 eval") as e:
        run.execute()
    assert not isinstance(e.value, DivergedError)
    assert not (run.folder.path / "bundle").exists()
    assert len(told) == 2
    assert all(math.isnan(values["best/per"]) for values in told)
    assert run.evaluator.best_so_far is None
    # Nor does it when it goes on from its last checkpoint.
    with pytest.raises(TrainingError, match="no model to ship"):
        a_run(experiment(reversal), reversal, tmp_path).execute()


def scripted(run: Run, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the evaluations of a run find these values, one after the other."""
    found, evaluate = iter(values), evaluator.evaluate

    def evaluated(*arguments: Any, **settings: Any) -> Any:
        one = evaluate(*arguments, **settings)
        return replace(one, scores=replace(one.scores, value=next(found)))

    monkeypatch.setattr(evaluator, "evaluate", evaluated)


def test_gated_runs_report_the_best_and_ship_the_last(reversal, tmp_path, monkeypatch):
    """A sampler reads `best/`, which never gets worse; the objectives of pruning read the last."""
    told: list[dict[str, float]] = []
    config = experiment(reversal, **{"model.concrete_heads": ["enc_self"]})
    run = a_run(config, reversal, tmp_path, report=lambda v: told.append(dict(v)))
    scripted(run, [50.0, 20.0, 30.0], monkeypatch)
    outcome = run.execute()
    assert outcome is not None
    reports = [*told, outcome.last_report]
    assert [values["best/per"] for values in reports] == [50.0, 20.0, 20.0]
    assert [values["dev/per"] for values in reports] == [50.0, 20.0, 30.0]
    assert (outcome.best_step, outcome.value) == (24, 30.0)
    # Progress shows the best too; it showed the scores of the weights that ship.
    assert run.evaluator.best_so_far == Best("per", 20.0, 16)
    shipped = load_bundle(Path(outcome.bundle)).model
    assert all(
        torch.equal(tensor, run.ema.tensors[name]) for name, tensor in shipped.state_dict().items()
    )
    open_heads = sum(int((gate.deterministic() > 0).sum()) for gate in head_gates(shipped))
    assert outcome.last_report["dev/heads"] == open_heads


def texts(hypotheses: list[str], references: list[str], **scores: Any) -> Evaluated:
    found = Scores("cer", 12.5, "", 0.0, scores["error"], 0.0, len(references), 1.0)
    return Evaluated(found, references, hypotheses, references, [], [], [])


def test_the_exposure_gap_counts_tokens_on_both_sides(reversal):
    """Whatever the metric: 1 edit in 3 + 2 tokens and their 2 ends is 100 / 7 percent."""
    target = tokenizers(reversal)[1]
    decoded = texts(["a b c", "d f"], ["a b c", "d e"], error=10.0)
    assert measure_exposure_gap(decoded, target) == pytest.approx(100 / 7 - 10)
    solved = texts(["a b c"], ["a b c"], error=0.0)
    assert measure_exposure_gap(solved, target) == 0


@pytest.mark.parametrize("metric", ["per", "wer", "cer", "ter", "bleu", "ser"])
def test_the_gap_of_a_run_does_not_depend_on_its_metric(metric, reversal, tmp_path):
    """It was a rate of words or characters minus one of tokens for cer, wer and ter."""
    run = a_run(experiment(reversal), reversal, tmp_path)
    split, target = load_split(reversal, "dev"), tokenizers(reversal)[1]
    found = evaluate(
        run.evaluator.model, split, target, Scoring(metric, run.experiment.decoding, 20)
    )
    said, meant = (
        [[*target.encode(text), EOS] for text in side]
        for side in (found.hypotheses, found.references)
    )
    edits = sum(distance(a, b) for a, b in zip(said, meant, strict=True))
    wanted = 100 * edits / sum(map(len, meant)) - found.scores.teacher_forced_error
    assert measure_exposure_gap(found, target) == pytest.approx(wanted)


def distance(a: list[int], b: list[int]) -> int:
    """Edits between two sequences, by the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_last_evaluation_stores_what_the_model_that_ships_decodes(
    is_resumed, reversal, tmp_path, monkeypatch
):
    """A run that resumed after its best evaluation decodes dev again."""
    tracker = MemoryTracker()
    config = experiment(reversal, **{"evaluation.sentences": 0})
    run = a_run(config, reversal, tmp_path, tracker=tracker)
    log_tables = run.evaluator._log_tables

    def resumed(*given: Any) -> None:
        run.evaluator._shipping = None if is_resumed else run.evaluator._shipping
        log_tables(*given)

    monkeypatch.setattr(run.evaluator, "_log_tables", resumed)
    outcome = run.execute()
    assert outcome is not None
    found = tracker.artifacts["dev/sentences.json"]
    assert len(found["source"]) == 40
    value = measure("per", found["hypothesis"], found["reference"]).value
    assert value == pytest.approx(outcome.scores["per"])
    assert len(tracker.artifacts["dev/worst.json"]["source"]) == 20
    assert sum(tracker.artifacts["dev/by_length.json"]["sentences"]) == 40
    assert "decoded_error" in tracker.artifacts["dev/by_position.json"]
