"""A pronunciation dictionary as a corpus: spelling -> phones, split by a hash of the word."""

import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from vinedresser.config.corpus import CorpusConfig, DataPath
from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.corpus import Corpus
from vinedresser.data.corpora.inputs import is_remote, locate
from vinedresser.data.corpora.row import EntryBlock, Row
from vinedresser.data.corpora.textfile import inspect_all, lines_of, refuse
from vinedresser.errors import DataError

_VARIANT = re.compile(r"(.+)\(\d+\)")
_STRESS = "012"

Entries = list[tuple[Row, str]]


class LexiconCorpus(CorpusConfig):
    """A pronunciation dictionary in CMUdict's format: `word PH1 PH2`, `word(2)` a variant.

    Source is the spelling, target the phones. Dev and test words are drawn by a hash of the word
    and `split_seed`, so that they stay in their split when the dictionary grows.
    """

    kind: Literal["lexicon"] = "lexicon"
    # A file, or `package:NAME/FILE` for a file inside an installed Python package.
    path: DataPath
    # First columns of these files are words that no split may contain (public test lists).
    exclude: tuple[DataPath, ...] = ()
    # True: an absent exclusion list is skipped with a note; False: it is refused.
    exclude_missing_ok: bool = False
    # `all`: every pronunciation of a train word is a train row; `first`: the first alone. Dev and
    # test words are scored against their first.
    variants: Literal["first", "all"] = "first"
    dev_words: PositiveInt = 2000
    test_words: NonNegativeInt = 2000
    # 0 takes all remaining words.
    train_words: NonNegativeInt = 0
    keep_stress: bool = False
    split_seed: int = 1

    def open(self, task: Task) -> "Lexicon":
        """See `CorpusConfig.open`."""
        return Lexicon(self, task)


@functools.lru_cache(maxsize=2)  # a worker parses the dictionary once, not once per block
def _entries_of_splits(
    corpus: LexiconCorpus, path: str, lists: tuple[str, ...], digest: str
) -> dict[str, Entries]:
    """Map each split to its rows and the reasons to drop them; rows of no split are train's."""
    assert digest
    # In lower case: a list and a dictionary may differ in case.
    excluded = frozenset(
        first[0].lower()
        for name in lists
        for line in lines_of(name)
        if (first := line.split(maxsplit=1))
    )
    entries, problems, seen = list[tuple[Row, str]](), [], set[str]()
    for number, text in enumerate(lines_of(path), 1):
        if text.startswith(";;;") or not (fields := text.split("#", 1)[0].split()):
            continue
        variant = _VARIANT.fullmatch(fields[0])
        word, phones = variant[1] if variant else fields[0], fields[1:]
        if not corpus.keep_stress:
            phones = [phone.rstrip(_STRESS) for phone in phones]
        if not phones or not all(phones):
            problems.append(
                f"{path}:{number}: {fields[0]!r} has no phones or an empty one; expected WORD PH PH"
            )
        is_excluded = word.lower() in excluded
        reason = "variant" if variant or word in seen else "excluded" if is_excluded else ""
        if not variant:  # a variant may precede its word
            seen.add(word)
        entries.append((Row(word, " ".join(phones), number), reason))
    refuse(problems, path)
    split_of = _split_words(
        [str(found.source) for found, reason in entries if not reason], corpus, path
    )
    splits: dict[str, Entries] = {"train": [], "dev": [], "test": []}
    kept = set[tuple[str, str]]()
    for found, reason in entries:
        word, split = str(found.source), split_of.get(str(found.source), "")
        if not reason and split:
            splits[split].append((found, ""))
        elif not reason:
            splits["train"].append((found, "beyond_train_words"))
        else:
            # Without stress, several pronunciations of a word can be equal.
            is_new = split == "train" and (word, found.target) not in kept
            is_kept = reason == "variant" and corpus.variants == "all" and is_new
            reason = "" if is_kept else reason
            splits["train"].append((found, reason))
        if not reason:
            kept.add((word, found.target))
    return splits


def _split_words(words: list[str], corpus: LexiconCorpus, path: str) -> dict[str, str]:
    """Map each word to its split, drawn by its hash; "" for words beyond `train_words`."""
    held = corpus.dev_words + corpus.test_words
    if len(words) <= held:
        raise DataError(
            f"{path}: {len(words)} words left for {corpus.dev_words} dev, "
            f"{corpus.test_words} test and some train words. Fix: lower dev_words, test_words"
        )

    def rank(word: str) -> bytes:
        return hashlib.sha256(f"{corpus.split_seed}:{word}".encode()).digest()

    words = sorted(words, key=rank)
    last = held + corpus.train_words if corpus.train_words else len(words)
    return {
        **dict.fromkeys(words[last:], ""),
        **dict.fromkeys(words[held:last], "train"),
        **dict.fromkeys(words[corpus.dev_words : held], "test"),
        **dict.fromkeys(words[: corpus.dev_words], "dev"),
    }


def parse_entries(
    split: str, corpus: LexiconCorpus, path: str, lists: tuple[str, ...], digest: str
) -> Entries:
    """Return a split's rows in the dictionary's order, each with the reason to drop it or ""."""
    return _entries_of_splits(corpus, path, lists, digest)[split]


class Lexicon(Corpus):
    """A `LexiconCorpus` whose files exist and are text. Its splits share no word."""

    def __init__(self, corpus: LexiconCorpus, task: Task) -> None:
        del task
        path, *lists = (
            name if is_remote(name) else str(locate(name))
            for name in (corpus.path, *corpus.exclude)
        )
        paths = dict(zip(corpus.exclude, lists, strict=True))
        absent = sorted(
            name for name, path in paths.items() if not is_remote(path) and not Path(path).exists()
        )
        if absent and not corpus.exclude_missing_ok:
            raise DataError(
                "\n".join(
                    f"{name}: no such exclusion list. Fix: name one that exists, or set "
                    "exclude_missing_ok=true to train on its words too"
                    for name in absent
                )
            )
        present = {name: each for name, each in paths.items() if name not in absent}
        super().__init__(inspect_all([path, *present.values()]))
        digest = "".join(self.digests.values())
        named = {corpus.path: path, **present}
        self.digests = {name: self.digests[each] for name, each in named.items()}
        self._corpus = corpus
        self._arguments = (corpus, path, tuple(present.values()), digest)
        self.notes += [f"{name}: exclusion list absent, passed over" for name in absent]
        self.splits = ("train", "dev", *(["test"] if corpus.test_words else []))

    def content(self) -> Any:
        """Return the settings, and the digests of the files that exist."""
        plain = self._corpus.to_json()
        plain["path"] = self.digests[self._corpus.path]
        # An absent list counts as none.
        lists = [name for name in self._corpus.exclude if name in self.digests]
        plain["exclude"] = [self.digests[name] for name in lists]
        del plain["exclude_missing_ok"]
        return plain

    def blocks(self, split: str) -> Iterator[EntryBlock]:
        """Yield the entries of a split in the dictionary's order; dropped ones belong to train."""
        arguments = (split, *self._arguments)
        return EntryBlock.cut(split, parse_entries, arguments, row.BLOCK_ROWS)
