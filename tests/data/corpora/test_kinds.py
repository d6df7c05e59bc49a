"""A new kind of corpus is one file: its configuration class and its reader."""

import sys

from vinedresser.config import Task
from vinedresser.config.corpus import CORPORA, CorpusConfig
from vinedresser.config.kinds import kind_class, kinds
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import open_shards, prepare

COUNTING = """
from dataclasses import dataclass
from typing import Literal
from vinedresser.config.corpus import CorpusConfig
from vinedresser.data.corpora.row import Block, Row


class CountingCorpus(CorpusConfig):
    kind: Literal["my_corpora.counting"]
    rows: int

    def open(self, task):
        return Counting(self)


@dataclass(frozen=True)
class CountingBlock(Block):
    def rows(self, counts):
        for line in range(1, self.count + 1):
            counts.rows_in += 1
            yield Row(" ".join(map(str, range(line))), str(line), line)


class Counting:
    is_parallel, splits = False, ("train", "dev")

    def __init__(self, config):
        self.rows, self.digests, self.notes = config.rows, {}, []

    def content(self):
        return {"kind": "counting", "rows": self.rows}

    def blocks(self, split):
        yield CountingBlock(split, 0, self.rows)

    def unpack(self, folder): ...

    def refuse_changed(self): ...

    def place(self, split, line):
        return str(line)
"""


def test_a_kind_is_one_file(tmp_path, monkeypatch):
    package = tmp_path / "my_corpora"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VINEDRESSER_PACKAGES", "my_corpora")
    plain = {
        "name": "counting", "metric": "per", "tokenizer": {"kind": "symbols"},
        "corpus": {"kind": "my_corpora.counting", "rows": 7},
    }  # fmt: skip
    task = Task.from_json(plain)
    assert Task.from_json(task.to_json()) == task
    assert task.override({"corpus.rows": 9}).corpus.rows == 9
    shards = prepare(task, tmp_path / "out", executor="in_process")
    assert shards.counts == {"train": 7, "dev": 7}
    assert load_split(shards, "dev").references[2] == "3"
    assert open_shards(shards.folder).task == task


def test_each_kind_has_one_class_with_its_name():
    assert kinds(CORPORA) == ["digits", "lexicon", "speech", "table", "text"]
    for kind in kinds(CORPORA):
        found = kind_class(CORPORA, kind, CorpusConfig)
        assert found.model_fields["kind"].annotation.__args__ == (kind,)
        assert found.open is not CorpusConfig.open


def test_configuration_is_light(root):
    import subprocess

    code = "import vinedresser.config, sys; print({'numpy', 'pyarrow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
