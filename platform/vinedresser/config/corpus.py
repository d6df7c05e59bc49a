"""Corpora as plain values: which files hold which split, and in which form."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationInfo

from vinedresser.config.section import Section

PACKAGE_PREFIX = "package:"
REMOTE_PREFIX = "s3://"


def _resolve(path: str, info: ValidationInfo) -> str:
    """Relative paths are meant from the file that names them, not from where it is read."""
    if path.startswith(REMOTE_PREFIX):
        if "@" in path.removeprefix(REMOTE_PREFIX).partition("/")[0]:
            # A task is written into manifests and logs; a secret must not be.
            raise ValueError(
                "credentials inside a path are refused; give them as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
        return path
    base = (info.context or {}).get("base")
    if base is None or path.startswith(PACKAGE_PREFIX):
        return path
    return str(Path(base) / path)


DataPath = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]

# A path, a glob (`part-*.de.gz`), or a list of them, on disk or `s3://bucket/key`. Globs are taken
# in the order of their names. Files may be gzip or zstd; their first bytes tell, not their names.
Files = DataPath | Annotated[tuple[DataPath, ...], Field(min_length=1)]


def names_of(files: Files) -> tuple[str, ...]:
    """One path or several, as several."""
    return (files,) if isinstance(files, str) else files


class Pair(Section):
    """Two parallel text files: line n of one belongs to line n of the other.

    Of several, the first source file belongs to the first target file, and so on.
    """

    source: Files
    target: Files


class TextCorpus(Section):
    """Parallel UTF-8 text files. Only a line feed ends a line."""

    kind: Literal["text"] = "text"
    train: Pair
    dev: Pair
    test: Pair | None = None


# A column's name, or its number from 1 as in `cut -f`.
Column = Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)]


class TableCorpus(Section):
    """Both sides in one file, a row a pair: TSV, JSON lines or Parquet.

    A TSV whose columns are named has a header line; one whose columns are numbered has none.
    """

    kind: Literal["table"]
    train: Files
    dev: Files
    test: Files | None = None
    source: Column
    target: Column
    # `auto`: Parquet by its first bytes, JSON lines by .jsonl, .ndjson or .json; else TSV.
    format: Literal["auto", "tsv", "jsonl", "parquet"] = "auto"


class LexiconCorpus(Section):
    """A pronunciation dictionary in CMUdict's format: `word PH1 PH2`, `word(2)` a variant.

    Source is the spelling, target the phones. Dev and test words are drawn by a hash of the word
    and `split_seed`, so that they stay where they are when the dictionary grows.
    """

    kind: Literal["lexicon"] = "lexicon"
    # A file, or `package:NAME/FILE` for a file inside an installed Python package.
    path: DataPath
    # First columns of these files are words that no split may contain (public test lists).
    exclude: tuple[DataPath, ...] = ()
    # Whether an exclusion list that is not there is passed over, and said so, or refused.
    exclude_missing_ok: bool = False
    # Whether every pronunciation of a train word is a train row, or the first alone. Dev and test
    # words are scored against their first.
    variants: Literal["first", "all"] = "first"
    dev_words: PositiveInt = 2000
    test_words: NonNegativeInt = 2000
    # 0 takes every word that is left.
    train_words: NonNegativeInt = 0
    keep_stress: bool = False
    split_seed: int = 1
