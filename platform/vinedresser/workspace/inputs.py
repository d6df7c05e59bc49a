"""Inputs of a run or a sweep: the shard set and the model that it needs until it has ended."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vinedresser.workspace.storage import POSIX, parsed_object, write_file


@dataclass(frozen=True)
class Inputs:
    """Folders that an unfinished run or sweep reads when it resumes.

    Attributes:
        shards: name of the shard set.
        init: path of the model that it starts from; "" for none.
    """

    shards: str
    init: str = ""


def write_inputs(path: Path, shards: Path, init: str | None) -> None:
    """Record the inputs, unless they are recorded already."""
    inputs = Inputs(shards.name, init or "")
    if read_inputs(path) != inputs:
        write_file(path, json.dumps(asdict(inputs)) + "\n")


def read_inputs(path: Path) -> Inputs | None:
    """Return the recorded inputs; None if there are none."""
    plain = parsed_object(POSIX.read(path))
    return Inputs(**plain) if plain.keys() == {"shards", "init"} else None
