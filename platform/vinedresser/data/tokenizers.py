"""Text <-> ids. Normalisation lives in the tokenizer, so that training and inference agree."""

import hashlib
import io
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from vinedresser.commit import canonical_json, write_file
from vinedresser.config.task import Tokenizer
from vinedresser.errors import DataError

# The first ids of every vocabulary; the same as in `batch`, which needs torch to be imported.
PAD, BOS, EOS, UNK = 0, 1, 2, 3
NUM_SPECIAL = 4
# What an unknown symbol is decoded to: SentencePiece's own choice.
UNKNOWN = "\u2047"

# SentencePiece's own advice: cover every character of a small alphabet, and all but 0.05 % of a
# large one. At 0.9995, 29 of the 15,304 tokens of Multi30k's German test set were unknown. Small
# is an eighth of the vocabulary, counted over the first 20,000 texts.
_ALPHABET_TEXTS, _ALPHABET_SHARE = 20_000, 1 / 8


class TextTokenizer(Protocol):
    """Text to ids and back; ids 0-3 are PAD, BOS, EOS and UNK."""

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 in hex of everything that decides how text is encoded."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS; what is unknown becomes UNK."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; PAD, BOS and EOS are left out wherever they stand."""
        ...

    def save(self, folder: Path, name: str) -> None:
        """Writes `name.json`, and `name.model` for SentencePiece."""
        ...


def _words(ids: Iterable[int]) -> list[int]:
    return [int(i) for i in ids if i not in (PAD, BOS, EOS)]


class Symbols:
    """One id a character, or one id a symbol between white space. Text is put into NFC."""

    def __init__(self, kind: str, symbols: Sequence[str]) -> None:
        self.kind = kind
        self.symbols = tuple(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols, NUM_SPECIAL)}
        self._names = ("", "", "", UNKNOWN, *self.symbols)

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self._names)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of kind and symbols."""
        return hashlib.sha256(canonical_json(self._content()).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {"kind": self.kind, "normalization": "NFC", "symbols": list(self.symbols)}

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS; what is unknown becomes UNK."""
        known = self._ids
        return [known.get(symbol, UNK) for symbol in _parts(self.kind, text)]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; PAD, BOS and EOS are left out wherever they stand."""
        names = [self._names[i] for i in _words(ids)]
        return ("" if self.kind == "characters" else " ").join(names)

    def save(self, folder: Path, name: str) -> None:
        """Writes `name.json`."""
        content = json.dumps(self._content(), ensure_ascii=False, indent=0)
        write_file(folder / f"{name}.json", content + "\n")


def _parts(kind: str, text: str) -> Sequence[str]:
    text = unicodedata.normalize("NFC", text)
    return text if kind == "characters" else text.split()


class SentencePiece:
    """A trained BPE or unigram model; normalisation is inside the model."""

    def __init__(self, kind: str, normalization: str, model: bytes) -> None:
        import sentencepiece

        self.kind, self.normalization, self._model = kind, normalization, model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def size(self) -> int:
        """Number of ids, the special ones included."""
        return int(self._processor.get_piece_size())

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the model's bytes."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS; what is unknown becomes UNK.

        Raises:
            DataError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on one thread: workers are what is scaled."""
        try:
            ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        except (RuntimeError, TypeError, UnicodeEncodeError):  # which one: an accident of binding
            for index, text in enumerate(texts):
                _refuse_surrogates(index, text)
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; PAD, BOS and EOS are left out wherever they stand."""
        return str(self._processor.decode(_words(ids)))

    def save(self, folder: Path, name: str) -> None:
        """Writes `name.model` and `name.json`."""
        content = {"kind": self.kind, "normalization": self.normalization}
        write_file(folder / f"{name}.model", self._model)
        write_file(folder / f"{name}.json", json.dumps(content) + "\n")


def _refuse_surrogates(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {index + 1}, character {error.start + 1}: U+{ord(text[error.start]):04X} is "
            "half a character; expected text that UTF-8 can hold"
        ) from None


def train_tokenizer(config: Tokenizer, texts: Iterable[str]) -> TextTokenizer:
    """Learns a vocabulary. The same texts in the same order give the same bytes.

    Args:
        config: the kind; `vocab_size` and `normalization` matter to bpe and unigram only.
        texts: training texts of one side, or of both for a joint vocabulary. SentencePiece holds
            them in memory, about 1 GB a million lines; symbols and characters are streamed.

    Raises:
        DataError: no text, or too little or too much of it for `vocab_size`; names the limit.
    """
    stream = iter(texts)
    head: list[str] = []
    while not (head and head[-1].strip()):
        if (text := next(stream, None)) is None:
            raise DataError("0 texts with content to learn a vocabulary from; see what was dropped")
        head.append(text)
    stream = itertools.chain(head, stream)
    if config.kind in ("symbols", "characters"):
        found: set[str] = set()
        for text in stream:
            found.update(_parts(config.kind, text))
        return Symbols(config.kind, sorted(found))
    return SentencePiece(config.kind, config.normalization, _train_model(config, stream))


def _train_model(config: Tokenizer, texts: Iterable[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    stream = iter(texts)
    head = list(itertools.islice(stream, _ALPHABET_TEXTS))
    is_small = len(set().union(*head)) <= config.vocab_size * _ALPHABET_SHARE
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
        )
    except RuntimeError as error:
        raise DataError(_explain(config, str(error))) from None
    return model.getvalue()


def _explain(config: Tokenizer, raw: str) -> str:
    """SentencePiece names source lines of its own; a user can act on these words."""
    wanted = f"{config.kind} with vocab_size {config.vocab_size}"
    if limit := re.search(r"too high .*value <= (\d+)", raw):
        return (
            f"{wanted}: the training text gives at most {limit[1]} pieces. "
            f"Fix: set vocab_size={limit[1]} or less, or give more text"
        )
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", raw):
        return (
            f"{wanted}: the training text has {limit[1]} characters and special ids, which all "
            f"need one. Fix: set vocab_size={limit[1]} or more"
        )
    if "sentences_.empty()" in raw or "all_chars_count" in raw:
        return f"{wanted}: no training line of 1 to 4192 bytes that holds more than white space"
    return f"{wanted}: SentencePiece cannot learn from this text ({' '.join(raw.split())})"


def load_tokenizer(folder: Path, name: str) -> TextTokenizer:
    """Reads what `save` wrote.

    Raises:
        DataError: a file is absent or not what it should be.
    """
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
        if content["kind"] in ("symbols", "characters"):
            return Symbols(content["kind"], content["symbols"])
        path = folder / f"{name}.model"
        return SentencePiece(content["kind"], content["normalization"], path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the folder holds no tokenizer {name}") from None
    except (ValueError, KeyError, TypeError, RuntimeError):
        raise DataError(f"{path}: not a tokenizer; prepare the data anew") from None
