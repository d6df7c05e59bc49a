"""The study across architectures: every corner of it, and trials of it on Ray."""

from pathlib import Path
from typing import Any

import pytest

from search_spaces.architectures import STUDY
from tests.short_run import Reports
from vinedresser import tracking
from vinedresser.config.kinds import named_model
from vinedresser.config.study import Study
from vinedresser.data.shards import ShardSet
from vinedresser.distributed.context import RunContext
from vinedresser.distributed.train import train
from vinedresser.sweep import sweep
from vinedresser.workspace.layout import Workspace


def names() -> list[str]:
    return list(STUDY.space["model"].choices)


def test_it_has_architectures_of_every_kind_and_one_metric() -> None:
    kinds = {named_model(name).to_json()["kind"] for name in names()}
    assert len(kinds) == len(names()) >= 4
    assert STUDY.base.task.metric == "per"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tracking database for all: making one takes seconds."""
    return tmp_path_factory.mktemp("space")


@pytest.mark.parametrize("name", names())
def test_every_architecture_of_it_trains_in_place(
    name: str, tiny_study: dict[str, Any], reversal: ShardSet, workspace: Path, one_thread: None
) -> None:
    trial = {"model": name, "model.dropout": 0.2, "optim.lr": 1e-3}
    small = {
        "steps": 2,
        "optim.warmup_steps": 1,
        "evaluation": {"num_evaluations": 1, "sentences": 4},
    }
    base = STUDY.base.override({"task": reversal.task.to_json(), **small})
    store = tracking.store_for(workspace, reversal.task.name)
    reports: list[dict[str, Any]] = []
    site = RunContext(reversal, Workspace(workspace), store)
    outcome = train(base.override(trial), site, listener=Reports(lambda m: reports.append(dict(m))))
    assert Path(outcome.bundle).is_dir()
    assert 0 <= reports[-1]["best/per"] == outcome.value
    runs = tracking.leaderboard(store, experiment=reversal.task.name)
    assert {run.name: run.state for run in runs}[Path(outcome.folder).name] == "FINISHED"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_sweep_across_architectures_ranks_them_together(
    tiny_study: dict[str, Any], reversal: ShardSet, tmp_path: Path
) -> None:
    models = {"type": "categorical", "choices": ["rnn", "rnn-small", "transformer-tiny"]}
    space = {"model": models, "model.dropout": {"type": "float", "low": 0.0, "high": 0.1}}
    base = {**tiny_study["base"], "steps": 4, "evaluation": {"num_evaluations": 1, "sentences": 8},
            "optim": {"warmup_steps": 1}}  # fmt: skip
    study = Study.from_json({**tiny_study, "base": base, "space": space, "num_trials": 4})
    site = RunContext(
        reversal, Workspace(tmp_path), tracking.store_for(tmp_path, "reversal"), kind="trial"
    )
    outcome = sweep(study, site)
    assert [trial.state for trial in outcome.trials] == ["complete"] * 4
    assert len({trial.params["model"] for trial in outcome.trials}) > 1
    values = [trial.values["per"] for trial in outcome.trials]
    assert values == sorted(values)
