"""Run of a pipeline: its steps in order, one tracking run, and the closing table."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vinedresser.cluster.admission import require_shared_store
from vinedresser.cluster.connect import connect, is_named
from vinedresser.errors import ConfigError
from vinedresser.pipeline.definition import Pipeline
from vinedresser.pipeline.steps import STEPS, Chain, Step, Watch, unwatched
from vinedresser.tracking import (
    Tracker,
    ending,
    open_run,
    prepare_store,
)
from vinedresser.tracking.runs import LEASE
from vinedresser.workspace.commit import digest_of
from vinedresser.workspace.layout import SpoolFolder, Workspace
from vinedresser.workspace.lease import leased
from vinedresser.workspace.storage import write_file

_log = logging.getLogger(__name__)


def explain(pipeline: Pipeline, workspace: Path) -> list[tuple[str, str]]:
    """Return each step with the reason for which it would run, "" where its result is known.

    Nothing is run. Steps after the first one that would run depend on its result.
    """
    chain = Chain(pipeline.seeded(), Workspace(workspace.absolute()))
    found: list[tuple[str, str]] = []
    pending = ""
    for name in pipeline.steps:
        step = STEPS[name]
        reason = f"{pending} runs before it" if pending else step.reason(chain)
        if reason:
            pending = pending or name
        elif name != pipeline.steps[-1]:
            step.action(chain)  # recognises the result
        found.append((name, reason))
    return found


def retrain(
    pipeline: Pipeline,
    workspace: Path,
    *,
    watch: Watch = unwatched,
    first: str | None = None,
    last: str | None = None,
) -> dict[str, Any]:
    """Run the steps of a pipeline; finished ones are recognised.

    Args:
        pipeline: its definition.
        workspace: folder of shards, runs, sweeps and the tracking database.
        watch: opens a display of a training.
        first: step to begin with; the results of those before it must be known.
        last: step to end with.

    Returns:
        The closing table as plain JSON, with `verdict`, `reason` and `scores`; `verdict` is None
        where the pipeline was ended before its last step.

    Raises:
        ConfigError: the pipeline has no such step, or one before the first has to run.
        BusyError: another process runs the same pipeline on the same data.
        VinedresserError: with the reason and the fix; everything finished so far is kept.
    """
    started = time.perf_counter()
    chain = Chain(pipeline.seeded(), Workspace(workspace.absolute()), watch)
    pipeline, place = chain.pipeline, chain.workspace
    begin, end = pipeline.index(first, 0), pipeline.index(last, len(pipeline.steps) - 1)
    steps = [STEPS[name] for name in pipeline.steps[: end + 1]]

    def advance(step: Step) -> None:
        if steps.index(step) < begin and (reason := step.reason(chain)):
            raise ConfigError(f"--from {first}: {step.name} has to run before it: {reason}")
        step.action(chain)

    with ExitStack() as stack:
        if any(step.uses_ray for step in steps[1:]):
            workers = pipeline.study.base.compute.workers
            stack.enter_context(connect(dashboard=workers > 1, search=True))
            require_shared_store(chain.store)
        # The corpus comes first: a bad one leaves no database behind.
        advance(steps[0])
        if len(steps) > 1:
            prepare_store(chain.store)
            key = digest_of({**pipeline.to_json(), "task": chain.shards.digest})[:12]
            lease = place.leases / f"pipeline-{key}.json"
            stack.enter_context(leased(lease, f"pipeline {pipeline.name}"))
            chain.is_remote = is_named()
            chain.tracker, chain.parent = _tracker(chain, key, lease), key
            stack.enter_context(ending(chain.tracker))
        for step in steps[1:]:
            advance(step)
        chain.table["seconds"] = round(time.perf_counter() - started, 1)
        if len(steps) < len(pipeline.steps):
            return {"verdict": None, "reason": f"ended after {steps[-1].name}", **chain.table}
        _record(chain, place)
    return chain.table


def _tracker(chain: Chain, key: str, lease: Path) -> Tracker:
    """Open the tracking run of a pipeline on its data."""
    pipeline, task = chain.pipeline, chain.task
    tracker = open_run(
        chain.store,
        SpoolFolder(chain.workspace.tracking / key),
        key=key,
        params={"pipeline": pipeline.name, "study": pipeline.study.name},
        tags={
            "mlflow.runName": f"{pipeline.name}-{key}",
            "vinedresser.kind": "pipeline",
            "vinedresser.metric": task.metric,
            "vinedresser.task": task.name,
            "vinedresser.folder": str(chain.workspace.path),
            LEASE: str(lease),
        },
    )
    tracker.wait_for_opening()
    return tracker


def _record(chain: Chain, place: Workspace) -> None:
    """Record the closing table in the tracking run and in the workspace."""
    tracker, table, metric = chain.tracker, chain.table, chain.task.metric
    numbers = {k: float(v) for k, v in table.items() if isinstance(v, int | float)}
    tracker.log({f"final/{key}": value for key, value in numbers.items()}, 1)
    if f"pruned_{metric}" in table:
        tracker.log({f"best/{metric}": numbers[f"pruned_{metric}"]}, 1)
        tracker.tag({"mlflow.note.content": _markdown(table)})
    tracker.tag({"vinedresser.verdict": f"{table['verdict']}: {table['reason']}"})
    content = json.dumps(table, indent=1) + "\n"
    tracker.text(content, "closing_table.json")
    write_file(place.pipeline_table(chain.pipeline.name), content)


def _markdown(table: Mapping[str, Any]) -> str:
    """Return the closing table as the description of the pipeline's tracking run."""
    metric = table["metric"]
    rows = [
        ("", "finalist", "pruned"),
        ("---", "---", "---"),
        (f"inferred {metric}", table[f"finalist_{metric}"], table[f"pruned_{metric}"]),
        ("heads", table["heads_total"], table["heads_kept"]),
        ("parameters", *table["parameters"]),
        ("greedy sentences/s", *table["sentences_per_second"]),
    ]
    return "\n".join(
        [
            f"Version {table['version']} of {table['model']}; champion is version "
            f"{table['champion_version']}. Parity: {table['parity_max_abs']:.1e}.",
            "",
            *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        ]
    )
