"""Who may try a run again, and who is told that it is no use (fault T22)."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.short_run import a_run, ending, experiment
from vinedresser.errors import DamagedError, DivergedError, MachineError, TrainingError
from vinedresser.training.outcome import run_folder
from vinedresser.training.run import Run
from vinedresser.workspace.lease import Attempt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(reversal, tmp_path_factory) -> dict[str, Any]:
    """How the run ends that nothing happens to."""
    torch.set_num_threads(1)
    run = a_run(experiment(reversal), reversal, tmp_path_factory.mktemp("whole"))
    return ending(run, run.execute())


def test_t22_the_same_failure_three_times(reversal, whole, tmp_path):
    """Counted in the run's folder: each attempt is a new process as far as it can tell."""
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
    folder = run_folder(config, reversal, tmp_path)
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    said = r"failed 3 times after step 7 with: ValueError: no\. Fix: .* the next command tries"
    with pytest.raises(TrainingError, match=said) as caught:
        failing(8, "no").execute()
    assert caught.value.exit_code == 4
    assert "--from-scratch" not in caught.value.args[0]
    # Said once, and nothing else is touched: the next three may try, and no more.
    after = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {str(path) for path in before ^ after} == {"failures.json"}
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            failing(8, "no").execute()
    with pytest.raises(TrainingError, match=said):
        failing(8, "no").execute()
    # Mended in code, which the run is not named by: it goes on from its checkpoint.
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
    (path,) = run_folder(config, reversal, tmp_path).glob("checkpoints/*/model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    for _ in range(3):
        with pytest.raises(DamagedError, match="no checkpoint is whole"):
            a_run(config, reversal, tmp_path).execute()
    path.write_bytes(content)
    again = a_run(config, reversal, tmp_path)
    assert ending(again, again.execute()) == whole


def test_t22_the_reason_is_what_the_error_says(tmp_path):
    def noted(error: Exception) -> str:
        Attempt(tmp_path).failed(2, error)
        return str(json.loads((tmp_path / "failures.json").read_text())[-1][1])

    assert noted(RuntimeError("no kernel\nfor this")) == "RuntimeError: no kernel"
    assert noted(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")).endswith("position 0: bad")
    assert noted(AssertionError()) == "AssertionError"
    assert noted(DivergedError("step 7")) == "DivergedError: step 7"
