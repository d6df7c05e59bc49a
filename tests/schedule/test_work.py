"""The command of a slot: the pipeline with its values, from the champion after the first run."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from vinedresser.config import parse_overrides
from vinedresser.errors import ConfigError
from vinedresser.schedule.definition import Schedule
from vinedresser.schedule.record import Ledger, Record, State
from vinedresser.schedule.work import PipelineWork, run_words
from vinedresser.workspace.layout import Workspace

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def schedule(**values: Any) -> Schedule:
    plain = {"name": "s", "pipeline": "pipelines.demo", "every": "@daily", **values}
    return Schedule.from_json(plain)


def changes_of(words: list[str]) -> dict[str, Any]:
    return parse_overrides(words[words.index("--") + 2 :])


def test_the_champion_is_trained_on_after_the_first_good_run(tmp_path: Path) -> None:
    value = schedule(warm_start="models:/g2p@champion", overrides={"seed": 3, "task": "t.yaml"})
    record = Record(schedule="s", slot=NOW, first=NOW, decided=NOW)
    first = {"seed": 3, "task": "t.yaml"}
    assert changes_of(run_words(value, tmp_path, record)) == first
    ledger = Ledger(Workspace(tmp_path).schedule("s"))
    ledger.change(lambda _: State(since=NOW, through=NOW, seconds=60.0))
    steps = ["prepare", "finetune", "prune", "register"]
    later = {**first, "steps": steps, "model_name": "g2p"}
    assert changes_of(run_words(value, tmp_path, record)) == later
    with pytest.raises(ConfigError, match="warm_start"):
        schedule(warm_start="models:/g2p/3")


def test_old_records_are_forgotten_with_all_their_files(tmp_path: Path) -> None:
    value = schedule(keep={"runs": "1d"})
    folder = Workspace(tmp_path).schedule("s")
    ledger = Ledger(folder)
    old, new = (
        Record(schedule="s", slot=slot, first=slot, decided=slot, ended=slot, state="kept")
        for slot in (NOW.replace(year=2020), datetime.now(UTC))
    )
    for record in (old, new):
        ledger.store(record)
        for path in (folder.log(record.name), folder.result(record.name)):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    PipelineWork(value, tmp_path).after_tick([])
    assert ledger.names() == [new.name]
    assert {path.name.split(".")[0] for path in folder.logs.iterdir()} == {new.name}
