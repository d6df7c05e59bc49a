"""`retrain`: all steps of a pipeline, and the table of their results."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    DryRun,
    Overrides,
    WorkspaceFolder,
    print_plan,
    resolve_value,
)
from vinedresser.cli.render import print_json, print_lines, print_table

# Exit codes of verdicts with --exit-code.
EXIT_CODES = {"promoted": 0, "kept": 10, "unchanged": 11}
ExitCode = Annotated[
    bool,
    typer.Option("--exit-code", help="exit with 0 for promoted, 10 for kept, 11 for unchanged"),
]
FromStep = Annotated[
    str | None,
    typer.Option("--from", metavar="STEP", help="begin here; earlier steps must have ended"),
]
UntilStep = Annotated[
    str | None, typer.Option("--until", metavar="STEP", help="end after this step")
]
Explain = Annotated[
    bool, typer.Option("--explain", help="print why each step would run, and run none")
]


def verb(  # noqa: PLR0913 - the options of a verb
    pipeline: Annotated[str, typer.Argument(help="import path or file of a pipeline")],
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    dry_run: DryRun = False,
    exit_code: ExitCode = False,
    first: FromStep = None,
    last: UntilStep = None,
    explain: Explain = False,
) -> None:
    """Run the steps of a pipeline, such as prepare, sweep, finalist, prune, register."""
    from vinedresser import pipeline as chain

    value = resolve_value(pipeline, [chain.Pipeline], overrides)
    if dry_run:
        return print_plan(value, as_json=as_json)
    if explain:
        steps = chain.explain(value, workspace)
        if as_json:
            return print_json([{"step": name, "reason": reason} for name, reason in steps])
        return print_table(
            ["", "", ""],
            [(name, "runs" if why else "skipped", why or "unchanged") for name, why in steps],
        )
    from vinedresser.cli.progress import watching

    found = chain.retrain(value, workspace, watch=watching, first=first, last=last)
    if as_json:
        print_json(found)
    elif "parity_max_abs" in found and found["verdict"]:
        _print_table(found, pipeline, workspace)
    else:
        print_table(["", ""], [(key, str(value)) for key, value in found.items()])
    if exit_code:
        raise typer.Exit(EXIT_CODES.get(found["verdict"], 0))
    return None


def _print_table(found: Mapping[str, Any], pipeline: str, workspace: Path) -> None:
    """Print the closing table and the next commands."""
    metric, model = found["metric"], found["model"]
    before, after = found["parameters"]
    slow, fast = found["sentences_per_second"]
    quality = (found[f"finalist_{metric}"], found[f"pruned_{metric}"])
    exact = (found["finalist_exact_error"], found["pruned_exact_error"])
    heads = [
        (f"heads, {kind}", str(own["total"]), str(own["kept"]))
        for kind, own in found["heads"].items()
    ]
    print_lines("")
    print_table(
        ["", "finalist", "pruned"],
        [
            (f"inferred {metric}", f"{quality[0]:.2f}", f"{quality[1]:.2f}"),
            ("sentences not exactly right, %", f"{exact[0]:.1f}", f"{exact[1]:.1f}"),
            ("teacher-forced dev loss, nats", f"{found['teacher_forced_loss']:.3f}", ""),
            *heads,
            ("heads, all", str(found["heads_total"]), str(found["heads_kept"])),
            ("parameters", f"{before:,}", f"{after:,}"),
            ("greedy sentences/s", f"{slow:,.0f}", f"{fast:,.0f}"),
        ],
        title=f"{model}, {found['split']} split",
    )
    # The path of the program, if its environment is not activated.
    program = "vinedresser" if shutil.which("vinedresser") else sys.argv[0]
    at = "" if workspace == Path("workspace") else f" -w {workspace}"
    print_lines(
        f"\nparity of the pruned model: log-probabilities differ by {found['parity_max_abs']:.1e} "
        f"(in fp32 by {found['parity_max_abs_fp32']:.1e}), greedy outputs identical: "
        f"{'yes' if found['parity_same_output'] else 'no'}",
        f"registered: {model} version {found['version']}, "
        f"champion is version {found['champion_version']}",
        f"{found['verdict']}: {found['reason']}",
        f"{found['seconds']:.0f} s\n",
        Text("Next:", "bold"),
        f"  {program} ui{at}",
        f"  echo vinedresser | {program} translate models:/{model}@champion{at}",
        f"  {program} sweep {pipeline} num_trials=40 base.steps=4000{at}",
    )
