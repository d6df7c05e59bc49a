"""Multi30k German-English as the benchmarks use it: a joint BPE of 8,000 pieces, BLEU."""

import itertools
import os
import sys
from pathlib import Path

from vinedresser.config import Task, Tokenizer
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus

_DEFAULT = Path(__file__).parents[3] / "shared/data/multi30k"


def multi30k(*, dev: str = "val", test: str | None = None) -> Task:
    """The task, read from the folder that the variable MULTI30K names, or ../shared/data/multi30k.

    Args:
        dev: files that stand for the dev split, without ending.
        test: those of the test split, if one is wanted.

    Raises:
        SystemExit: the folder is not there; exit code 3.
    """
    folder = Path(os.environ.get("MULTI30K", _DEFAULT))
    if not folder.is_dir():
        print(f"{folder}: Multi30k is not here. Fix: set MULTI30K to its folder", file=sys.stderr)
        raise SystemExit(3)

    def pair(name: str) -> Pair:
        return Pair(source=str(folder / f"{name}.de"), target=str(folder / f"{name}.en"))

    return Task(
        name="multi30k",
        corpus=TextCorpus(train=pair("train"), dev=pair(dev), test=test and pair(test)),
        tokenizer=Tokenizer(kind="bpe", vocab_size=8000),
        metric="bleu",
    )


def tiled(task: Task, folder: Path, pairs: int) -> Task:
    """The task with so many train pairs: its own, again and again, as PAIRS.de and .en."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"name": f"{task.name}-tiled"}
    for side, ending in (("source", "de"), ("target", "en")):
        lines = Path(getattr(task.corpus.train, side)).read_bytes().splitlines(keepends=True)
        path = folder / f"{pairs}.{ending}"
        with path.open("wb") as stream:
            stream.writelines(itertools.islice(itertools.cycle(lines), pairs))
        changes[f"corpus.train.{side}"] = str(path)
    return task.override(changes)
