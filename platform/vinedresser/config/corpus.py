"""Corpora as plain values; each kind is a class in a module of `CORPORA`, with its reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    TypeAdapter,
    ValidationInfo,
)

from vinedresser.config.kinds import kind_class, kinds
from vinedresser.config.section import Section

if TYPE_CHECKING:
    from vinedresser.config.task import Task
    from vinedresser.data.corpora.corpus import Corpus

# Package of the kinds: `kind: text` is its module `text`.
CORPORA = "vinedresser.data.corpora.kinds"

PACKAGE_PREFIX = "package:"
REMOTE_PREFIX = "s3://"
# Limits of Linux, in bytes: PATH_MAX and NAME_MAX.
_MAX_PATH, _MAX_NAME = 4096, 255


def _resolve(path: str, info: ValidationInfo) -> str:
    """Resolve a relative path against the folder of the file that names it."""
    context = info.context or {}
    context.get("paths", []).append(path)
    if "\0" in path:
        raise ValueError("a path cannot hold NUL")
    if len(path.encode(errors="surrogatepass")) > _MAX_PATH or any(
        len(part.encode(errors="surrogatepass")) > _MAX_NAME for part in path.split("/")
    ):
        raise ValueError(
            f"too long; a path has at most {_MAX_PATH} bytes, each name in it {_MAX_NAME}"
        )
    if path.startswith(REMOTE_PREFIX):
        if "@" in path.removeprefix(REMOTE_PREFIX).partition("/")[0]:
            # Tasks are written to manifests and logs, where secrets must not appear.
            raise ValueError(
                "credentials inside a path are refused; give them as AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
        return path
    base = context.get("base")
    if base is None or path.startswith(PACKAGE_PREFIX):
        return path
    return str(Path(base) / path)


DataPath = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]

# A path, a glob (`part-*.de.gz`), or a list of them, on disk or `s3://bucket/key`. Files of a glob
# are read in the order of their names. gzip and zstd are detected by the first bytes.
Files = Annotated[
    Annotated[DataPath, Tag("path")]
    | Annotated[tuple[DataPath, ...], Field(min_length=1), Tag("paths")],
    Discriminator(lambda value: "paths" if isinstance(value, list | tuple) else "path"),
]


def names_of(files: Files) -> tuple[str, ...]:
    """Return one path or several as a tuple."""
    return (files,) if isinstance(files, str) else files


class CorpusConfig(Section):
    """Base of the configuration of a corpus.

    A kind is one module of `CORPORA`: a subclass with `kind: Literal["NAME"]`, and the reader that
    `open` returns.
    """

    # True where a row's source is recordings, which need a source tokenizer of `kind: frames`.
    has_recordings: ClassVar[bool] = False

    def open(self, task: "Task") -> "Corpus":
        """Inspect every file of the corpus.

        Raises:
            DataError: all problems of all files, each with path, line and byte column.
        """
        raise NotImplementedError


def _restore_corpus(value: Any, info: ValidationInfo) -> Any:
    """Build the configuration of the kind that a mapping names; `text` if it names none."""
    if isinstance(value, CorpusConfig):
        return value
    kind = value.get("kind", "text") if isinstance(value, Mapping) else None
    if not isinstance(kind, str):
        known = ", ".join(f"`{name}`" for name in kinds(CORPORA))
        raise ValueError(f"expected a mapping with `kind` one of {known}")  # noqa: TRY004
    found = kind_class(CORPORA, kind, CorpusConfig, "kind of corpus")
    return found.model_validate(value, context=info.context)


AnyCorpus = Annotated[SerializeAsAny[CorpusConfig], BeforeValidator(_restore_corpus)]


def paths_in(corpus: object) -> list[str]:
    """Return the paths, globs and URIs that the plain value of a corpus names, in its order.

    Raises:
        ValueError: it is not a corpus.
    """
    paths: list[str] = []
    TypeAdapter(AnyCorpus).validate_python(corpus, context={"paths": paths})
    return list(dict.fromkeys(paths))
