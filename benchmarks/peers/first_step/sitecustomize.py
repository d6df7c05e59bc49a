"""On PYTHONPATH, it notes when the first optimizer update of a process is done, and nothing else.

Every process that inherits PYTHONPATH and FIRST_STEP_FILE has it, Ray's workers too, so that a
command can be timed as it stands. Costs a comparison per imported module.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

FILE = os.environ.get("FIRST_STEP_FILE", "")
LOOP = "vinedresser.training.step"


class _Timed(importlib.abc.MetaPathFinder):
    """Wraps `training_steps` when its module is imported, before anybody can take it from there."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != LOOP:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            original = module.training_steps

            def training_steps(*args, **kwargs):
                for step in original(*args, **kwargs):
                    if step.index == 1:
                        note()
                    yield step

            module.training_steps = training_steps

        spec.loader.exec_module = exec_module
        return spec


def note() -> None:
    """Writes the machine's monotonic clock, in seconds, into FILE, once."""
    with contextlib.suppress(FileExistsError):
        partial = Path(f"{FILE}.{os.getpid()}")
        partial.write_text(repr(time.monotonic()))
        partial.rename(FILE)


if FILE:
    sys.meta_path.insert(0, _Timed())
