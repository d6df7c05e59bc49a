"""Text <-> ids. Normalisation is part of the tokenizer, so that training and inference agree."""

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vinedresser.config.task import Frames, Tokenizer
from vinedresser.data.tokenizers.flat import Flat, flattened, real_ids
from vinedresser.data.tokenizers.frames import Filterbank, load_filterbank
from vinedresser.data.tokenizers.pieces import SentencePiece, train_pieces
from vinedresser.errors import ConfigError, DataError
from vinedresser.special_ids import BOS, EOS, PAD, UNK
from vinedresser.workspace.commit import canonical_json
from vinedresser.workspace.storage import write_file

NUM_SPECIAL = 4
# Decoded form of an unknown symbol, as in SentencePiece.
UNKNOWN = "\u2047"


class Symbols:
    """One id per character, or per symbol between white space. Text is put into NFC.

    decode(encode(x)) == x for all x in NFC (and lower case, where that is set) whose symbols are
    in the vocabulary; for symbols, with one space between them and none around.
    """

    features = 0

    def __init__(self, kind: str, symbols: Sequence[str], *, lowercase: bool = False) -> None:
        self.kind, self.lowercase = kind, lowercase
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

    @property
    def folds_case(self) -> bool:
        """True if decoded text has lost its capitals."""
        return self.lowercase

    def _content(self) -> dict[str, Any]:
        content = {"kind": self.kind, "normalization": "NFC", "symbols": list(self.symbols)}
        return {**content, "lowercase": True} if self.lowercase else content

    def encode(self, text: str) -> list[int]:
        """Return ids without BOS and EOS; unknown symbols become UNK."""
        known = self._ids
        parts = _parts(self.kind, text, lowercase=self.lowercase)
        return [known.get(symbol, UNK) for symbol in parts]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def flat(self, items: Sequence[str]) -> Flat:
        """Return the ids of `encode_many`, EOS after each text."""
        return flattened(self.encode_many(items))

    def decode(self, ids: Iterable[int]) -> str:
        """Return text of ids, without PAD, BOS and EOS."""
        names = [self._names[i] for i in real_ids(ids)]
        return ("" if self.kind == "characters" else " ").join(names)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return the symbol of each id; `<s>`, `</s>` for BOS and EOS."""
        named = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
        return [named.get(i) or self._names[i] for i in map(int, ids)]

    def save(self, folder: Path, name: str) -> None:
        """Write `name.json`."""
        content = json.dumps(self._content(), ensure_ascii=False, indent=0)
        write_file(folder / f"{name}.json", content + "\n")


# Ids 0-3 of a text tokenizer are PAD, BOS, EOS and UNK.
TextTokenizer = Symbols | SentencePiece
# Encoder of a source side: texts -> ids, or tuples of paths of recordings -> frames.
SourceEncoder = TextTokenizer | Filterbank


def _parts(kind: str, text: str, *, lowercase: bool) -> Sequence[str]:
    text = unicodedata.normalize("NFC", text.lower() if lowercase else text)
    return text if kind == "characters" else text.split()


def train_tokenizer(config: Tokenizer, texts: Iterable[str]) -> TextTokenizer:
    """Learn a vocabulary. The same texts in the same order give the same bytes.

    Args:
        config: the kind; `vocab_size`, `normalization`, `byte_fallback` and `shrink` matter to
            bpe and unigram only.
        texts: training texts of one side, or of both for a joint vocabulary. SentencePiece holds
            them in memory, about 0.7 GB per million lines; symbols and characters are streamed.

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
    if config.kind in ("bpe", "unigram"):
        return train_pieces(config, stream)
    found: set[str] = set()
    for text in stream:
        found.update(_parts(config.kind, text, lowercase=config.lowercase))
    return Symbols(config.kind, sorted(found), lowercase=config.lowercase)


def train_source(config: Tokenizer | Frames, texts: Iterable[str]) -> SourceEncoder:
    """Learn a tokenizer, or make a filterbank, which needs no text.

    Raises:
        DataError: see `train_tokenizer`.
    """
    return Filterbank(config) if isinstance(config, Frames) else train_tokenizer(config, texts)


def load_source(folder: Path, name: str) -> SourceEncoder:
    """Read the files that `save` wrote.

    Raises:
        DataError: a file is absent or malformed.
    """
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_bytes())
        if content["kind"] == "frames":
            return load_filterbank(content)
        lowercase = bool(content.get("lowercase", False))
        if content["kind"] in ("symbols", "characters"):
            return Symbols(content["kind"], content["symbols"], lowercase=lowercase)
        path = folder / f"{name}.model"
        kind, normalization = content["kind"], content["normalization"]
        return SentencePiece(kind, normalization, path.read_bytes(), lowercase=lowercase)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the folder holds no tokenizer {name}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, ConfigError):
        raise DataError(f"{path}: not a tokenizer; prepare the data anew") from None


def load_tokenizer(folder: Path, name: str) -> TextTokenizer:
    """Read a text tokenizer, which every target has.

    Raises:
        DataError: see `load_source`; or the side is frames.
    """
    found = load_source(folder, name)
    if isinstance(found, Filterbank):
        raise DataError(f"{folder / name}.json: frames, not text; prepare the data anew")
    return found
