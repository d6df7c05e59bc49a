"""`gc`: removal of what a workspace no longer needs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vinedresser.cli.arguments import HERE, AsJson, Overrides, WorkspaceFolder
from vinedresser.cli.render import print_json, print_lines, print_table


def verb(
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be removed, and remove nothing")
    ] = False,
) -> None:
    """Remove trials, shard sets and left-overs that nothing needs; print what is kept and why.

    Its options are `top=3`, `shard_sets=3` and `days=30`.
    """
    from vinedresser.config import parse_overrides
    from vinedresser.gc import Retention, collect
    from vinedresser.registry.versions import is_made, registered_bundles
    from vinedresser.tracking import experiments, reap, store_for
    from vinedresser.workspace.layout import Workspace

    keep, place = (
        Retention().override(parse_overrides(overrides or [])),
        Workspace(workspace.absolute()),
    )
    store = store_for(workspace, "Default")
    registered = registered_bundles(store)
    tasks = [] if dry_run or not is_made(store) else experiments(store)
    closed = [run for task in tasks for run in reap(replace(store, experiment=task))]
    entries = collect(place, keep, registered, is_dry=dry_run)
    freed = sum(entry.bytes for entry in entries if not entry.is_kept)
    if as_json:
        plain = [{**vars(entry), "path": str(entry.path)} for entry in entries]
        return print_json({"entries": plain, "freed_bytes": freed, "closed_runs": closed})
    word = "would go" if dry_run else "removed"
    print_table(
        ["", ">MB", "folder", "reason"],
        [
            (
                "kept" if entry.is_kept else word,
                f"{entry.bytes / 1e6:.2f}",
                str(_shown(entry.path, place.path)),
                entry.reason,
            )
            for entry in entries
        ],
        soft_wrap=True,
    )
    if closed:
        print_lines(f"{len(closed)} tracking runs of processes that have ended were closed")
    verb = "would be freed" if dry_run else "freed"
    return print_lines(f"{freed:,} bytes {verb}")


def _shown(path: Path, workspace: Path) -> Path:
    return path.relative_to(workspace) if path.is_relative_to(workspace) else path
