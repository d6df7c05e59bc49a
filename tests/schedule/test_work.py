"""The command of a slot, and the table in its output."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vinedresser.schedule.definition import Place, Schedule
from vinedresser.schedule.record import Record
from vinedresser.schedule.triggers import PROGRAM
from vinedresser.schedule.work import _table, run_words

SLOT = datetime(2026, 3, 1, 3, tzinfo=UTC)
RECORD = Record(schedule="nightly", slot=SLOT, first=SLOT, decided=SLOT)
RETRAIN = ["retrain", "--json", "-w", "/space", "--", "pipelines.demo"]


def words(place: Place) -> list[str]:
    schedule = Schedule(name="nightly", pipeline="pipelines.demo", every="0 3 * * *", run=place)
    found = run_words(schedule, Path("/space"), RECORD)
    assert found[: len(PROGRAM)] == list(PROGRAM)
    return found[len(PROGRAM) :]


def test_a_slot_runs_here_or_as_a_job_of_its_slot() -> None:
    assert words(Place()) == RETRAIN
    slot = ["--slot", "nightly 2026-03-01T03:00:00Z", "--"]
    assert words(Place(where="ray_job")) == ["submit", *slot, *RETRAIN]
    head = Place(where="ray_job", address="http://head:8265")
    assert words(head) == ["submit", "--address", "http://head:8265", *slot, *RETRAIN]


@pytest.mark.parametrize("before", ["", "prepare: a line {\n", "{\n"])
@pytest.mark.parametrize("indent", [None, 1])
def test_the_table_is_found_behind_the_messages_of_a_job(
    tmp_path: Path, before: str, indent: int | None
) -> None:
    table = {"verdict": "kept", "scores": {"challenger": 1.5}, "heads": [{"kept": 2}]}
    (tmp_path / "out").write_text(f"{before}{json.dumps(table, indent=indent)}\n")
    assert _table(tmp_path / "out") == table
    (tmp_path / "out").write_text("error: {\n 1\n}")
    assert _table(tmp_path / "out") == {}
