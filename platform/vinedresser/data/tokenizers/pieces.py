"""SentencePiece: subword pieces, learned with the same bytes each time, and encoded fast."""

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vinedresser.config.task import Tokenizer
from vinedresser.data.corpora.textfile import half_character
from vinedresser.data.tokenizers.flat import Flat, flattened, real_ids, take_ragged
from vinedresser.data.tokenizers.resampling import SPACE, Resampler
from vinedresser.errors import DataError
from vinedresser.special_ids import BOS, EOS, PAD, UNK
from vinedresser.workspace.storage import write_file

# Words whose pieces are cached: 30 MB at about 150 bytes each. Multi30k's German train side has
# 25,000.
_MAX_WORDS = 200_000

# SentencePiece's own advice: cover every character of a small alphabet, and all but 0.05 % of a
# large one. At 0.9995, 29 of the 15,304 tokens of Multi30k's German test set were unknown. Small
# is an eighth of the vocabulary, counted over the first 20,000 texts.
_ALPHABET_TEXTS, _ALPHABET_SHARE = 20_000, 1 / 8

_T = TypeVar("_T")


class SentencePiece:
    """A trained BPE or unigram model; normalisation is inside the model.

    With `normalization: identity` and `byte_fallback`, decode(encode(x)) == x for all text without
    U+2581, SentencePiece's own sign for a space.
    """

    features = 0

    def __init__(
        self, kind: str, normalization: str, model: bytes, *, lowercase: bool = False
    ) -> None:
        import sentencepiece

        self.kind, self.normalization, self._model = kind, normalization, model
        self.lowercase = lowercase
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._words = _Words(self._processor)

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        return int(self._processor.get_piece_size())

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the model's bytes, and of what is done to text before."""
        return hashlib.sha256(self._model + b"lowercase" * self.lowercase).hexdigest()

    @property
    def folds_case(self) -> bool:
        """True if decoded text has lost its capitals; scores must then ignore case."""
        return self.lowercase or self.normalization.endswith("_cf")

    def encode(self, text: str) -> list[int]:
        """Return ids without BOS and EOS; unknown text becomes UNK.

        Raises:
            DataError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, on one thread: more workers scale, not threads."""
        return self._encoded(texts, self._plain)

    def flat(self, items: Sequence[str]) -> Flat:
        """Return the ids of `encode_many`, EOS after each text, as (values, lengths).

        BPE cannot join what a space divides: a word has the same pieces in every text, and is
        looked up once. 2.5 times as fast as SentencePiece on Multi30k, with the same ids.
        A unigram model adds up float scores over the whole text, with other rounding.
        """
        if self.kind == "bpe" and self._words.is_sound:
            return self._encoded(items, lambda texts: self._words.flat(texts, self._plain))
        return flattened(self.encode_many(items))

    def _encoded(self, texts: Sequence[str], encode: Callable[[list[str]], _T]) -> _T:
        """Return what `encode` makes of the texts, in lower case where that is set."""
        texts = [text.lower() for text in texts] if self.lowercase else list(texts)
        try:
            return encode(texts)
        except (RuntimeError, TypeError, UnicodeEncodeError):  # depends on the binding
            _refuse_surrogates(texts)
            raise

    def _plain(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts, out_type=int, num_threads=1)
        return ids

    def resample(
        self, rows: Sequence[Sequence[int]], *, alpha: float, seed: int
    ) -> list[list[int]]:
        """Return another segmentation of the same texts, drawn at random by the seed.

        A unigram model draws one with a probability proportional to its own, to the power of
        alpha (Kudo 2018); BPE leaves out each merge with probability alpha (BPE dropout, Provilkov
        et al. 2020). The same in every process and thread, which SentencePiece's own is not.

        Args:
            rows: ids without BOS and EOS. A row with an unknown id stays as it is: its text is
                lost.
            alpha: above 0. More is nearer to the plain segmentation for unigram, further for BPE.
            seed: >= 0.
        """
        resampler = self._resampler
        drawn = resampler([row for row in rows if UNK not in row], alpha=alpha, seed=seed)
        fresh = iter(drawn)
        return [list(row) if UNK in row else next(fresh) for row in rows]

    @functools.cached_property
    def _resampler(self) -> Resampler:
        processor, ids = self._processor, range(self.size)
        is_odd = (processor.is_control, processor.is_unknown, processor.is_byte)
        return Resampler(
            self.kind,
            [processor.id_to_piece(i) for i in ids],
            [processor.get_score(i) for i in ids],
            [not any(odd(i) for odd in is_odd) for i in ids],
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Return text of ids, without PAD, BOS and EOS."""
        return str(self._processor.decode(real_ids(ids)))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the piece of each id; `<s>`, `</s>` for BOS and EOS."""
        found: list[str] = self._processor.id_to_piece([int(i) for i in ids])
        return found

    def save(self, folder: Path, name: str) -> None:
        """Write `name.model` and `name.json`."""
        content: dict[str, Any] = {"kind": self.kind, "normalization": self.normalization}
        if self.lowercase:
            content["lowercase"] = True
        write_file(folder / f"{name}.model", self._model)
        write_file(folder / f"{name}.json", json.dumps(content) + "\n")


class _Words:
    """Cached pieces of whole words of a BPE model.

    Attributes:
        is_sound: False for a model without the sign for a space, which would merge unknown ids
            across it; words cannot be looked up then.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.is_sound = int(processor.piece_to_id(SPACE)) != UNK
        self._clear()

    def _clear(self) -> None:
        # Word -> its place in the table. Place 0 is EOS.
        self._places = {"": 0}
        self._values = np.array([EOS], dtype=np.int32)
        self._starts, self._lengths = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        # Words that another pass of normalisation would change.
        self._odd = set[str]()

    def flat(self, texts: list[str], plain: Callable[[list[str]], list[list[int]]]) -> Flat:
        """Return `SentencePiece.flat`; `plain` encodes the texts that cannot be looked up."""
        # Each row begins with "", as its text with a space: looked up, that is EOS.
        rows = [text.split(SPACE) for text in self._processor.normalize(texts)]
        words = set(itertools.chain.from_iterable(rows))
        if 2 * len(words) > sum(map(len, rows)):  # a language without spaces: nothing repeats
            return flattened(plain(texts))
        self._learn(words - {""})
        odd = self._not_words(texts, rows, words)
        spare = plain([texts[i] for i in odd])
        for i in odd:
            rows[i] = [""]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        every = map(self._places.__getitem__, itertools.chain.from_iterable(rows))
        found = np.fromiter(every, np.int64, int(counts.sum()))
        lengths = self._lengths[found]
        values = take_ragged(self._values, self._starts[found], lengths)
        ends = np.cumsum(lengths)[np.cumsum(counts) - 1]
        # EOS is still before its text.
        flat = Flat(np.roll(values, -1), np.diff(ends, prepend=0))
        if not odd:
            return flat
        other, lengths = flattened(spare), flat.lengths.copy()
        starts = np.cumsum(lengths) - lengths
        starts[odd] = len(flat.values) + np.cumsum(other.lengths) - other.lengths
        lengths[odd] = other.lengths
        values = take_ragged(np.concatenate([flat.values, other.values]), starts, lengths)
        return Flat(values, lengths)

    def _not_words(self, texts: list[str], rows: list[list[str]], words: set[str]) -> list[int]:
        """Return texts that cannot be looked up word by word; mostly none."""
        has_signs = SPACE in "".join(texts)
        has_odd = not self._odd.isdisjoint(words)
        if not (has_signs or has_odd) and sum(row.count("") for row in rows) == len(rows):
            return []
        return [
            i for i, row in enumerate(rows)
            if row.count("") > 1 or SPACE in texts[i] or not self._odd.isdisjoint(row)
        ]  # fmt: skip

    def _learn(self, words: set[str]) -> None:
        new = sorted(words - self._places.keys() - self._odd)
        if len(self._places) + len(self._odd) + len(new) > _MAX_WORDS:
            self._clear()
            new = sorted(words)
        again = self._processor.normalize(new)
        same = [word for word, n in zip(new, again, strict=True) if n == SPACE + word]
        self._odd.update(set(new).difference(same))
        if not same:
            return
        ids = self._processor.encode(same, out_type=int, num_threads=1)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        values = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
        first, at = len(self._lengths), len(self._values)
        self._places.update(zip(same, range(first, first + len(same)), strict=True))
        self._values = np.concatenate([self._values, values])
        self._starts = np.concatenate([self._starts, at + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])


def _refuse_surrogates(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, 1):
        if half := half_character(text):
            raise DataError(
                f"text {number}, character {half[0]}: {half[1]} is half a character; expected text "
                "that UTF-8 can hold"
            )


def train_pieces(config: Tokenizer, texts: Iterable[str]) -> SentencePiece:
    """Learn a BPE or unigram vocabulary.

    Raises:
        DataError: too little or too much text for `vocab_size`; names the limit.
    """
    import sentencepiece

    model = io.BytesIO()
    stream = (text.lower() for text in texts) if config.lowercase else iter(texts)
    head = list(itertools.islice(stream, _ALPHABET_TEXTS))
    is_small = len(set().union(*head)) <= config.vocab_size * _ALPHABET_SHARE
    # Only where set: a model's bytes hold its settings, and its digest is over its bytes.
    options: dict[str, Any] = {"byte_fallback": True} if config.byte_fallback else {}
    if config.shrink:
        options["hard_vocab_limit"] = False
    if config.normalization == "identity":  # spaces are text too
        options["remove_extra_whitespaces"] = False
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(head, stream),
            model_writer=model,
            character_coverage=1.0 if is_small else 0.9995,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            normalization_rule_name=config.normalization,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            # Unigram scores depend on the number of threads, and the model is hashed.
            num_threads=1,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise DataError(_explain(config, str(error))) from None
    kind, normalization = config.kind, config.normalization
    return SentencePiece(kind, normalization, model.getvalue(), lowercase=config.lowercase)


def _explain(config: Tokenizer, raw: str) -> str:
    """Turn an error of SentencePiece, which names its own source, into one with a fix."""
    wanted = f"{config.kind} with vocab_size {config.vocab_size}"
    if limit := re.search(r"too high .*value <= (\d+)", raw):
        return (
            f"{wanted}: the training text gives at most {limit[1]} pieces. Fix: set "
            f"vocab_size={limit[1]} or less, or shrink=true, or give more text"
        )
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", raw):
        what = "characters, bytes and" if config.byte_fallback else "characters and"
        return (
            f"{wanted}: the training text has {limit[1]} {what} special ids, which all "
            f"need one. Fix: set vocab_size={limit[1]} or more"
        )
    if "sentences_.empty()" in raw or "all_chars_count" in raw:
        return f"{wanted}: no training line of 1 to 4192 bytes that holds more than white space"
    return f"{wanted}: SentencePiece cannot learn from this text ({' '.join(raw.split())})"
