from collections.abc import Callable
from pathlib import Path

import pytest

from vinedresser.config import Task, Tokenizer
from vinedresser.data.corpora.kinds.lexicon import LexiconCorpus
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus

WRITE = Callable[..., Task]


@pytest.fixture
def multi30k(shared_data: Path) -> Task:
    folder = shared_data / "multi30k"
    train, dev, test = (
        Pair(source=str(folder / f"{name}.de"), target=str(folder / f"{name}.en"))
        for name in ("train", "val", "test_2016_flickr")
    )
    corpus = TextCorpus(train=train, dev=dev, test=test)
    return Task(name="multi30k", corpus=corpus, tokenizer=Tokenizer(kind="bpe"), metric="bleu")


@pytest.fixture
def text_task(tmp_path: Path) -> WRITE:
    """Writes six files, of bytes by name, and returns the task that reads them."""

    def write(tokenizer: Tokenizer | None = None, **contents: bytes) -> Task:
        pairs = {}
        for split, many in (("train", 40), ("dev", 4), ("test", 4)):
            sides = {}
            for side, word in (("source", "ab"), ("target", "xyz")):
                path = tmp_path / f"{split}.{side}"
                lines = "".join(f"{split[1]}{i} {word * (1 + i % 5)}\n" for i in range(many))
                path.write_bytes(contents.get(f"{split}_{side}", lines.encode()))
                sides[side] = str(path)
            pairs[split] = Pair(**sides)
        return Task(
            name="toy",
            corpus=TextCorpus(**pairs),
            tokenizer=tokenizer or Tokenizer(kind="characters"),
            metric="bleu",
        )

    return write


@pytest.fixture
def lexicon_task(tmp_path: Path) -> WRITE:
    """Writes a dictionary and returns the task that reads it."""

    def write(text: str, **settings: object) -> Task:
        path = tmp_path / "words.dict"
        path.write_text(text, encoding="utf-8")
        settings = {"path": str(path), "dev_words": 2, "test_words": 2, **settings}
        return Task(
            name="words",
            corpus=LexiconCorpus.model_validate(settings),
            source_tokenizer=Tokenizer(kind="characters"),
            target_tokenizer=Tokenizer(kind="symbols"),
            metric="per",
        )

    return write


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of the package, from INFO on."""
    caplog.set_level("INFO", logger="vinedresser")
    return caplog
