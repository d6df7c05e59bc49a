"""A workspace that was moved or copied: its own database finds its files again.

MLflow keeps the absolute location of every artifact. In a moved workspace no registered model was
found, and new files went to where the workspace had been.
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
# Of the experiments that `store_for` named a place for.
_OLD = (
    "SELECT DISTINCT artifact_location FROM experiments "
    "WHERE artifact_location LIKE 'file://%/mlartifacts' AND artifact_location != ?"
)


def follow(database: Path, new: str) -> None:
    """Names the workspace's folder of artifacts where its database has that of another place.

    Costs less than 1 ms. A database that cannot be read or written is left alone; MLflow will tell.

    Args:
        database: the workspace's own, an SQLite file; need not be there yet.
        new: `file://` URI of the folder of artifacts beside it.
    """
    if not database.is_file():
        return
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(database)) as opened,
        opened,  # all or nothing
    ):
        for (old,) in opened.execute(_OLD, (new,)).fetchall():
            if _is_one_folder(old, new):  # by a link
                continue
            for table, column in _LOCATIONS:
                opened.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (ours)
                    f"WHERE substr({column} || '/', 1, ?) = ? || '/'",
                    (new, len(old) + 1, len(old) + 1, old),
                )


def _is_one_folder(one: str, other: str) -> bool:
    first, second = (
        Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path)) for uri in (one, other)
    )
    with contextlib.suppress(OSError):  # gone, or another user's
        return first.samefile(second)
    return False
