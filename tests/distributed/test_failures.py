"""What is tried again after a worker group failed, and what is told (faults T10, T22)."""

import json
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from vinedresser.distributed.failures import (
    MAX_DEATHS,
    ProgressPolicy,
    add_death,
    final_error,
    refuse_repeated_deaths,
)
from vinedresser.errors import DataError, MachineError, PreemptedError, TrainingError
from vinedresser.training.run import RolledBackError
from vinedresser.workspace.layout import RunFolder

AGAIN, END = FailureDecision.RETRY, FailureDecision.RAISE
DEAD = WorkerGroupError("died", {1: RuntimeError("killed")})


def checkpoint(folder: Path, step: int) -> None:
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.fault("T22")
def test_t22_deaths_without_a_new_checkpoint_are_counted_and_outlive_the_driver(tmp_path) -> None:
    checkpoint(tmp_path, 4)
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN  # another driver
    checkpoint(tmp_path, 8)
    for _ in range(2):
        assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is END
    error = final_error(DEAD, RunFolder(tmp_path))
    assert isinstance(error, TrainingError)
    assert "workers died 3 times without a checkpoint after step 8" in error.args[0]
    assert "Last: killed" in error.args[0]
    # Who was told may try again.
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN


def test_what_the_user_must_change_is_not_tried_again(tmp_path: Path) -> None:
    wrong = DataError("a row is wrong")
    both = WorkerGroupError("x", {0: RuntimeError("connection closed by peer"), 1: wrong})
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(both) is END
    assert final_error(both, RunFolder(tmp_path)) is wrong
    back = WorkerGroupError("x", {0: RolledBackError("diverged; rollback 1 of 2")})
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(back) is AGAIN


def test_an_announced_loss_is_not_counted(tmp_path: Path) -> None:
    moved = WorkerGroupError("x", {0: PreemptedError("a node is about to be lost")})
    lost = RayActorError(preempted=True)
    too_late = WorkerGroupError("x", {0: lost, 1: RuntimeError("connection closed by peer")})
    for error in [moved, too_late] * 5:
        assert ProgressPolicy(RunFolder(tmp_path)).make_decision(error) is AGAIN
    assert not (tmp_path / "history.json").exists()


def test_an_error_of_the_controller_keeps_its_reason(tmp_path: Path) -> None:
    error = final_error(ControllerError(KeyError("resources")), RunFolder(tmp_path))
    assert error.args[0] == f"{tmp_path.name}: KeyError: 'resources'"


def test_a_process_that_dies_again_and_again_is_not_started_a_fourth_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert [add_death(folder) for _ in range(2)] == [1, 2]
    checkpoint(folder.path, 4)
    assert [add_death(folder) for _ in range(2)] == [1, 2]
    refuse_repeated_deaths(folder)
    assert add_death(folder) == MAX_DEATHS
    with pytest.raises(TrainingError, match="died 3 times without a checkpoint after step 4"):
        refuse_repeated_deaths(folder)
    refuse_repeated_deaths(folder)  # who was told may try again


def test_a_group_that_does_not_start_ends_in_the_end(tmp_path: Path) -> None:
    policy = ProgressPolicy(RunFolder(tmp_path))
    slow = ControllerError(WorkerGroupStartupFailedError("one died"))
    assert [policy.make_decision(slow) for _ in range(3)] == [AGAIN, AGAIN, END]
    full = ControllerError(InsufficientClusterResourcesError("2 CPU wanted"))
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(full) is END
    error = final_error(full, RunFolder(tmp_path))
    assert isinstance(error, MachineError)
    assert "no room for its workers any more" in error.args[0]


@pytest.mark.parametrize(
    ("waited", "who"), [((True, False), "rank 1"), ((True, True), "ranks 0 and 1")]
)
def test_t10_two_hangs_at_one_step_end_the_run(tmp_path: Path, waited, who: str) -> None:
    folder = tmp_path / "hangs"
    folder.mkdir()

    def hang(step: int) -> None:
        for rank in (0, 1):
            head = {"rank": rank, "step": step, "waited": waited[rank]}
            with (folder / f"step-{step:08d}-rank-{rank}.txt").open("a") as stream:
                stream.write(f"== {json.dumps(head)}\nTimeout\nThread 0x1\n")

    hang(3)
    hang(5)
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN
    hang(5)
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is END
    error = final_error(DEAD, RunFolder(tmp_path))
    assert f"{who} hung at step 5, 2 times; the stacks of all ranks are in" in error.args[0]
    (kept,) = tmp_path.glob("hangs-*")
    assert str(kept) in error.args[0]
    assert ProgressPolicy(RunFolder(tmp_path)).make_decision(DEAD) is AGAIN
