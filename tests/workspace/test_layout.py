"""The names of a workspace: told apart by content, found again by name."""

import pickle
from pathlib import Path

from vinedresser.workspace.layout import RunFolder, Workspace, checkpoint_step, runs_of


def test_a_run_is_found_by_its_name_and_key(tmp_path: Path):
    workspace = Workspace(tmp_path)
    run = workspace.run("my-copy", "0123456789abcdef")
    assert run.path == tmp_path / "runs" / "my-copy-0123456789ab"
    assert (run.name, run.key) == ("my-copy-0123456789ab", "0123456789ab")
    for name in ("my-copy", "my", "copy"):
        workspace.run(name, "f" * 64).path.mkdir(parents=True)
    assert [found.name for found in runs_of(workspace, "my")] == ["my-ffffffffffff"]


def test_a_folder_travels_to_another_process(tmp_path: Path):
    run = RunFolder(tmp_path)
    assert pickle.loads(pickle.dumps(run)).outcome == tmp_path / "outcome.json"


def test_a_checkpoint_is_named_by_its_step(tmp_path: Path):
    path = RunFolder(tmp_path).checkpoint(1234)
    assert path == tmp_path / "checkpoints" / "step-00001234"
    assert checkpoint_step(path) == 1234
