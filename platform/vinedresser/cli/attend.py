"""`attend`: where a model looks while it makes an output; a table of heads and pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vinedresser.bundle import load_bundle
from vinedresser.cli.show import print_json
from vinedresser.cli.verbs import locate
from vinedresser.figures.attention import figure
from vinedresser.figures.attention_maps import Attended, AttentionMap, attend

_LOOKS = {"source": "source at itself", "cross": "output at source", "output": "output at itself"}
_MAPS = "attention.npz"


def show(
    model: str, source: str, target: str | None, out: Path, workspace: Path, *, as_json: bool
) -> None:
    """Draws every map into a folder and prints how diagonal and how sharp each head is.

    The folder takes a PNG a module and `attention.npz`: an array (H, T, S) a module, and the
    labels of its sides as `MODULE.rows` and `MODULE.columns`.

    Raises:
        ConfigError: nothing of that name.
        DataError: a sentence is refused, or the model does not attend.
    """
    found = attend(load_bundle(locate(model, workspace)), source, target)
    pictures = _save(found, out)
    if as_json:
        return print_json(
            {
                "source": found.source,
                "target": found.target,
                "is_forced": found.is_forced,
                "best": dict(
                    zip(("module", "head", "diagonality"), found.best() or (), strict=False)
                ),
                "modules": {each.name: _plain(each) for each in found.maps},
                "maps": str(out / _MAPS),
                "pictures": pictures,
            }
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"source  {found.source}", markup=False)
    console.print(f"{'target' if found.is_forced else 'output'}  {found.target}\n", markup=False)
    console.print(_table(found))
    console.print(
        "\ndiagonality: 1 along the diagonal, 0 where all rows look alike, -1 backwards;"
        "\nentropy in nats: 0 for one position, at most its `of` for all alike"
    )
    if best := found.best():
        console.print(f"most diagonal to the source: {best[0]} head {best[1]}, {best[2]:.2f}")
    console.print(f"pictures and maps: {out}")
    return None


def _plain(found: AttentionMap) -> dict[str, Any]:
    return {
        "looks": found.kind,
        "diagonality": found.diagonality,
        "entropy": found.entropy,
        "most_entropy": math.log(found.weights.shape[-1]),
        "rows": found.rows.labels,
        "columns": found.columns.labels,
    }


def _table(found: Attended) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(("module", "looks", "head", "diagonality", "entropy", "of")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for each in found.maps:
        most = math.log(each.weights.shape[-1])
        values = zip(each.diagonality, each.entropy, strict=True)
        for head, (diagonal, spread) in enumerate(values):
            names = (each.name, _LOOKS[each.kind]) if head == 0 else ("", "")
            shown = "" if math.isnan(diagonal) else f"{diagonal:.2f}"
            table.add_row(*names, str(head), shown, f"{spread:.2f}", f"{most:.2f}")
    return table


def _save(found: Attended, out: Path) -> list[str]:
    """The pictures and the maps themselves; what was there of the same name is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    saved = []
    for each in found.maps:
        arrays[each.name] = each.weights
        arrays[f"{each.name}.rows"] = np.array(each.rows.labels)
        arrays[f"{each.name}.columns"] = np.array(each.columns.labels)
        if len(each.weights):  # all heads of a layer may have been pruned
            path = out / f"{each.name}.png"
            figure(each).savefig(path, dpi=100)
            saved.append(str(path))
    np.savez_compressed(out / _MAPS, **arrays)
    return saved
