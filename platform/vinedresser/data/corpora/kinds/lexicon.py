"""A pronunciation dictionary as a corpus: spelling -> phones, split by a hash of the word."""

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from vinedresser.config.corpus import CorpusConfig, DataPath
from vinedresser.config.task import Task
from vinedresser.data.corpora import row
from vinedresser.data.corpora.inputs import is_remote, locate
from vinedresser.data.corpora.row import Block, Row, RowCounts
from vinedresser.data.corpora.textfile import MAX_PROBLEMS, inspect_all, lines_of, refuse_changed
from vinedresser.errors import DataError

_VARIANT = re.compile(r"(.+)\(\d+\)")
_STRESS = "012"


class LexiconCorpus(CorpusConfig):
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

    def open(self, task: Task) -> "Lexicon":
        """See `CorpusConfig.open`."""
        return Lexicon(self, task)


def _named(path: str) -> str:
    """Return the name by which a dictionary or list is opened: a URI itself, else `locate`."""
    return path if is_remote(path) else str(locate(path))


@dataclass(frozen=True)
class Dictionary:
    """The entries of a dictionary and where each belongs; a pure function of the files.

    Attributes:
        corpus: the settings.
        path: the dictionary.
        lists: the exclusion lists that are there.
    """

    corpus: LexiconCorpus
    path: str
    lists: tuple[str, ...]

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Words of the lists, in lower case: a list and a dictionary may differ in case."""
        return frozenset(
            first[0].lower()
            for path in self.lists
            for line in lines_of(path)
            if (first := line.split(maxsplit=1))
        )

    @cached_property
    def entries(self) -> list[tuple[str, str, int, str]]:
        """(word, phones, line, reason to drop it or "") of every entry."""
        entries, problems, seen = [], [], set[str]()
        for number, text in enumerate(lines_of(self.path), 1):
            if text.startswith(";;;") or not (fields := text.split("#", 1)[0].split()):
                continue
            variant = _VARIANT.fullmatch(fields[0])
            word, phones = variant[1] if variant else fields[0], fields[1:]
            if not self.corpus.keep_stress:
                phones = [phone.rstrip(_STRESS) for phone in phones]
            if not phones or not all(phones):
                problems.append(
                    f"{self.path}:{number}: {fields[0]!r} has no phones or an empty one; "
                    "expected WORD PH PH"
                )
            reason = (
                "variant" if variant or word in seen
                else "excluded" if word.lower() in self.excluded
                else ""
            )  # fmt: skip
            if not variant:  # one may stand before its word
                seen.add(word)
            entries.append((word, " ".join(phones), number, reason))
        if problems:
            more = len(problems) - MAX_PROBLEMS
            tail = [f"{self.path}: {len(problems)} such lines in all"] * (more > 0)
            raise DataError("\n".join(problems[:MAX_PROBLEMS] + tail))
        return entries

    @cached_property
    def split_of(self) -> dict[str, str]:
        """Word -> its split, "" where `train_words` has no place for it."""
        corpus = self.corpus
        words = [word for word, _, _, reason in self.entries if not reason]
        if len(words) <= corpus.dev_words + corpus.test_words:
            raise DataError(
                f"{self.path}: {len(words)} words left for {corpus.dev_words} dev, "
                f"{corpus.test_words} test and some train words. Fix: lower dev_words, test_words"
            )

        def rank(word: str) -> bytes:
            return hashlib.sha256(f"{corpus.split_seed}:{word}".encode()).digest()

        words.sort(key=rank)
        dev, held = corpus.dev_words, corpus.dev_words + corpus.test_words
        last = held + corpus.train_words if corpus.train_words else len(words)
        places = dict.fromkeys(words, "")
        places.update(dict.fromkeys(words[held:last], "train"))
        places.update(dict.fromkeys(words[dev:held], "test"))
        places.update(dict.fromkeys(words[:dev], "dev"))
        return places

    @cached_property
    def members(self) -> dict[str, list[tuple[Row, str]]]:
        """Split -> its raw rows, each with the reason to drop it or ""; the rest is train's."""
        found: dict[str, list[tuple[Row, str]]] = {"train": [], "dev": [], "test": []}
        kept = set[tuple[str, str]]()
        for word, phones, line, reason in self.entries:
            place = self.split_of.get(word, "")
            is_first = not reason
            if not is_first and self.corpus.variants == "all" and reason == "variant":
                # Without stress, some pronunciations of a word are one and the same.
                is_new = place == "train" and (word, phones) not in kept
                reason = "" if is_new else "variant"
            entry = Row(word, phones, line)
            if not reason:
                kept.add((word, phones))
            if is_first and place:
                found[place].append((entry, ""))
            else:
                found["train"].append((entry, reason or ("" if place else "beyond_train_words")))
        return found


