"""How results look in a terminal: tables on stdout, plain when it is no terminal."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vinedresser.bundle import Bundle
from vinedresser.tracking import RunRow

if TYPE_CHECKING:
    from vinedresser.sweep import SweepOutcome


def print_json(value: Any) -> None:
    """One JSON value on stdout; JSON knows no NaN, so what has no value is null."""
    print(json.dumps(_known(value), indent=1, default=str, ensure_ascii=False, allow_nan=False))


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def closing_table(table: Mapping[str, Any], pipeline: str, workspace: Path) -> None:
    """What a pipeline reached, and three commands to type next."""
    metric, split = table["metric"], table["split"]
    before, after = table["parameters"]
    slow, fast = table["sentences_per_second"]
    shown = _table(f"{table['model']}, {split} split", "", "finalist", "pruned")
    shown.add_row(
        f"inferred {metric}",
        f"{table[f'finalist_{metric}']:.2f}",
        f"{table[f'pruned_{metric}']:.2f}",
    )
    shown.add_row(
        "sentences not exactly right, %",
        f"{table['finalist_exact_error']:.1f}",
        f"{table['pruned_exact_error']:.1f}",
    )
    shown.add_row("teacher-forced dev loss, nats", f"{table['teacher_forced_nats']:.3f}", "")
    for kind, heads in table["heads"].items():
        shown.add_row(f"heads, {kind}", str(heads["total"]), str(heads["kept"]))
    shown.add_row("heads, all", str(table["heads_total"]), str(table["heads_kept"]))
    shown.add_row("parameters", f"{before:,}", f"{after:,}")
    shown.add_row("greedy sentences/s", f"{slow:,.0f}", f"{fast:,.0f}")
    console = Console()
    console.print()
    console.print(shown)
    console.print(
        f"\nparity of the pruned model: logits differ by {table['parity_max_abs']:.1e} at most, "
        f"greedy outputs identical: {'yes' if table['parity_same_output'] else 'no'}"
    )
    champion = table["champion_version"]
    console.print(
        f"registered: {table['model']} version {table['version']}, champion is version {champion}"
    )
    console.print(f"{table['seconds']:.0f} s\n")
    console.print("Next:", style="bold")
    # Without an activated environment the program is found by its path only.
    program = "vinedresser" if shutil.which("vinedresser") else sys.argv[0]
    at = "" if workspace == Path("workspace") else f" -w {workspace}"
    for command in (
        f"{program} ui{at}",
        f"echo vinedresser | {program} translate models:/{table['model']}@champion{at}",
        f"{program} sweep {pipeline} num_trials=40 base.steps=4000{at}",
    ):
        console.print(f"  {command}", soft_wrap=True, highlight=False)


def trials_table(outcome: "SweepOutcome") -> None:
    """A sweep's trials, best first."""
    from vinedresser.sweep import short_params

    shown = _table(Path(outcome.folder).name, "trial", "state", outcome.metric, "parameters")
    for trial in outcome.trials:
        value = "" if math.isnan(trial.value) else f"{trial.value:.2f}"
        shown.add_row(str(trial.number), trial.state, value, short_params(trial.params))
    Console().print(shown)


def scores_table(bundle: Bundle) -> None:
    """A pruned bundle beside the model that it came from."""
    scores, metric = bundle.scores, bundle.scores["metric"]
    split = "test" if "test" in scores else "dev"
    shown = _table(bundle.folder.name, "", "whole", "pruned")
    shown.add_row(
        f"{split} {metric}", f"{scores['finalist'][metric]:.2f}", f"{scores[split][metric]:.2f}"
    )
    for kind, heads in scores["heads"].items():
        shown.add_row(f"heads, {kind}", str(heads["total"]), str(heads["kept"]))
    before, after = scores["parameters"]
    shown.add_row("parameters", f"{before:,}", f"{after:,}")
    slow, fast = scores["sentences_per_second"]
    shown.add_row("greedy sentences/s", f"{slow:,.0f}", f"{fast:,.0f}")
    shown.add_row("parity, max |logit|", "", f"{scores['parity_max_abs']:.1e}")
    Console().print(shown)


def runs_table(boards: Mapping[str, list[RunRow]]) -> None:
    """One leaderboard a task."""
    console = Console()
    for task, rows in boards.items():
        shown = _table(task, "run", "kind", "state", "best", "time", "id")
        for row in rows:
            value = "" if row.value is None else f"{row.metric} {row.value:.2f}"
            shown.add_row(
                row.name,
                row.kind,
                row.state.lower(),
                value,
                str(timedelta(seconds=round(row.seconds))),
                row.run_id[:8],
            )
        console.print(shown)
        console.print()
