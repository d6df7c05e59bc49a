"""`attend`: the attention of a model while it decodes; a table of heads, and figures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vinedresser.cli.arguments import HERE, AsJson, ModelName, WorkspaceFolder, open_model
from vinedresser.cli.render import print_json, print_lines, print_table

if TYPE_CHECKING:
    from vinedresser.figures.attention_maps import AttentionMap

_FROM_TO = {"source": "source to itself", "cross": "output to source", "output": "output to itself"}


def verb(
    model: ModelName,
    source: Annotated[
        str, typer.Argument(help="a sentence, or paths of recordings as for `translate`")
    ],
    target: Annotated[
        str | None, typer.Argument(help="forced output; the model's greedy output by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for figures and maps")] = Path("attention"),
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show the attention of a model: a figure per module, and the diagonality of each head.

    Writes a PNG per module, and `attention.npz` with an array (H, T, S) per module and the labels
    of its sides as `MODULE.rows` and `MODULE.columns`; existing files are replaced.
    """
    import numpy as np

    from vinedresser.figures.attention import attention_figure
    from vinedresser.figures.attention_maps import attention_of

    found = attention_of(open_model(model, workspace), source, target)
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    figures = []
    for each in found.maps:
        arrays[each.name] = each.weights
        arrays[f"{each.name}.rows"] = np.array(each.rows.labels)
        arrays[f"{each.name}.columns"] = np.array(each.columns.labels)
        if len(each.weights):  # all heads of a layer may have been pruned
            figures.append(str(out / f"{each.name}.png"))
            attention_figure(each).savefig(figures[-1], dpi=100)
    np.savez_compressed(out / "attention.npz", **arrays)
    if as_json:
        files = {"maps": str(out / "attention.npz"), "pictures": figures}
        return print_json(found.to_json() | files)
    print_lines(
        f"source  {found.source}", f"{'target' if found.is_forced else 'output'}  {found.target}\n"
    )
    columns = ["module", "attention", ">head", ">diagonality", ">entropy", ">max"]
    print_table(columns, (cells for each in found.maps for cells in _rows(each)))
    print_lines(
        "\ndiagonality: 1 along the diagonal, 0 if all rows are equal, -1 along the antidiagonal;"
        "\nentropy in nats: 0 for a single position, `max` for uniform weights"
    )
    if best := found.best():
        print_lines(f"most diagonal head to the source: {best[0]} head {best[1]}, {best[2]:.2f}")
    return print_lines(f"figures and maps: {out}")


def _rows(found: "AttentionMap") -> Iterator[tuple[str, ...]]:
    """Yield the cells of the table: a line per head."""
    values = zip(found.diagonality, found.entropy, strict=True)
    for head, (diagonal, entropy) in enumerate(values):
        names = (found.name, _FROM_TO[found.kind]) if head == 0 else ("", "")
        shown = "" if math.isnan(diagonal) else f"{diagonal:.2f}"
        yield *names, str(head), shown, f"{entropy:.2f}", f"{found.most_entropy:.2f}"
