"""Searches on a real local Ray, with Optuna's journal and MLflow's SQLite behind them."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from tests.short_run import a_run, experiment
from vinedresser import tracking
from vinedresser.bundle import load_bundle
from vinedresser.cluster.connect import ENVIRONMENT
from vinedresser.config.study import Study
from vinedresser.data.shards import ShardSet
from vinedresser.distributed.context import RunContext
from vinedresser.errors import BusyError, ConfigError, TrainingError
from vinedresser.pruning.heads import count_heads
from vinedresser.sweep import SweepOutcome, TrialRow, sweep
from vinedresser.sweep.journal import ended_trials, repair_journal
from vinedresser.sweep.outcome import directions, rank, report_keys
from vinedresser.sweep.searcher import Searcher
from vinedresser.sweep.trials import TrialWatch
from vinedresser.tracking import RunRow, Store
from vinedresser.training import evaluator
from vinedresser.workspace.commit import commit
from vinedresser.workspace.layout import RunFolder, SpoolFolder, SweepFolder, Workspace
from vinedresser.workspace.lease import leased

# MLflow's and Optuna's own imports warn; none of it is ours to change.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_user_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# --- the searcher, without Ray -------------------------------------------------------------------


def study_of(directions: tuple[str, ...] = ("minimize",)) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=list(directions))


def searcher(study: optuna.Study, *keys: str) -> Searcher:
    space = {"optim.lr": FloatDistribution(1e-4, 1e-2)}
    one = Searcher(study, space, list(keys or ("best/per",)))
    proposal = one.suggest("a")
    assert proposal == {"number": 0, "params": study.trials[0].params}
    assert list(proposal["params"]) == ["optim.lr"]
    return one


def report(value: float, step: int, **more: Any) -> dict[str, Any]:
    return {"best/per": value, "step": float(step), "is_last": 0.0, **more}


def test_a_trial_that_ended_is_complete_with_its_last_value() -> None:
    one = searcher(study := study_of())
    one.on_trial_result("a", report(30.0, 10))
    one.on_trial_complete("a", {**report(20.0, 20), "is_last": 1.0, "run/bundle": "/b"})
    (trial,) = study.trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 20.0)
    assert trial.user_attrs["outcome"]["run/bundle"] == "/b"


def test_a_stopped_trial_is_pruned_with_the_value_it_was_stopped_at() -> None:
    one = searcher(study := study_of())
    one.on_trial_result("a", report(30.0, 10))
    one.on_trial_complete("a", report(25.0, 20))
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {10: 30.0, 20: 25.0}
    assert trial.value == 25.0


@pytest.mark.parametrize("result", [None, {}, {"step": 3.0}, report(math.nan, 3, is_last=1.0)])
def test_a_trial_without_a_finite_metric_fails_with_the_reason(result: Any) -> None:
    one = searcher(study := study_of())
    one.on_trial_complete("a", result)
    (trial,) = study.trials
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["reason"] == "best/per missing or not finite"


def test_nan_and_missing_values_on_the_way_are_passed_over() -> None:
    one = searcher(study := study_of())
    one.on_trial_result("a", report(math.nan, 10))
    one.on_trial_result("a", {"step": 15.0})
    one.on_trial_result("a", report(25.0, 20))
    assert study.trials[0].intermediate_values == {20: 25.0}


def test_terminal_states_are_final() -> None:
    one = searcher(study := study_of())
    one.on_trial_complete("a", {**report(20.0, 20), "is_last": 1.0})
    one.on_trial_complete("a", report(99.0, 30))
    one.on_trial_complete("a", error=True)
    one.on_trial_result("a", report(98.0, 40))
    (trial,) = study.trials
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 20.0, {})
    one.on_trial_complete("nobody", report(1.0, 1))
    assert len(study.trials) == 1


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        ({"error": True}, "process died"),
        ({"result": {"reason": "step 20: loss nan"}}, "^step 20: loss nan$"),
    ],
)
def test_a_failed_trial_has_a_reason(ended: dict[str, Any], reason: str) -> None:
    one = searcher(study := study_of())
    one.on_trial_result("a", report(30.0, 10))
    one.on_trial_complete("a", **ended)
    (trial,) = study.trials
    assert trial.state == TrialState.FAIL
    assert re.search(reason, trial.user_attrs["reason"])


@pytest.mark.parametrize(
    "keys",
    [("best/per", "dev/heads"), ("best/per", "dev/heads", "dev/teacher_forced_loss")],
    ids=len,
)
def test_several_objectives_are_recorded_at_the_end_only(keys: tuple[str, ...]) -> None:
    one = searcher(study := study_of(("minimize",) * len(keys)), *keys)
    values = dict(zip(keys, (20.0, 4.0, 0.5), strict=False))
    one.on_trial_result("a", {**values, "step": 1.0})
    one.on_trial_complete("a", {**values, "step": 2.0, "is_last": 1.0})
    one.suggest("b")
    one.on_trial_complete("b", {**values, keys[-1]: math.nan, "step": 2.0, "is_last": 1.0})
    complete, failed = study.trials
    assert complete.values == list(values.values())
    assert (failed.state, failed.user_attrs["reason"]) == (
        TrialState.FAIL, f"{keys[-1]} missing or not finite",
    )  # fmt: skip


def test_the_values_of_a_gated_trial_belong_to_the_model_that_ships(
    reversal: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation had other heads: a front of best value and last heads has no model."""
    found, evaluate = iter([50.0, 20.0, 30.0]), evaluator.evaluate

    def evaluated(*arguments: Any, **settings: Any) -> Any:
        one = evaluate(*arguments, **settings)
        return replace(one, scores=replace(one.scores, value=next(found)))

    monkeypatch.setattr(evaluator, "evaluate", evaluated)
    config = experiment(reversal, **{"model.concrete_heads": ["enc_self"]})
    outcome = a_run(config, reversal, tmp_path).execute()
    assert outcome is not None
    objectives: dict[str, Any] = {"per": "min", "dev/heads": "min"}
    one = searcher(study := study_of(("minimize", "minimize")), *report_keys(objectives))
    one.on_trial_complete("a", outcome.final_report)
    (trial,) = ended_trials(study, objectives)
    heads = count_heads(load_bundle(Path(trial.bundle)).model)["enc_self"].kept
    assert trial.values == {"per": 30.0, "dev/heads": float(heads)}
    assert trial.values["per"] == outcome.value
    # A single objective is the best so far, by which samplers and halving compare trials.
    assert report_keys({"per": "min"}) == ["best/per"]


