"""The names of a workspace: told apart by content, found again by name."""

import ast
import pickle
from pathlib import Path

import vinedresser
from vinedresser.workspace import layout
from vinedresser.workspace.layout import RunFolder, Workspace, checkpoint_step, runs_of

# Names that are no words of other things.
PLAIN = {"bundle", "models", "runs", "schedules", "stop", "shards", "group", "tune"}


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


def test_names_are_spelled_in_the_layout_alone():
    """Found as whole strings; those that are common words too, only as a part of a path."""
    kinds = (layout.BundleFolder, layout.RunFolder, layout.SweepFolder, layout.Workspace)
    entries = [value for kind in kinds for value in vars(kind).values()]
    names = {entry._name for entry in entries if isinstance(entry, layout._Entry)}
    assert len(names) > 20
    package, spelled = Path(vinedresser.__file__).parent, set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {id(n.right) for n in ast.walk(tree) if isinstance(n, ast.BinOp)}
        for node in ast.walk(tree):
            is_name = isinstance(node, ast.Constant) and node.value in names
            if is_name and (node.value not in PLAIN or id(node) in inside):
                spelled.add(path.relative_to(package).as_posix())
    assert spelled == {"workspace/layout.py"}
