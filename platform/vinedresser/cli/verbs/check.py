"""`check`: checks of an experiment before its training."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column
from rich.text import Text

from vinedresser.cli.arguments import HERE, AsJson, Overrides, WorkspaceFolder, resolve_value
from vinedresser.cli.render import print_json, print_lines, print_table

if TYPE_CHECKING:
    from vinedresser.config import Experiment
    from vinedresser.health.preflight.check import CheckResult


# Word and colour of a verdict; None is an undecided one.
_WORDS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("open", "yellow")}


def verb(
    experiment: Annotated[str, typer.Argument(help="import path or file; a study gives its base")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    price: Annotated[float, typer.Option(help="price per worker-hour, for the cost")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Check an experiment before its training: data, model, memory, time and cost.

    Trains for about a minute and keeps no results. Exit code 4 if a check fails.
    """
    from vinedresser.config import Experiment, resolve
    from vinedresser.config.study import Study

    kinds: list[Any] = [Experiment, Study]
    value = resolve_value(experiment, kinds, overrides, "base")
    trials = getattr(resolve(experiment, kinds), "num_trials", 1)

    from vinedresser.data import shards
    from vinedresser.health.preflight.checks import checks
    from vinedresser.workspace import layout

    since = time.perf_counter()
    prepared = shards.prepare(value.task, layout.Workspace(workspace).shards)
    found: list[CheckResult] = []
    is_whole = False
    try:
        # A spinner, on a terminal only.
        with Console(stderr=True, markup=False).status("") as status:
            for each in checks(
                value, prepared, price=price, begin=lambda name: status.update(f"{name} ...")
            ):
                found.append(each)  # noqa: PERF402 - kept also where the next one crashes
        is_whole = True
    finally:
        # The checks before a crash may show its reason.
        if found and not is_whole and not as_json:
            _print_checks(value, found)
    seconds = time.perf_counter() - since
    failed = sum(each.passed is False for each in found)
    if as_json:
        plain = [asdict(each) for each in found]
        print_json({"passed": not failed, "seconds": seconds, "checks": plain})
    else:
        _print_checks(value, found)
        if trials > 1:
            note = f": of one trial; a sweep of {trials} takes up to {trials} times as much"
            print_lines(Text.assemble(("time and cost", "dim"), note))
        summary = Text("all passed", "green")
        if failed:
            summary = Text(f"{failed} of {len(found)} failed", "bold red")
        elif any(each.passed is None for each in found):
            summary = Text("none failed, some are open", "yellow")
        print_lines(Text.assemble(summary, f" in {seconds:.0f} s"))
    if failed:
        raise typer.Exit(4)


def _print_checks(experiment: "Experiment", found: "list[CheckResult]") -> None:
    kind = type(experiment.model).__module__.rpartition(".")[2]
    name = Text(experiment.name, "bold")
    print_lines(Text.assemble(name, f": {kind} on {experiment.task.name}\n"))
    print_table(
        [Column("check", no_wrap=True), Column("", no_wrap=True), "found", "expected"],
        [(c.name, Text(*_WORDS[c.passed]), c.found, c.wanted) for c in found],
    )
    print_lines("")
    for each in found:
        if each.pointer:
            style = "dim" if each.passed else _WORDS[each.passed][1]
            print_lines(Text.assemble((each.name, style), f": {each.pointer}"))