# --- the journal, ranks and fronts ---------------------------------------------------------------


def test_a_torn_last_record_is_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"

    def load() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(storage=storage, study_name="s", load_if_exists=True)

    study = load()
    for value in (1.0, 2.0):
        study.add_trial(create_trial(value=value))
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    assert repair_journal(path) == 0
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        assert repair_journal(path) == cut - last
        assert path.read_bytes() == whole[:last]
    assert [trial.value for trial in load().trials] == [1.0]
    load().add_trial(create_trial(value=3.0))
    assert [trial.value for trial in load().trials] == [1.0, 3.0]
    assert repair_journal(tmp_path / "none.log") == 0


def row(number: int, values: Mapping[str, float], state: str = "complete") -> TrialRow:
    return TrialRow(number, state, {}, values)


@pytest.mark.parametrize(
    "objectives",
    [
        {"per": "min"},
        {"per": "min", "dev/heads": "min"},
        {"bleu": "max", "dev/heads": "min"},
        {"bleu": "max", "dev/heads": "min", "speed": "max"},
    ],
    ids=lambda objectives: "-".join(objectives).replace("/", "_"),
)
def test_the_front_is_what_brute_force_finds(objectives: dict[str, Any]) -> None:
    draw = random.Random(3)
    signs = [1 if way == "min" else -1 for way in objectives.values()]
    for _ in range(50):
        points = [[draw.randint(0, 6) for _ in signs] for _ in range(draw.randint(1, 12))]
        rows = [
            row(i, dict(zip(objectives, map(float, p), strict=True))) for i, p in enumerate(points)
        ]
        rows.append(row(99, dict.fromkeys(objectives, 0.0), state="pruned"))
        front = SweepOutcome("", "", objectives, rows, "").pareto()
        costs = [[s * v for s, v in zip(signs, p, strict=True)] for p in points]
        expected = {
            i
            for i, mine in enumerate(costs)
            if not any(
                all(o <= m for o, m in zip(other, mine, strict=True)) and other != mine
                for other in costs
            )
        }
        assert {one.number for one in front} == expected
        ordered = [[*costs[one.number][1:], costs[one.number][0]] for one in front]
        assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("metric", "way", "best_first"), [("per", "min", [1, 0]), ("bleu", "max", [0, 1])]
)
def test_complete_trials_come_first_and_best_first(
    metric: str, way: Any, best_first: list[int]
) -> None:
    objectives = {metric: way, "dev/heads": "min"}
    study = study_of(("minimize" if way == "min" else "maximize", "minimize"))
    for value in (40.0, 30.0):
        study.add_trial(create_trial(values=[value, value], user_attrs={
            "outcome": {"run/bundle": "/b"}}))  # fmt: skip
    for reason in ({"reason": "loss nan"}, {}):  # the last one ended together with its driver
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=reason))
    ranked = rank(ended_trials(study, objectives), objectives)
    assert [one.number for one in ranked] == [*best_first, 2]
    assert [one.state for one in ranked] == ["complete", "complete", "fail"]
    best = 30.0 if way == "min" else 40.0
    assert ranked[0].values == {metric: best, "dev/heads": best}
    assert ranked[2].reason == "loss nan"
    assert all(math.isnan(value) for value in ranked[2].values.values())


