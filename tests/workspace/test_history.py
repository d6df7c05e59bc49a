"""History of a run: the same failure again and again is refused once (fault T22)."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.short_run import a_run, ending, experiment, folder_of
from vinedresser.errors import DamagedError, DivergedError, MachineError, TrainingError
from vinedresser.training.run import Run
from vinedresser.workspace.history import RunHistory
from vinedresser.workspace.storage import read_json

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(reversal, tmp_path_factory) -> dict[str, Any]:
    """How the run ends that nothing happens to."""
    torch.set_num_threads(1)
    run = a_run(experiment(reversal), reversal, tmp_path_factory.mktemp("whole"))
    return ending(run, run.execute())


@pytest.mark.fault("T22")
def test_t22_the_same_failure_three_times(reversal, whole, tmp_path):
    """Counted in the run's folder: each start may be a new process."""
    config = experiment(reversal)

    def failing(step: int, reason: str) -> Run:
        run = a_run(config, reversal, tmp_path)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if run.step + 1 == step:
                raise ValueError(reason)
            return gradient

        next(iter(run.model.parameters())).register_hook(spoil)
        return run

    # Another step or another reason is no poison.
    for step, reason in ((8, "no"), (8, "no"), (9, "no"), (8, "yes"), (8, "no"), (8, "no")):
        with pytest.raises(ValueError, match=reason):
            failing(step, reason).execute()
    with pytest.raises(ValueError, match="no"):
        failing(8, "no").execute()
    folder = folder_of(config, reversal, tmp_path).path
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    said = r"failed 3 times after step 7 with: ValueError: no\. Fix: .* the next command tries"
    with pytest.raises(TrainingError, match=said) as caught:
        failing(8, "no").execute()
    assert caught.value.exit_code == 4
    assert "--from-scratch" not in caught.value.args[0]
    # Refused once, and no other file is touched: the next three may start, and no more.
    assert {path.relative_to(folder) for path in folder.rglob("*")} == before
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            failing(8, "no").execute()
    with pytest.raises(TrainingError, match=said):
        failing(8, "no").execute()
    # Repaired in code, which the run is not named by: it goes on from its checkpoint.
    again = a_run(config, reversal, tmp_path)
    assert (folder / "checkpoints" / "step-00000005").is_dir()
    assert ending(again, again.execute()) == whole


@pytest.mark.parametrize(
    "error",
    [OSError(116, "Stale file handle"), DamagedError("a shard"), MachineError("no space")],
    ids=lambda error: type(error).__name__,
)
def test_t22_what_passes_outside_of_the_run_is_no_poison(reversal, whole, tmp_path, error):
    """A mount that was away for three attempts and is back."""
    config = experiment(reversal)

    def away(values: Mapping[str, Any]) -> None:
        raise error

    for _ in range(3):
        with pytest.raises(type(error)):
            a_run(config, reversal, tmp_path, away).execute()
    again = a_run(config, reversal, tmp_path)
    assert ending(again, again.execute()) == whole


def test_t22_checkpoints_that_are_brought_back_are_used(reversal, whole, tmp_path):
    """None was whole for three commands; then a copy of one is put where it was."""
    config = experiment(reversal)

    def stop(values: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_run(config, reversal, tmp_path, stop).execute()
    (path,) = folder_of(config, reversal, tmp_path).path.glob("checkpoints/*/model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for _ in range(3):
        with pytest.raises(DamagedError, match="no checkpoint is intact"):
            a_run(config, reversal, tmp_path).execute()
    path.write_bytes(content)
    again = a_run(config, reversal, tmp_path)
    assert ending(again, again.execute()) == whole


def test_t22_the_reason_is_what_the_error_says(tmp_path):
    def noted(error: Exception) -> str:
        RunHistory(tmp_path / "history.json").add_failure(2, error)
        return str(read_json(tmp_path / "history.json")["failures"][-1][1])

    assert noted(RuntimeError("no kernel\nfor this")) == "RuntimeError: no kernel"
    assert noted(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")).endswith("position 0: bad")
    assert noted(AssertionError()) == "AssertionError"
    assert noted(DivergedError("step 7")) == "DivergedError: step 7"


def test_deaths_count_since_the_newest_checkpoint(tmp_path):
    history = RunHistory(tmp_path / "history.json")
    assert [history.add_death(step) for step in (0, 0, 5, 5, 10)] == [1, 2, 1, 2, 1]
    assert history.take_deaths() == [10]
    assert history.take_deaths() == []


def test_ranks_that_note_the_same_rollback_count_once(tmp_path):
    history = RunHistory(tmp_path / "history.json")
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda _: history.add_rollback(done=0, reason="step 3"), range(8)))
    assert history.rollbacks == 1
    history.add_rollback(done=1, reason="step 4")
    assert history.rollbacks == 2


def test_writers_at_once_lose_no_entry(tmp_path):
    history = RunHistory(tmp_path / "history.json")
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda i: history.add_failure(i, RuntimeError("x")), range(40)))
    steps = [step for step, _ in read_json(tmp_path / "history.json")["failures"]]
    assert sorted(steps) == list(range(40))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"failures": 3}', b"\xff"])
def test_a_damaged_history_is_empty(tmp_path, content):
    path = tmp_path / "history.json"
    path.write_bytes(content)
    history = RunHistory(path)
    history.require_progress()
    assert history.rollbacks == 0
    assert history.add_death(3) == 1
