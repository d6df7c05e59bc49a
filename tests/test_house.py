"""The promises that the folders themselves make."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("platform/vinedresser", "trainables", "search_spaces", "pipelines")
# Reading any of these runs code that the file brings along.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def python(code: str, *, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(root: Path) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def test_platform_is_a_folder_and_no_package(root):
    assert not (root / "platform" / "__init__.py").exists()
    python("import platform, uuid, vinedresser; platform.python_version()", cwd=root)


def test_no_package_files_under_tests(root):
    assert not list((root / "tests").rglob("__init__.py"))


def test_configuration_imports_nothing_heavy(root):
    loaded = json.loads(
        python(
            "import json, sys, vinedresser.config; print(json.dumps(list(sys.modules)))", cwd=root
        )
    )
    heavy = {"torch", "ray", "mlflow", "optuna", "numpy", "pandas", "pyarrow", "matplotlib"}
    assert not heavy & set(loaded)


IMPORT_ALL = """
import importlib, json, logging, pkgutil, sys
names = []
for package in ("vinedresser", "trainables", "search_spaces", "pipelines"):
    names.append(package)
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
    names += [module.name for module in found]
for name in names:
    importlib.import_module(name)
own = [n for n in logging.root.manager.loggerDict if n.split(".")[0] in
       ("vinedresser", "trainables", "search_spaces", "pipelines")]
handlers = [n for n in own if logging.getLogger(n).handlers]
print(json.dumps([names, [str(h) for h in logging.root.handlers] + handlers]))
"""


@pytest.mark.slow
def test_importing_everything_does_nothing_visible(root, tmp_path):
    *noise, last = python(IMPORT_ALL, cwd=tmp_path).splitlines()
    names, handlers = json.loads(last)
    files = [
        path.relative_to(root / "platform" if root / "platform" in path.parents else root)
        for path in sources(root)
    ]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert sorted(names) == sorted(modules)
    assert noise == []
    assert handlers == []
    assert list(tmp_path.iterdir()) == []


def test_only_a_line_feed_ends_a_line(root):
    package = root / "platform" / "vinedresser"
    paths = [*(package / "data").rglob("*.py"), package / "workspace" / "commit.py"]
    found = [str(path) for path in paths if ".splitlines(" in path.read_text()]
    assert found == []


def unsafe_reads(tree: ast.AST) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "torch" and "load" in {alias.name for alias in node.names}:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in {"torch.load", "torch.export.load", "torch.jit.load"}:
                lines.append(node.lineno)
            if any(
                k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords
            ):
                lines.append(node.lineno)
        if {name.split(".")[0] for name in names} & UNSAFE_MODULES:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_the_search_for_unsafe_reads_finds_them(code):
    assert unsafe_reads(ast.parse(code))


def test_nothing_is_read_that_runs_code(root):
    found = [
        f"{path.relative_to(root)}:{line}"
        for path in sources(root)
        for line in unsafe_reads(ast.parse(path.read_text()))
    ]
    assert found == []