# --- studies -------------------------------------------------------------------------------------


def test_a_study_survives_json(tiny_study: Mapping[str, Any]) -> None:
    study = Study.from_json(tiny_study)
    assert Study.from_json(json.loads(json.dumps(study.to_json()))) == study


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {"optim.lrr": {"type": "float", "low": 1, "high": 2}}}, "did you mean lr"),
        ({"space": {"optim.lr": {"type": "float", "low": 0, "high": 1}}}, r"optim\.lr at 0"),
        ({"space": {"optim.lr": {"type": "flota", "low": 0, "high": 1}}}, "expected one of float"),
        ({"space": {"optim.lr": {"type": "float", "low": 2, "high": 1}}}, "low"),
        ({"space": {}}, "space is empty"),
        ({"objectives": ["inferred", "dev/heads"]}, "stopping: null"),
        ({"objectives": ["dev/heads"]}, "first one must be inferred"),
        ({"objectives": [["inferred", "max"]]}, "without a direction"),
        ({"objectives": []}, "first one must be inferred"),
        ({"objectives": ["inferred", "dev/heads", "dev/heads"]}, "each metric once"),
        ({"objectives": ["inferred", ["dev/heads", "down"]]}, "'min' or 'max'"),
        ({"num_trials": 0}, "num_trials"),
    ],
)
def test_a_wrong_study_is_refused_before_it_starts(
    tiny_study: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Study.from_json({**tiny_study, **change})


def test_directions_come_from_the_table_or_the_study(tiny_study: dict[str, Any]) -> None:
    def found(*objectives: Any) -> dict[str, str]:
        study = Study.from_json({**tiny_study, "stopping": None, "objectives": list(objectives)})
        return dict(directions(study))

    assert found("inferred") == {"per": "min"}
    assert found("inferred", "dev/heads") == {"per": "min", "dev/heads": "min"}
    assert found("inferred", ["dev/speed", "max"], "dev/exposure_gap") == {
        "per": "min", "dev/speed": "max", "dev/exposure_gap": "min",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"dev/speed has no known direction; write \[dev/speed"):
        found("inferred", "dev/speed")


def test_a_trial_that_is_not_tracked_is_reported_to_the_driver(
    tiny_study: dict[str, Any], reversal: ShardSet, tmp_path: Path, caplog: Any
) -> None:
    study, context = Study.from_json(tiny_study), site_of(tmp_path, reversal)
    watch = TrialWatch(study, {"per": "min"}, context)
    proposal = {"number": 3, "params": {"optim.lr": 2e-3}}
    trial = SimpleNamespace(trial_id="t", config=proposal, last_result={})
    watch.on_trial_start(0, [], trial)
    folder = watch._folder(trial)
    watch.on_trial_result(0, [], trial, {"step": 1, "dev/per": 9.0})
    assert not [line for line in caplog.messages if "not tracked" in line]
    spool = SpoolFolder(folder.tracking)
    spool.path.mkdir(parents=True)
    (spool.path / "1-a.jsonl").write_text("{}\n")
    spool.problem.write_text("tracking store http://x: does not answer\n")
    for step in (2, 3):
        watch.on_trial_result(0, [], trial, {"step": step, "dev/per": 9.0})
    warnings = [line for line in caplog.messages if "not tracked" in line]
    assert warnings == ["trial 3: not tracked at present: tracking store http://x: does not answer"]


# --- searches on Ray -----------------------------------------------------------------------------


def site_of(workspace: Path, shards: ShardSet) -> RunContext:
    store = tracking.store_for(workspace, "reversal")
    return RunContext(shards, Workspace(workspace), store, kind="trial")


def board(store: Store) -> list[RunRow]:
    return tracking.leaderboard(store, experiment="reversal", limit=100)


@pytest.fixture
def search(
    tmp_path: Path,
    reversal: ShardSet,
    tiny_study: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> Any:
    """Run a changed tiny study; return the outcome and the lines that it logged."""

    def run(workspace: Path = tmp_path, **changes: Any) -> tuple[SweepOutcome, list[str]]:
        study = Study.from_json(tiny_study).override(changes)
        caplog.clear()
        with caplog.at_level("INFO", logger="vinedresser.sweep"):
            outcome = sweep(study, site_of(workspace, reversal))
        return outcome, list(caplog.messages)

    return run


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_hopeless_trials_are_stopped_and_everything_is_on_record(
    search: Any, tmp_path: Path, reversal: ShardSet
) -> None:
    # One trial at a time, so that the order is the seed's: 1e-9, 8e-3, and 1e-8 is hopeless.
    rates = {"type": "categorical", "choices": [8e-3, 1e-9, 1e-8]}
    changes = {
        "space": {"optim.lr": rates}, "num_trials": 5, "stopping": {"factor": 2}, "concurrent": 1,
    }  # fmt: skip
    outcome, said = search(**changes)
    states = Counter(trial.state for trial in outcome.trials)
    assert states["pruned"] >= 1
    assert states["complete"] >= 1
    assert states.total() == 5
    assert [t.state for t in outcome.trials] == sorted(t.state for t in outcome.trials)
    assert outcome.best.params == {"optim.lr": 8e-3}
    assert all(math.isfinite(trial.values["per"]) for trial in outcome.trials)
    assert all(Path(trial.bundle).is_dir() for trial in outcome.complete)
    assert any("stopped early" in line for line in said)
    journal = JournalStorage(JournalFileBackend(str(Path(outcome.folder) / "journal.log")))
    kept = optuna.load_study(storage=journal, study_name="tiny-lr").trials
    assert {t.number: t.state.name.lower() for t in kept} == {
        t.number: t.state for t in outcome.trials
    }

    rows = board(tracking.store_for(tmp_path, "reversal"))
    (parent,) = [one for one in rows if one.kind == "sweep"]
    assert (parent.state, parent.parent, parent.run_id) == ("FINISHED", None, outcome.run_id)
    children = [one for one in rows if one.kind == "trial"]
    assert {one.parent for one in children} == {parent.run_id}
    assert len(children) == len({tuple(t.params.items()) for t in outcome.trials})
    finished = {Path(t.bundle).parent.name for t in outcome.complete}
    assert {one.name for one in children if one.state == "FINISHED"} == finished
    assert {one.state for one in children} <= {"FINISHED", "KILLED"}

    again, said = search(**changes)
    assert again == outcome
    assert said == [f"{Path(outcome.folder).name}: unchanged, 5 trials known"]
    folder = SweepFolder(Path(outcome.folder))
    with leased(folder.lease, "sweep"):
        assert search(**changes)[0] == outcome  # what has ended needs no lease
        ended = folder.outcome.rename(tmp_path / "aside.json")
        with pytest.raises(BusyError, match="wait"):
            search(**changes)
        ended.rename(folder.outcome)
    # Checkpoints of stopped trials go with the end of their search.
    runs = [RunFolder(tmp_path / "runs" / trial.run) for trial in outcome.trials]
    assert all(run.path.is_dir() for run in runs)
    assert not any(run.checkpoints.exists() for run in runs)

    # In a workspace that was moved nothing is trained again, whether its outcome is there or not.
    new = tmp_path / "moved"
    entries = list(tmp_path.iterdir())
    new.mkdir()
    for entry in entries:
        entry.rename(new / entry.name)
    moved, said = search(new, **changes)
    assert said == [f"{Path(outcome.folder).name}: unchanged, 5 trials known"]
    assert moved.folder == str(new / Path(outcome.folder).relative_to(tmp_path))
    there = [t.bundle and str(new / Path(t.bundle).relative_to(tmp_path)) for t in outcome.trials]
    assert [t.bundle for t in moved.trials] == there
    assert all(Path(trial.bundle).is_dir() for trial in moved.complete)
    (Path(moved.folder) / "outcome.json").unlink()
    assert search(new, **changes)[0] == moved


def test_a_study_is_named_by_the_content_that_it_starts_from(
    reversal: ShardSet, tiny_study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OpenedError(Exception):
        """The search has named its folder."""

    def folder_of(init: Path) -> str:
        study = Study.from_json(tiny_study).override({"base.init": str(init)})
        with pytest.raises(OpenedError) as caught:
            sweep(study, site_of(tmp_path, reversal))
        return str(caught.value)

    def opened(folder: Any, workspace: Any) -> None:
        raise OpenedError(folder.name)

    monkeypatch.setattr("vinedresser.sweep.search.read_outcome", opened)
    for name in ("one", "two"):
        with commit(tmp_path / name) as staging:
            (staging.path / "weights").write_text(name)
    before = folder_of(tmp_path / "one")
    assert folder_of(tmp_path / "two") != before
    (tmp_path / "one").rename(tmp_path / "moved")
    assert folder_of(tmp_path / "moved") == before


@pytest.mark.fault("T01")
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_failing_trial_says_why_and_the_search_goes_on(search: Any, tmp_path: Path) -> None:
    # At 1e30 the first update makes every weight infinite.
    rates = {"type": "categorical", "choices": [5e-3, 1e30]}
    outcome, said = search(
        **{"space": {"optim.lr": rates}, "num_trials": 5, "stopping": None, "base.steps": 20}
    )
    failed = [trial for trial in outcome.trials if trial.state == "fail"]
    assert failed
    assert outcome.complete
    assert all(trial.params["optim.lr"] == 1e30 for trial in failed)
    assert all("lower optim.lr" in trial.reason and "\n" not in trial.reason for trial in failed)
    # Equal proposals are one run: its fourth attempt is refused, with the same reason.
    told = [line for line in said if "failed: " in line]
    assert len(told) == len(failed)
    assert all("step 2: loss nan" in line for line in told)
    assert sum("failed 3 times" in line for line in told) == max(0, len(failed) - 3)
    states = Counter(one.state for one in board(tracking.store_for(tmp_path, "reversal")))
    assert states == {"FINISHED": 2, "FAILED": 1}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_where_all_trials_fail_the_search_fails_with_the_reasons(
    search: Any, tmp_path: Path
) -> None:
    rates = {"type": "categorical", "choices": [1e30, 2e30]}
    with pytest.raises(TrainingError, match=r"none of 2 trials.*lower optim\.lr") as caught:
        search(**{"space": {"optim.lr": rates}, "num_trials": 2, "base.steps": 20})
    assert caught.value.exit_code == 4
    states = {one.kind: one.state for one in board(tracking.store_for(tmp_path, "reversal"))}
    assert states == {"sweep": "FAILED", "trial": "FAILED"}
    assert not list(tmp_path.glob("sweeps/*/outcome.json"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_several_objectives_give_a_front_and_a_leaderboard(search: Any, tmp_path: Path) -> None:
    objectives = dict.fromkeys(
        ("per", "dev/heads", "dev/teacher_forced_error", "dev/parameters"), "min"
    )
    changes = {
        "base.model.concrete_heads": ["enc_self"], "base.objective.head_penalty.weight": 1.0,
        "base.steps": 20,
        "space": {"optim.lr": {"type": "categorical", "choices": [1e-3, 8e-3]}},
        "objectives": ["inferred", *list(objectives)[1:-1], ["dev/parameters", "min"]],
        "stopping": None, "num_trials": 3,
    }  # fmt: skip
    outcome, said = search(**changes)
    assert dict(outcome.objectives) == objectives
    assert [trial.state for trial in outcome.trials] == ["complete"] * 3
    values = [trial.values["per"] for trial in outcome.trials]
    assert values == sorted(values)
    for trial in outcome.trials:
        assert list(trial.values) == list(objectives)
        scores = json.loads((Path(trial.bundle) / "scores.json").read_text())["dev"]
        # The point is that of the model which ships.
        assert trial.values["per"] == scores["per"]
        assert trial.values["dev/teacher_forced_error"] == scores["teacher_forced_error"]
        assert trial.values["dev/heads"] in (0, 1, 2, 3, 4)
        assert trial.values["dev/parameters"] > 1000
    front = outcome.pareto()
    assert outcome.best.values["per"] in [trial.values["per"] for trial in front]
    assert any("dev/heads 4" in line and "dev/teacher_forced_error" in line for line in said)
    journal = JournalStorage(JournalFileBackend(str(Path(outcome.folder) / "journal.log")))
    kept = optuna.load_study(storage=journal, study_name="tiny-lr")
    assert len(kept.directions) == 4
    assert {trial.number for trial in kept.best_trials} == {trial.number for trial in front}
    (parent,) = [row for row in board(tracking.store_for(tmp_path, "reversal")) if
                 row.kind == "sweep"]  # fmt: skip
    assert (parent.metric, parent.value) == ("per", outcome.best.values["per"])
    again, said = search(**changes)
    assert again == outcome
    assert said == [f"{Path(outcome.folder).name}: unchanged, 3 trials known"]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_an_objective_that_trials_do_not_report_is_named(search: Any) -> None:
    with pytest.raises(TrainingError, match=r"dev/headz is not among .*: best/per, dev/"):
        search(
            **{"objectives": ["inferred", ["dev/headz", "min"]], "stopping": None,
               "num_trials": 1, "base.steps": 20}
        )  # fmt: skip


# --- a killed driver -----------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, tiny_study: dict[str, Any]) -> Iterator[Any]:
    """Starts `vinedresser sweep` of the tiny study in a session of its own."""
    file = tmp_path / "study.json"
    started: list[psutil.Process] = []
    environment = {**os.environ, "VINEDRESSER_WORKSPACE": str(tmp_path / "space")}
    environment.pop("RAY_ADDRESS", None)

    def start(study: Mapping[str, Any]) -> psutil.Process:
        file.write_text(json.dumps(study))
        words = [sys.executable, "-c", "import sys; from vinedresser.cli import main; ",
                 "sweep", str(file), "--json"]  # fmt: skip
        words[2] += "sys.exit(main())"
        log = (tmp_path / f"log-{len(started)}").open("wb")
        process = psutil.Popen(
            words, stdout=log, stderr=log, cwd=tmp_path, env=environment, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(psutil.Error):
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


def journal_states(workspace: Path) -> dict[int, str]:
    """Trials by number, read from a copy: the journal is another process's."""
    found = list(workspace.glob("sweeps/*/journal.log"))
    if not found:
        return {}
    copy = shutil.copy(found[0], workspace.parent / "journal.copy")
    repair_journal(Path(copy))
    storage = JournalStorage(JournalFileBackend(str(copy)))
    with contextlib.suppress(KeyError):
        trials = optuna.load_study(storage=storage, study_name="tiny-lr").trials
        return {trial.number: trial.state.name for trial in trials}
    return {}


def wait_until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


@pytest.mark.slow
@pytest.mark.ray
def test_after_kill_9_the_same_command_goes_on(
    command: Any, tmp_path: Path, tiny_study: dict[str, Any]
) -> None:
    study = {**tiny_study, "num_trials": 3, "concurrent": 2, "stopping": None}
    study["base"] = {**study["base"], "steps": 300, "checkpoint_every": 100}
    workspace = tmp_path / "space"
    driver = command(study)

    def is_under_way() -> bool:
        assert driver.poll() is None, (tmp_path / "log-0").read_text()
        states = Counter(journal_states(workspace).values())
        return states["COMPLETE"] >= 1 and states["RUNNING"] >= 1

    assert wait_until(is_under_way, 200), (tmp_path / "log-0").read_text()
    # Ray's two agents hold nothing of ours; they need a minute to notice that they are alone.
    agents = ("DashboardAgent", "RuntimeEnvAgent")
    children = [child for child in driver.children(recursive=True)
                if not any(agent in " ".join(child.cmdline()) for agent in agents)]  # fmt: skip
    assert any("ray::" in " ".join(child.cmdline()) for child in children)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert wait_until(lambda: all(is_gone(child) for child in children), 100), [
        child for child in children if not is_gone(child)
    ]
    before = {n: state for n, state in journal_states(workspace).items() if state == "COMPLETE"}
    times = {path: path.stat().st_mtime_ns for path in workspace.glob("runs/*/outcome.json")}
    assert len(times) >= len(before) >= 1

    again = command(study)
    assert again.wait(timeout=300) == 0, (tmp_path / "log-1").read_text()
    log = (tmp_path / "log-1").read_text()
    assert f"{len(before)} of 3 trials known" in log
    assert "of a killed process closed" in log
    after = journal_states(workspace)
    assert {n: after[n] for n in before} == before
    assert Counter(after.values())["COMPLETE"] == 3
    assert "RUNNING" not in after.values()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    rows = board(tracking.store_for(workspace, "reversal"))
    assert {one.state for one in rows} == {"FINISHED"}
    assert Counter(one.kind for one in rows) == {"sweep": 1, "trial": 3}


@pytest.mark.slow
@pytest.mark.ray
def test_told_to_stop_trials_write_checkpoints_and_go_on_from_them(
    command: Any, tmp_path: Path, tiny_study: dict[str, Any]
) -> None:
    """Fault T09 in a sweep: without a periodic checkpoint, only that of the stop can be there."""
    study = {**tiny_study, "num_trials": 2, "concurrent": 2, "stopping": None}
    study["base"] = {**study["base"], "steps": 3000, "checkpoint_every": 3000}
    study["base"]["evaluation"] = {"num_evaluations": 10}
    driver = command(study)

    def lines(log: str, wanted: str) -> list[str]:
        return [line for line in (tmp_path / log).read_text().splitlines() if wanted in line]

    def both_train() -> bool:
        assert driver.poll() is None, (tmp_path / "log-0").read_text()
        return len({line.split()[2] for line in lines("log-0", "/3000")}) == 2

    assert wait_until(both_train, 200), (tmp_path / "log-0").read_text()
    driver.terminate()
    assert driver.wait(timeout=200) == 75, (tmp_path / "log-0").read_text()
    runs = tmp_path / "space" / "runs"
    stored = {path.parents[1].name for path in runs.glob("*/checkpoints/step-*")}
    assert len(stored) == 2
    assert Counter(journal_states(tmp_path / "space").values())["COMPLETE"] == 0
    # The same proposals are made again, in the same folders.
    again = command(study)
    assert wait_until(lambda: len(lines("log-1", "starts with")) == 2, 200)
    again.kill()
    proposed = [{line.split(" with ")[1] for line in lines(f"log-{i}", " with ")} for i in (0, 1)]
    assert proposed[0] == proposed[1]
    assert {path.name for path in runs.iterdir()} == stored


# Two nodes with one declared GPU each, beside a head without CPUs; the first is killed once a trial
# on it has a checkpoint.
NODES = """
import json, logging, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from vinedresser import tracking
from vinedresser.cluster.connect import ENVIRONMENT
from vinedresser.config.study import Study
from vinedresser.data.shards import open_shards
from vinedresser.distributed.context import RunContext
from vinedresser.sweep import sweep
from vinedresser.workspace.layout import Workspace

plain, shards, workspace = sys.argv[1:]
logging.basicConfig(level=logging.INFO, format="%(message)s")
head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
node = {**head, "num_cpus": 1, "num_gpus": 1}
cluster = Cluster(initialize_head=True, head_node_args=head)
lost, _ = cluster.add_node(**node), cluster.add_node(**node)
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
cluster.wait_for_nodes()

def lose():
    while len(list(Path(workspace).glob("runs/*/checkpoints/step-*"))) < 2:
        time.sleep(0.01)
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**node)

threading.Thread(target=lose).start()
store = tracking.store_for(Path(workspace), "reversal")
context = RunContext(open_shards(Path(shards)), Workspace(Path(workspace)), store, kind="trial")
outcome = sweep(Study.from_json(json.loads(plain)), context)
print("states", sorted(trial.state for trial in outcome.trials))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_trials_of_a_lost_node_start_again_from_their_checkpoints(
    tmp_path: Path, reversal: ShardSet, tiny_study: dict[str, Any]
) -> None:
    study = {**tiny_study, "num_trials": 3, "stopping": None}
    study["base"] = {**study["base"], "steps": 400, "checkpoint_every": 20, "compute": {}}
    words = [json.dumps(study), str(reversal.folder), str(tmp_path / "space")]
    command = [sys.executable, "-c", NODES, *words]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "states ['complete', 'complete', 'complete']" in done.stdout
    (again,) = re.findall(r"trial \d: [a-z ]+; starts again at step (\d+)", done.stderr)
    assert int(again) >= 20
    logs = [path.read_text() for path in (tmp_path / "space").glob("runs/*/workers.log")]
    assert len(logs) == 3
    assert sum(f"at step {again}" in log for log in logs) == 1
