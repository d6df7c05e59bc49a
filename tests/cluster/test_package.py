"""The code of a job: what is packed, what never is, and the limit on its size."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from vinedresser.cluster import package
from vinedresser.errors import ConfigError

CODE = ("my_zoo/__init__.py", "my_zoo/mine.py", "experiment.json")
RUBBISH = (
    ".env", ".git/config", ".venv/bin/python", "my_zoo/__pycache__/mine.cpython-311.pyc",
    "my_zoo/mine.pyc", "workspace/runs/a/weights.safetensors", ".mypy_cache/x.json",
    "build/lib/a.py", "mine.egg-info/PKG-INFO", "env/pyvenv.cfg", "env/lib/torch.py",
    "node_modules/a.js", "mlruns/0/meta.yaml",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with code, results, caches and secrets."""
    made = tmp_path / "project"
    for name in (*CODE, *RUBBISH):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return made


def names(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in package.code_files(folder))


def test_rubbish_and_secrets_stay(folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "my_zoo")
    assert names(folder) == sorted(CODE)


def test_what_git_ignores_stays(folder: Path) -> None:
    git = ("git", "-c", "init.defaultBranch=main")
    (folder / ".git/config").unlink()
    (folder / ".git").rmdir()
    subprocess.run([*git, "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("*.big\n")
    (folder / "corpus.big").write_text("large")
    (folder / "new.py").write_text("not added yet")
    assert names(folder) == sorted([*CODE, "new.py"])
    # A folder of which git ignores everything has no code.
    (folder / "data").mkdir()
    (folder / "data/corpus.big").write_text("large")
    assert names(folder / "data") == []
    # A folder inside the checkout: its own files, by their names inside it.
    assert names(folder / "my_zoo") == ["__init__.py", "mine.py"]


def test_equal_code_gives_an_equal_package(folder: Path, tmp_path: Path) -> None:
    first = package.pack(folder, tmp_path / "first.zip")
    (folder / "my_zoo/mine.py").touch()
    (folder / "workspace/runs/a/more").write_text("a result")
    assert package.pack(folder, tmp_path / "second.zip") == first
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "first.zip") as archive:
        assert archive.read("my_zoo/mine.py") == b"my_zoo/mine.py"
    (folder / "my_zoo/mine.py").write_text("changed")
    assert package.pack(folder, tmp_path / "third.zip") != first


def test_large_code_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with (folder / "corpus.txt").open("wb") as file:
        file.truncate(51_000_000)
    with pytest.raises(ConfigError, match=r"51 MB.*corpus\.txt \(51\.0 MB\).*\.gitignore"):
        package.pack(folder, tmp_path / "code.zip")
