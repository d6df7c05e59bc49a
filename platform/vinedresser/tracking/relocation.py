"""Relocation of a workspace: its own database follows a move or a copy.

MLflow stores the absolute location of every artifact. Without this, no registered model is found
in a moved workspace, and new files go to the old location.
"""

import contextlib
import sqlite3
import urllib.parse
from pathlib import Path

# Every column of MLflow's tables that holds the location of files.
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# Of the experiments that `store_for` chose a location for.
_OLD = (
    "SELECT DISTINCT artifact_location FROM experiments "
    "WHERE artifact_location LIKE ? AND artifact_location != ?"
)


def relocate(database: Path, new: str) -> None:
    """Replace the old location of artifacts in a workspace's database by the present one.

    Takes less than 1 ms. A database that cannot be read or written is left as it is; MLflow
    reports the error.

    Args:
        database: the workspace's own SQLite file; may be absent.
        new: `file://` URI of the folder of artifacts.
    """
    if not database.is_file():
        return
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(database)) as opened,
        opened,  # all or nothing
    ):
        pattern = f"file://%/{new.rpartition('/')[2]}"
        for (old,) in opened.execute(_OLD, (pattern, new)).fetchall():
            paths = [Path(urllib.parse.unquote(urllib.parse.urlsplit(u).path)) for u in (old, new)]
            if paths[0].resolve() == paths[1].resolve():  # by a link
                continue
            for table, column in _LOCATIONS:
                opened.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (ours)
                    f"WHERE substr({column} || '/', 1, ?) = ? || '/'",
                    (new, len(old) + 1, len(old) + 1, old),
                )
