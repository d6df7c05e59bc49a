"""`attend`: where a model looks while it makes an output; a table of heads, and pictures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vinedresser.cli.arguments import HERE, AsJson, Model, Workspace, open_model
from vinedresser.cli.render import print_json, print_lines, print_table

if TYPE_CHECKING:
    from vinedresser.figures.attention_maps import Attended

_LOOKS = {"source": "source at itself", "cross": "output at source", "output": "output at itself"}
_MAPS = "attention.npz"


def attend(
    model: Model,
    source: Annotated[str, typer.Argument(help="a sentence; or paths of recordings, as translate")],
    target: Annotated[
        str | None, typer.Argument(help="what it is made to say; its own greedy output by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the pictures and maps")] = Path("attention"),
    workspace: Workspace = HERE,
    as_json: AsJson = False,
) -> None:
    """Show where a model looks: a picture a module, and how diagonal each head is."""
    from vinedresser.figures.attention_maps import attend as find_maps

    found = find_maps(open_model(model, workspace), source, target)
    pictures = _save(found, out)
    best = found.best()
    if as_json:
        return print_json(
            {
                "source": found.source,
                "target": found.target,
                "is_forced": found.is_forced,
                "best": dict(zip(("module", "head", "diagonality"), best or (), strict=False)),
                "modules": {
                    each.name: {
                        "looks": each.kind,
                        "diagonality": each.diagonality,
                        "entropy": each.entropy,
                        "most_entropy": math.log(each.weights.shape[-1]),
                        "rows": each.rows.labels,
                        "columns": each.columns.labels,
                    }
                    for each in found.maps
                },
                "maps": str(out / _MAPS),
                "pictures": pictures,
            }
        )
    print_lines(
        f"source  {found.source}", f"{'target' if found.is_forced else 'output'}  {found.target}\n"
    )
    columns = ["module", "looks", ">head", ">diagonality", ">entropy", ">of"]
    print_table(columns, _rows(found))
    print_lines(
        "\ndiagonality: 1 along the diagonal, 0 where all rows look alike, -1 backwards;"
        "\nentropy in nats: 0 for one position, at most its `of` for all alike"
    )
    if best:
        print_lines(f"most diagonal to the source: {best[0]} head {best[1]}, {best[2]:.2f}")
    return print_lines(f"pictures and maps: {out}")


def _rows(found: "Attended") -> Iterator[tuple[str, ...]]:
    for each in found.maps:
        most = math.log(each.weights.shape[-1])
        values = zip(each.diagonality, each.entropy, strict=True)
        for head, (diagonal, spread) in enumerate(values):
            names = (each.name, _LOOKS[each.kind]) if head == 0 else ("", "")
            shown = "" if math.isnan(diagonal) else f"{diagonal:.2f}"
            yield *names, str(head), shown, f"{spread:.2f}", f"{most:.2f}"


def _save(found: "Attended", out: Path) -> list[str]:
    """Write a PNG per module, and `attention.npz` with the maps; existing files are replaced.

    The archive holds an array (H, T, S) per module, and the labels of its sides as `MODULE.rows`
    and `MODULE.columns`.
    """
    import numpy as np

    from vinedresser.figures.attention import attention_figure

    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    saved = []
    for each in found.maps:
        arrays[each.name] = each.weights
        arrays[f"{each.name}.rows"] = np.array(each.rows.labels)
        arrays[f"{each.name}.columns"] = np.array(each.columns.labels)
        if len(each.weights):  # all heads of a layer may have been pruned
            path = out / f"{each.name}.png"
            attention_figure(each).savefig(path, dpi=100)
            saved.append(str(path))
    np.savez_compressed(out / _MAPS, **arrays)
    return saved
