"""`attend`: the attention of a model while it decodes; a table of heads, and figures."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from vinedresser.cli.arguments import HERE, AsJson, ModelName, WorkspaceFolder, open_model
from vinedresser.cli.render import print_json, print_lines, print_table

_FROM_TO = {"source": "source to itself", "cross": "output to source", "output": "output to itself"}


def attend(
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
    figures, modules, rows = [], {}, []
    for each in found.maps:
        sides = {"rows": each.rows.labels, "columns": each.columns.labels}
        arrays |= {each.name: each.weights}
        arrays |= {f"{each.name}.{side}": np.array(labels) for side, labels in sides.items()}
        if len(each.weights):  # all heads of a layer may have been pruned
            figures.append(str(out / f"{each.name}.png"))
            attention_figure(each).savefig(figures[-1], dpi=100)
        most = math.log(each.weights.shape[-1])
        modules[each.name] = {
            "looks": each.kind,
            "diagonality": each.diagonality,
            "entropy": each.entropy,
            "most_entropy": most,
            **sides,
        }
        values = zip(each.diagonality, each.entropy, strict=True)
        for head, (diagonal, entropy) in enumerate(values):
            names = (each.name, _FROM_TO[each.kind]) if head == 0 else ("", "")
            shown = "" if math.isnan(diagonal) else f"{diagonal:.2f}"
            rows.append((*names, str(head), shown, f"{entropy:.2f}", f"{most:.2f}"))
    np.savez_compressed(out / "attention.npz", **arrays)
    best = found.best()
    if as_json:
        return print_json(
            {
                "source": found.source,
                "target": found.target,
                "is_forced": found.is_forced,
                "best": dict(zip(("module", "head", "diagonality"), best or (), strict=False)),
                "modules": modules,
                "maps": str(out / "attention.npz"),
                "pictures": figures,
            }
        )
    print_lines(
        f"source  {found.source}", f"{'target' if found.is_forced else 'output'}  {found.target}\n"
    )
    print_table(["module", "attention", ">head", ">diagonality", ">entropy", ">max"], rows)
    print_lines(
        "\ndiagonality: 1 along the diagonal, 0 if all rows are equal, -1 along the antidiagonal;"
        "\nentropy in nats: 0 for a single position, `max` for uniform weights"
    )
    if best:
        print_lines(f"most diagonal head to the source: {best[0]} head {best[1]}, {best[2]:.2f}")
    return print_lines(f"figures and maps: {out}")
