"""`check`: what a user runs before spending a cluster; a table, and a pointer for each failure."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vinedresser.cli.show import print_json
from vinedresser.config import Experiment
from vinedresser.data.shards import prepare
from vinedresser.health.preflight.check import Check
from vinedresser.health.preflight.checks import checks

# Word and colour of a verdict; None is one that could not be reached.
_WORDS = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("open", "yellow")}


def check(
    experiment: Experiment, workspace: Path, *, price: float, trials: int, as_json: bool
) -> bool:
    """Prepares the shards and prints the table; false if a check failed.

    Writes nothing but the shards, which `train` takes as they are. Time and cost are of one run:
    where the experiment is the base of a study of several `trials`, that is said.
    """
    since = time.perf_counter()
    shards = prepare(experiment.task, workspace / "shards")
    found: list[Check] = []
    is_whole = False
    try:
        # A line that spins, on a terminal only.
        with Console(stderr=True).status("") as status:
            begin: Callable[[str], None] = lambda what: status.update(f"{what} ...")  # noqa: E731
            for each in checks(experiment, shards, price=price, begin=begin):
                found.append(each)  # noqa: PERF402 - kept also where the next one crashes
        is_whole = True
    finally:
        # What a model fails in that cannot even be run to the end may tell why.
        if found and not is_whole and not as_json:
            _show(experiment, found)
    seconds = time.perf_counter() - since
    passed = all(each.passed is not False for each in found)
    if as_json:
        print_json({"passed": passed, "seconds": seconds, "checks": [asdict(c) for c in found]})
    else:
        _show(experiment, found)
        if trials > 1:
            Console().print(
                f"[dim]time and cost[/]: of one trial; a sweep of {trials} takes up to {trials} "
                "times that", highlight=False, soft_wrap=True,
            )  # fmt: skip
        _sum_up(found, seconds)
    return passed


def _show(experiment: Experiment, found: list[Check]) -> None:
    console = Console(highlight=False)
    kind = type(experiment.model).__module__.rpartition(".")[2]
    console.print(f"[bold]{experiment.name}[/bold]: {kind} on {experiment.task.name}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found", "wanted"):
        table.add_column(column, overflow="fold", no_wrap=column in ("check", ""))
    for each in found:
        word, style = _WORDS[each.passed]
        table.add_row(each.name, f"[{style}]{word}[/]", escape(each.found), escape(each.wanted))
    console.print(table)
    console.print()
    for each in found:
        if each.pointer:
            style = "dim" if each.passed else _WORDS[each.passed][1]
            console.print(f"[{style}]{each.name}[/]: {escape(each.pointer)}", soft_wrap=True)


def _sum_up(found: list[Check], seconds: float) -> None:
    failed = sum(each.passed is False for each in found)
    word = f"[bold red]{failed} of {len(found)} failed[/]" if failed else "[green]all passed[/]"
    if not failed and any(each.passed is None for each in found):
        word = "[yellow]none failed, some are open[/]"
    Console(highlight=False).print(f"{word} in {seconds:.0f} s")
