"""What ships where the numbers went bad."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.short_run import a_run, experiment
from vinedresser.bundle import load_bundle
from vinedresser.data.shards import ShardSet
from vinedresser.errors import DivergedError, TrainingError
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
    assert all(math.isfinite(entry["teacher_forced_nats"]) for entry in outcome.history)
    for tensors in (
        run.model.state_dict(), run.averaged.tensors,
        load_bundle(Path(outcome.bundle)).model.state_dict(),
    ):  # fmt: skip
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def spoil_average(run: Run) -> None:
    """Makes one of the averaged weights not a number; it stays so."""
    run.averaged.tensors["output.bias"][5] = math.nan


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
    nats = [entry["teacher_forced_nats"] for entry in outcome.history]
    assert [math.isfinite(value) for value in nats] == [True, False, False]
    assert (outcome.best_step, run.evaluator.best_step) == (8, 8)
    shipped = load_bundle(Path(outcome.bundle)).model.state_dict()
    assert all(tensor.isfinite().all() for tensor in shipped.values())
    best = told[0]["best/per"]
    assert [values["best/per"] for values in (*told, outcome.last_report)] == [best] * 3


@pytest.mark.fault("T01")
def test_t01_a_run_without_a_finite_evaluation_fails(reversal: ShardSet, tmp_path: Path):
    told: list[dict[str, float]] = []
    run = a_run(experiment(reversal), reversal, tmp_path, report=lambda v: told.append(dict(v)))
    spoil_average(run)
    with pytest.raises(TrainingError, match=r"step 24: no model to ship.* at none of 3 eval") as e:
        run.execute()
    assert not isinstance(e.value, DivergedError)
    assert not (run.folder / "bundle").exists()
    assert len(told) == 2
    assert all(math.isnan(values["best/per"]) for values in told)
    assert run.evaluator.standing is None
    # Nor does it when it goes on from its last checkpoint.
    with pytest.raises(TrainingError, match="no model to ship"):
        a_run(experiment(reversal), reversal, tmp_path).execute()
