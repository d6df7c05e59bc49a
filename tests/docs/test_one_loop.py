"""docs/one_loop.py: the flat loop learns, and stays short enough to be read first."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_flat_loop_learns_and_fits_into_150_lines(root):
    path = root / "docs/one_loop.py"
    assert len(path.read_text().splitlines()) <= 150
    done = subprocess.run(
        [sys.executable, path], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    first, last = (float(line.split("wer")[1].split("%")[0]) for line in (lines[0], lines[-1]))
    # Word error rates of 2 to 4 % were seen after 500 updates, 40 to 60 % after 100.
    assert last < 8 < first
