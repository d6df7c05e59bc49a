"""Permissions of what is written: those of the workspace's folder."""

import os
import stat
from pathlib import Path

import pytest

from vinedresser.workspace.commit import commit
from vinedresser.workspace.lease import Lease
from vinedresser.workspace.storage import follow_mode


@pytest.mark.parametrize(("mode", "expected"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600)])
def test_files_get_the_permissions_of_the_workspace(
    tmp_path: Path, mode: int, expected: int
) -> None:
    workspace, before = tmp_path / "shared", os.umask(0o077)
    try:
        workspace.mkdir()
        workspace.chmod(mode)
        follow_mode(workspace)
        with commit(workspace / "runs" / "a") as staging:
            (staging.path / "x").write_text("x")
        Lease(workspace / "runs" / ".lease.json").take()
        for path in (p for p in workspace.rglob("*") if p.is_file()):
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
        assert stat.S_IMODE((workspace / "runs").stat().st_mode) & 0o777 == mode & 0o777
    finally:
        os.umask(before)
