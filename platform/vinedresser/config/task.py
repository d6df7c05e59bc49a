"""Task: corpus, tokenizers and metric; it defines a shard set."""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from vinedresser.config.cleaning import Cleaning
from vinedresser.config.corpus import AnyCorpus, DataPath
from vinedresser.config.section import Section

# One rule for every name that becomes a folder, a run or a model: no path, no shell, no control
# characters.
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


def _known_metric(name: str) -> str:
    # Imported by name: the module of metrics is above config in the order of imports.
    checked: str = importlib.import_module("vinedresser.metrics").metric_name(name)
    return checked


# A name of METRICS in metrics.py, the one place that lists them.
MetricName = Annotated[str, AfterValidator(_known_metric)]


class Tokenizer(Section):
    """Conversion of one side of the corpus to ids."""

    # bpe and unigram: SentencePiece; characters: one id per character; symbols: split at spaces.
    kind: Literal["bpe", "unigram", "characters", "symbols"]
    # bpe and unigram only. Includes the four special ids.
    vocab_size: Annotated[int, Field(ge=8, le=1_000_000)] = 8000
    # SentencePiece's rule name; `nmt_nfkc_cf` also folds case.
    normalization: Literal["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity"] = "nmt_nfkc"
    # Convert text to lower case first, by Unicode's rules; for any kind.
    lowercase: bool = False
    # bpe and unigram: 256 byte pieces for characters without a piece, so that none is unknown.
    byte_fallback: bool = False
    # bpe and unigram: rows that the pieces are learned from, at most, evenly spread over train.
    # SentencePiece holds them in memory, 1.3 GB per million pairs.
    training_rows: PositiveInt = 100_000
    # bpe and unigram: text too small for `vocab_size` gives a smaller vocabulary, not an error.
    shrink: bool = False


class Frames(Section):
    """Conversion of recordings to frames: log-mel filterbanks by Kaldi's rules, without dither."""

    kind: Literal["frames"]
    # Hz. Recordings of another rate are refused, not resampled.
    sample_rate: Annotated[int, Field(ge=1000, le=192_000)] = 16_000
    num_mels: Annotated[int, Field(ge=1, le=256)] = 40
    window_ms: Annotated[float, Field(ge=1, le=1000)] = 25.0
    shift_ms: Annotated[float, Field(ge=1, le=1000)] = 10.0
    # utterance: each mel band gets mean 0 and variance 1 over the utterance; mean: mean 0 only.
    # Not over the corpus: frames then depend on their own utterance alone, which
    # removes the level and the microphone of a recording.
    normalization: Literal["utterance", "mean", "none"] = "utterance"


def _tokenizer_kind(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return "frames" if kind == "frames" else "text"


SourceTokenizer = Annotated[
    Annotated[Tokenizer, Tag("text")] | Annotated[Frames, Tag("frames")],
    Discriminator(_tokenizer_kind),
]


class Task(Section):
    """A corpus, its tokenizers and the metric that ranks models on it."""

    name: SafeName
    corpus: AnyCorpus
    # Either `tokenizer`, one joint vocabulary for both sides, or one tokenizer per side.
    tokenizer: Tokenizer | None = None
    source_tokenizer: SourceTokenizer | None = None
    target_tokenizer: Tokenizer | None = None
    # A model folder whose tokenizers are used; by default they are learned from train. Data for a
    # model that is trained further needs the model's own.
    tokenizers_of: DataPath | None = None
    metric: MetricName
    cleaning: Cleaning = Cleaning()
    # In tokens, end-of-sentence included. Longer pairs are dropped from train and counted.
    max_source_length: PositiveInt = 256
    max_target_length: PositiveInt = 256
    # Shards are sorted by classes of the longer side, 1-5, 6-10, ...
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

    @model_validator(mode="after")
    def _frames_where_recordings(self) -> Self:
        has_recordings = self.corpus.has_recordings
        if has_recordings != isinstance(self.source_tokenizer, Frames):
            kind = type(self.corpus).__module__.rpartition(".")[2]
            expected = "`kind: frames`" if has_recordings else "a text kind, as `kind: bpe`"
            raise ValueError(f"a corpus of `kind: {kind}` needs a source_tokenizer of {expected}")
        return self

    @property
    def has_joint_vocabulary(self) -> bool:
        """Return True if both sides use the same vocabulary."""
        return self.tokenizer is not None
