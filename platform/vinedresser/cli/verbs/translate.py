"""`translate`: translation of standard input, line by line."""

import json
import sys
from typing import TYPE_CHECKING

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    ModelName,
    Overrides,
    WorkspaceFolder,
    decoding_of,
    open_model,
)

if TYPE_CHECKING:
    from vinedresser.bundle import Bundle
    from vinedresser.config import Decoding

# Lines per call of the decoder, which batches lines of similar lengths.
_LINES = 512


def translate(
    model: ModelName,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Translate stdin to stdout, line by line; `beam=4` for beam search.

    For a speech model each line is the path of a recording, or the tab-separated paths of one
    utterance.
    """
    from vinedresser.config import Decoding, parse_overrides
    from vinedresser.errors import DataError

    values = parse_overrides(overrides or [])
    Decoding().override(values)  # a bad option is refused before the model is read
    bundle = open_model(model, workspace)
    decoding = decoding_of(bundle.experiment.decoding, values)
    lines: list[str] = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            lines.append(line.decode().rstrip("\n").rstrip("\r"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input:{number}:{error.start + 1}: byte 0x{line[error.start]:02x} is "
                "not UTF-8; convert the text to UTF-8"
            ) from None
        if "\0" in lines[-1]:
            column = lines[-1].index("\0") + 1
            raise DataError(f"standard input:{number}:{column}: NUL character; remove it")
        if len(lines) == _LINES or sys.stdin.isatty():
            _print_outputs(bundle, lines, decoding, as_json=as_json)
            lines = []
    _print_outputs(bundle, lines, decoding, as_json=as_json)


def _print_outputs(
    bundle: "Bundle", lines: list[str], decoding: "Decoding", *, as_json: bool
) -> None:
    """Print one output line per input line; an empty line stays empty."""
    full = [line for line in lines if line.strip()]
    outputs = iter(bundle.translate(full, decoding) if full else [])
    for line in lines:
        text = next(outputs) if line.strip() else ""
        print(json.dumps({"source": line, "output": text}, ensure_ascii=False) if as_json else text)
    sys.stdout.flush()
