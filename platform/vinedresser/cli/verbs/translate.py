"""`translate`: translation of standard input, line by line."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from pydantic import PositiveInt

from vinedresser.cli.arguments import (
    HERE,
    AsJson,
    ModelName,
    Overrides,
    WorkspaceFolder,
    check_decoding,
    decoding_of,
    open_model,
    split_options,
)
from vinedresser.config import Decoding, Section
from vinedresser.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vinedresser.bundle import Bundle
    from vinedresser.decode import Hypothesis

# Bytes of input that are decoded together: some hundred lines, of which batches of similar lengths
# are made.
_WINDOW = 65_536


class Shown(Section):
    """Options of `translate` on its output; its other keys are those of Decoding."""

    # Hypotheses per line, at most the beam; with `sample=true`, the number of draws. Above 1, each
    # is printed on a line of its own, after the number of its source line and a tab.
    nbest: PositiveInt = 1
    # Print the log-probability of each output, in nats, and a tab before it; with beams, divided by
    # the length penalty.
    scores: bool = False


def verb(
    model: ModelName,
    overrides: Overrides = None,
    workspace: WorkspaceFolder = HERE,
    as_json: AsJson = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="stop at the first line that cannot be read")
    ] = False,
) -> int | None:
    """Translate stdin to stdout, line by line; `beam=4` for beam search.

    Further options: `nbest=3`, `scores=true`, `sample=true` with `temperature`, `top_k`, `top_p`
    and `seed`, `min_length`, `max_length`. A line that cannot be read gives an empty line and an
    error with its number. For a speech model each line is the path of a recording, or the
    tab-separated paths of one utterance.
    """
    parts = split_options(overrides or [], Shown(), Decoding())
    shown = Shown().override(parts[0])
    check_decoding(parts[1])
    bundle = open_model(model, workspace)
    decoding = decoding_of(bundle.experiment.decoding, parts[1])
    if shown.nbest > decoding.beam and not decoding.sample:
        raise ConfigError(
            f"nbest: {shown.nbest} hypotheses of a beam of {decoding.beam}; "
            f"Fix: beam={shown.nbest}, or sample=true"
        )
    number, failed = 0, 0
    for window in _windows(sys.stdin.buffer):
        for source, found, problem in _decoded(bundle, window, decoding, nbest=shown.nbest):
            number += 1
            texts = [(each.score, bundle.target_tokenizer.decode(each.ids)) for each in found]
            if problem:
                failed += 1
                error = DataError(f"standard input:{number}{problem}")
                if strict:
                    sys.stdout.flush()
                    raise error
                sys.stderr.write(f"{error}\n")
            if as_json:
                _print_json(source, texts, problem, shown)
            elif not texts:
                print(f"{number}\t" * (shown.nbest > 1) + "\t" * shown.scores)
            for score, text in () if as_json else texts:
                line = f"{number}\t" * (shown.nbest > 1) + f"{score:.4f}\t" * shown.scores
                print(line + text)
        sys.stdout.flush()
    return DataError.exit_code if failed else None


def _print_json(
    source: str, texts: Sequence[tuple[float, str]], problem: str, shown: Shown
) -> None:
    """Print one object per line of input."""
    row: dict[str, object] = {"source": source, "output": texts[0][1] if texts else ""}
    if shown.scores:
        row["score"] = texts[0][0] if texts else None
    if shown.nbest > 1:
        row["nbest"] = [{"score": score, "output": text} for score, text in texts]
    if problem:
        row["error"] = problem.removeprefix(": ")
    print(json.dumps(row, ensure_ascii=False))


def _windows(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines that have arrived, without their ends: waits only when there is none."""
    rest = b""
    # typing.BinaryIO has no `read1`, which all buffered streams have.
    while chunk := stream.read1(_WINDOW):  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _decoded(
    bundle: "Bundle", window: list[bytes], decoding: Decoding, *, nbest: int
) -> Iterator[tuple[str, list["Hypothesis"], str]]:
    """Yield (line, hypotheses, problem) in order, each line as soon as all before it are decoded.

    A line of spaces has no hypotheses and no problem.
    """
    import numpy as np

    texts, problems = [], {}
    for i, line in enumerate(window):
        text = line.decode(errors="replace").rstrip("\r")
        try:
            line.decode()
        except UnicodeDecodeError as error:
            byte = line[error.start]
            problems[i] = f":{error.start + 1}: byte 0x{byte:02x} is not UTF-8; convert it to UTF-8"
        else:
            if "\0" in text:
                problems[i] = f":{text.index(chr(0)) + 1}: NUL character; remove it"
        texts.append(text)
    full = [i for i, text in enumerate(texts) if text.strip() and i not in problems]
    source, unread = bundle.read_lines([texts[i] for i in full])
    problems |= {full[row]: f": {problem}" for row, problem in unread.items()}
    rows = np.array([row for row in range(len(full)) if row not in unread], np.int64)
    done: dict[int, list[Hypothesis]] = {
        i: [] for i, text in enumerate(texts) if i in problems or not text.strip()
    }
    first = 0
    for batch, found in bundle.decode(source.take(rows), decoding, nbest=nbest):
        done |= zip((full[rows[row]] for row in batch), found, strict=True)
        while first in done:
            yield texts[first], done.pop(first), problems.get(first, "")
            first += 1
    for i in range(first, len(texts)):
        yield texts[i], done.pop(i), problems.get(i, "")