@dataclass(frozen=True)
class LexiconBlock(Block):
    """Some entries of a split.

    Attributes:
        first: raw rows of the split before it.
        dictionary: the files, as `Dictionary` takes them.
        digest: of the files, so that a changed file is parsed anew.
    """

    first: int
    dictionary: tuple[LexiconCorpus, str, tuple[str, ...]]
    digest: str

    def rows(self, account: RowCounts) -> Iterator[Row]:
        """Yield the entries that are kept."""
        members = _parsed(self.dictionary, self.digest).members[self.split]
        for entry, reason in members[self.first : self.first + self.count]:
            account.rows_in += 1
            if reason:
                account.drop(reason, entry.line)
            else:
                yield entry


# A worker parses the dictionary once, not once a block.
@functools.lru_cache(maxsize=2)
def _parsed(parts: tuple[LexiconCorpus, str, tuple[str, ...]], digest: str) -> Dictionary:
    assert digest
    return Dictionary(*parts)


class Lexicon:
    """A `LexiconCorpus` whose files exist and are text. Its splits share no word."""

    is_parallel = False

    def __init__(self, corpus: LexiconCorpus, task: Task) -> None:
        del task
        path = _named(corpus.path)
        lists = {name: _named(name) for name in corpus.exclude}
        absent = {
            name for name, path in lists.items() if not is_remote(path) and not Path(path).exists()
        }
        if absent and not corpus.exclude_missing_ok:
            raise DataError(
                "\n".join(
                    f"{name}: no such exclusion list. Fix: name one that exists, or set "
                    "exclude_missing_ok=true to train on its words too"
                    for name in sorted(absent)
                )
            )
        present = tuple(each for name, each in lists.items() if name not in absent)
        self._facts = inspect_all([path, *present])
        named = {corpus.path: path, **lists}
        self.digests = {
            name: self._facts[each].digest for name, each in named.items() if name not in absent
        }
        self._corpus, self._parts = corpus, (corpus, path, present)
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.notes += [f"{name}: exclusion list absent, passed over" for name in sorted(absent)]
        self.splits = ("train", "dev", *(["test"] if corpus.test_words else []))

    def content(self) -> Any:
        """Return the settings, and the digests of the files that are there."""
        plain = self._corpus.to_json()
        plain["path"] = self.digests[self._corpus.path]
        # An absent list is as good as none.
        lists = [name for name in self._corpus.exclude if name in self.digests]
        plain["exclude"] = [self.digests[name] for name in lists]
        del plain["exclude_missing_ok"]
        return plain

    def blocks(self, split: str) -> Iterator[LexiconBlock]:
        """Yield the entries of a split in the dictionary's order; dropped ones belong to train."""
        digest = "".join(facts.digest for facts in self._facts.values())
        total = len(_parsed(self._parts, digest).members[split])
        for number, first in enumerate(range(0, total, row.BLOCK_ROWS)):
            count = min(row.BLOCK_ROWS, total - first)
            yield LexiconBlock(split, number, count, first, self._parts, digest)

    def unpack(self, folder: Path) -> None:
        """Do nothing: a dictionary is read whole."""

    def refuse_changed(self) -> None:
        """Refuse files that were touched since they were inspected."""
        refuse_changed(self._facts.values())

    def place(self, split: str, line: int) -> str:  # noqa: ARG002 - the one dictionary
        """Return the dictionary's line."""
        return str(line)
