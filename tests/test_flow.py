"""The way from a command to the work: few frames in few files, and every file opened once."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.short_run import TRANSFORMER
from vinedresser.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
MOST_FRAMES, MOST_FILES = 7, 5


@pytest.fixture
def command(reversal: Any, tmp_path: Path, monkeypatch: Any, with_database: Any) -> list[str]:
    """Words of a training of the tiny task, in a workspace of its own."""
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG"):
        monkeypatch.delenv(key, raising=False)
    workspace = with_database(tmp_path / "workspace")
    (tmp_path / "run.json").write_text(
        json.dumps(
            {"name": "flow", "task": reversal.task.to_json(), "model": TRANSFORMER, "steps": 8,
             "checkpoint_every": 8, "batch": {"max_padded_tokens": 160},
             "optim": {"warmup_steps": 2}, "evaluation": {"num_evaluations": 1},
             "compute": {"device": "cpu"}}
        )
    )  # fmt: skip
    return ["train", str(tmp_path / "run.json"), "-w", str(workspace)]


def test_frames_and_files_from_the_command_to_backward(
    command: list[str], root: Path, monkeypatch: Any, capsys: Any
) -> None:
    found: list[tuple[str, str]] = []
    backward = torch.Tensor.backward

    def traced(*arguments: Any, **named: Any) -> None:
        if not found:
            package = root / "platform/vinedresser"
            found.extend(
                (str(Path(frame.filename).relative_to(package)), frame.name)
                for frame in traceback.extract_stack()
                if Path(frame.filename).is_relative_to(package)
            )
        backward(*arguments, **named)

    monkeypatch.setattr(torch.Tensor, "backward", traced)
    assert main(command) == 0
    with capsys.disabled():
        sys.stdout.write("\n" + "".join(f"{name:24} {file}\n" for file, name in found))
    assert len(found) <= MOST_FRAMES
    assert len({file for file, _ in found}) <= MOST_FILES


def test_a_training_hashes_its_shards_once(command: list[str], hashed_files: Any) -> None:
    assert main(command) == 0
    shards = {path: n for path, n in hashed_files.items() if path.parent.parent.name == "shards"}
    assert shards
    assert set(shards.values()) == {1}
    hashed_files.clear()
    # The same command again: what has ended is recognised, the shards are verified once.
    assert main(command) == 0
    assert {n for path, n in hashed_files.items() if path.parent.parent.name == "shards"} == {1}
