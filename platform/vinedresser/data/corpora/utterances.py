"""Lists of utterances: the audio files of each, and its transcript."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from vinedresser.data.corpora.row import Row
from vinedresser.data.corpora.textfile import half_character, lines_of, listed, refuse
from vinedresser.errors import DataError

_Read = Callable[[str], tuple[list[str], str]]


def read_utterances(path: str, audio: str, transcript: str) -> list[Row]:
    """Return all rows of an inspected manifest: paths under its folder, transcript, line.

    A path ends in `.jsonl` (also .ndjson, .json) or in `.tsv`, with a header line; both may be
    compressed. `audio` and `transcript` name the columns; in JSON `audio` may hold a list of paths.

    Raises:
        DataError: the first 20 bad rows, each with file and line; or a name with another ending.
    """
    endings = [ending for ending in Path(path).suffixes if ending not in (".gz", ".zst")]
    ending = endings[-1].lower() if endings else ""
    lines = enumerate(lines_of(path), 1)
    if ending in (".jsonl", ".ndjson", ".json"):
        read: _Read = functools.partial(_read_json, audio, transcript)
    elif ending == ".tsv":
        read = _reader_of_table(path, audio, transcript, next(lines)[1].split("\t"))
    else:
        raise DataError(f"{path}: a manifest of unknown form; expected a name in .jsonl or .tsv")
    found, problems = list[Row](), list[str]()
    for line, content in lines:
        try:
            paths, text = read(content)
            found.append(_checked(Path(path).parent, paths, text, line))
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
    refuse(problems, path)
    if not found:
        raise DataError(f"{path}: no row; expected one utterance per line")
    return found


def _checked(folder: Path, paths: list[str], text: str, line: int) -> Row:
    if not paths or not all(paths):
        raise ValueError("no audio path; expected one or more")
    if not text.strip():
        raise ValueError(f"{paths[0]} has no transcript")
    for value in (*paths, text):
        if half := half_character(value):
            raise ValueError(
                f"character {half[0]} is half a character ({half[1]}); expected text that UTF-8 "
                "can hold"
            )
    return Row(tuple(str(folder / each) for each in paths), text, line)


def _read_json(audio: str, transcript: str, line: str) -> tuple[list[str], str]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"column {error.colno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("nested too deep; expected an object of strings") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {audio!r} and {transcript!r}")  # noqa: TRY004
    for key in (audio, transcript):
        if key not in value:
            raise ValueError(f"no key {key!r}; it has {listed(value)}")
    paths, text = value[audio], value[transcript]
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
        raise ValueError(f"{audio!r} is not a path or a list of paths")
    if not isinstance(text, str):
        raise ValueError(f"{transcript!r} is not text")  # noqa: TRY004
    return paths, text


def _reader_of_table(path: str, audio: str, transcript: str, header: list[str]) -> _Read:
    for key, name in (("audio", audio), ("transcript", transcript)):
        if name not in header:
            raise DataError(
                f"{path}:1: no column {name!r}; the header has {listed(header)}. "
                f"Fix: set corpus.{key}"
            )
    places = [header.index(name) for name in (audio, transcript)]

    def read(line: str) -> tuple[list[str], str]:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells; expected {len(header)}, as in the header")
        return [cells[places[0]]], cells[places[1]]

    return read
