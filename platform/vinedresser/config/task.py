"""Task: which corpus, which tokenizers, which metric. Everything that defines a shard set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationInfo,
    model_validator,
)

from vinedresser.config.section import Section

# One rule for every name that becomes a folder, a run or a model: no path, no shell, no control
# characters (faults X05, S17).
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

PACKAGE_PREFIX = "package:"

MetricName = Literal["bleu", "chrf", "ter", "per", "wer", "cer"]


def _resolve(path: str, info: ValidationInfo) -> str:
    """Relative paths are meant from the file that names them, not from where it is read."""
    base = (info.context or {}).get("base")
    if base is None or path.startswith(PACKAGE_PREFIX):
        return path
    return str(Path(base) / path)


DataPath = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]


class Pair(Section):
    """Two parallel text files: line n of one belongs to line n of the other."""

    source: DataPath
    target: DataPath


class TextCorpus(Section):
    """Parallel UTF-8 text files. Only a line feed ends a line."""

    kind: Literal["text"] = "text"
    train: Pair
    dev: Pair
    test: Pair | None = None


class LexiconCorpus(Section):
    """A pronunciation dictionary in CMUdict's format: `word PH1 PH2`, `word(2)` a variant.

    Source is the spelling, target the phones. Dev and test words are drawn by a hash of the word
    and `split_seed`, so that they stay where they are when the dictionary grows. The first
    pronunciation counts; variants are left out.
    """

    kind: Literal["lexicon"] = "lexicon"
    # A file, or `package:NAME/FILE` for a file inside an installed Python package.
    path: DataPath
    # First columns of these files are words that no split may contain (public test lists).
    exclude: tuple[DataPath, ...] = ()
    # Whether an exclusion list that is not there is passed over, and said so, or refused.
    exclude_missing_ok: bool = False
    dev_words: PositiveInt = 2000
    test_words: NonNegativeInt = 2000
    # 0 takes every word that is left.
    train_words: NonNegativeInt = 0
    keep_stress: bool = False
    split_seed: int = 1


def _corpus_kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("kind", "text"))
    return str(getattr(value, "kind", None))


Corpus = Annotated[
    Annotated[TextCorpus, Tag("text")] | Annotated[LexiconCorpus, Tag("lexicon")],
    Discriminator(
        _corpus_kind,
        custom_error_type="corpus_kind",
        custom_error_message="a mapping with `kind: text` or `kind: lexicon` is wanted",
    ),
]


class Tokenizer(Section):
    """How a side of the corpus becomes ids."""

    # bpe and unigram: SentencePiece; characters: one id a character; symbols: split at spaces.
    kind: Literal["bpe", "unigram", "characters", "symbols"]
    # bpe and unigram only. Includes the four special ids.
    vocab_size: Annotated[int, Field(ge=8, le=1_000_000)] = 8000
    # SentencePiece's rule name; `nmt_nfkc_cf` also folds case.
    normalization: Literal["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity"] = "nmt_nfkc"


class Task(Section):
    """A corpus, its tokenizers and the metric that ranks models on it."""

    name: SafeName
    corpus: Corpus
    # Either `tokenizer`, one joint vocabulary for both sides, or one tokenizer a side.
    tokenizer: Tokenizer | None = None
    source_tokenizer: Tokenizer | None = None
    target_tokenizer: Tokenizer | None = None
    metric: MetricName
    # In tokens, end-of-sentence included. Longer pairs are dropped from train and counted.
    max_source_length: PositiveInt = 256
    max_target_length: PositiveInt = 256
    # Source-length classes 1-5, 6-10, ... (methods.md 23).
    bucket_width: PositiveInt = 5

    @model_validator(mode="after")
    def _one_form_of_tokenizers(self) -> Self:
        sides = [t is not None for t in (self.source_tokenizer, self.target_tokenizer)]
        if any(sides) if self.tokenizer else not all(sides):
            raise ValueError(
                "give either `tokenizer` (one joint vocabulary) or both "
                "`source_tokenizer` and `target_tokenizer`"
            )
        return self

    @property
    def has_joint_vocabulary(self) -> bool:
        """Whether source and target ids mean the same pieces."""
        return self.tokenizer is not None
