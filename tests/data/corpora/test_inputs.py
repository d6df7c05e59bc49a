"""Inputs: globs, archives, many files and object storage give what plain files give."""

import gzip
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vinedresser.config import Cleaning, Task, Tokenizer
from vinedresser.data.corpora.corpus import open_corpus, read
from vinedresser.data.corpora.kinds.lexicon import LexiconCorpus
from vinedresser.data.corpora.kinds.table import TableCorpus
from vinedresser.data.corpora.kinds.text import Pair, TextCorpus
from vinedresser.data.corpora.row import RowCounts
from vinedresser.data.shards import prepare
from vinedresser.errors import ConfigError, DataError, MachineError
from vinedresser.workspace.commit import verify

LINES = [(f"s{i} {'ab' * (i % 7)}", f"t{i} {'xy' * (i % 5)}") for i in range(60)]
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def packed(text: str, form: str) -> bytes:
    if form == "gzip":
        half = len(text) // 2  # several members, as `cat a.gz b.gz` makes them
        return b"".join(gzip.compress(part.encode()) for part in (text[:half], text[half:]))
    raw = text.encode()
    return pa.compress(raw, codec="zstd", asbytes=True) if form == "zstd" else raw


def side_of(rows, at: int) -> str:
    return "".join(row[at] + "\n" for row in rows)


def task_of(**pairs) -> Task:
    return Task(
        name="toy", corpus=TextCorpus(**pairs), tokenizer=Tokenizer(kind="characters"),
        metric="cer", cleaning=Cleaning(leakage="allow"),
    )  # fmt: skip


@pytest.fixture
def plain(tmp_path):
    """A task of plain files; train in one of them a side."""
    pairs = {}
    for split, rows in (("train", LINES[:40]), ("dev", LINES[40:50]), ("test", LINES[50:])):
        names = []
        for at, side in enumerate(("src", "tgt")):
            names.append(tmp_path / f"{split}.{side}")
            names[-1].write_text(side_of(rows, at))
        pairs[split] = Pair(source=str(names[0]), target=str(names[1]))
    return task_of(**pairs)


def shards_by_name(task, folder):
    shards = prepare(task, folder, executor="in_process")
    files = verify(shards.folder).files
    return {name: files[name] for name in files if name.endswith((".parquet", ".json"))}


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_archives_give_the_same_shards_and_leave_no_copy(plain, tmp_path, form):
    pairs = {}
    for split in ("train", "dev", "test"):
        names = []
        for side in ("src", "tgt"):
            names.append(tmp_path / f"{split}.{side}.packed")
            names[-1].write_bytes(packed((tmp_path / f"{split}.{side}").read_text(), form))
        pairs[split] = Pair(source=str(names[0]), target=str(names[1]))
    task = task_of(**pairs)
    assert list(read(task, "dev")) == list(read(plain, "dev"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vinedresser.data.corpora.row.BLOCK_ROWS", 7)
        assert shards_by_name(task, tmp_path / "a") == shards_by_name(plain, tmp_path / "b")
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_many_files_by_glob_and_by_list(plain, tmp_path):
    cuts = [0, 3, 4, 25, 40]
    for index in range(4):
        rows = LINES[cuts[index] : cuts[index + 1]]
        for at, side in enumerate(("src", "tgt")):
            (tmp_path / f"part-{index}.{side}").write_text(side_of(rows, at))
    by_list = tuple(str(tmp_path / f"part-{index}.tgt") for index in range(4))
    pair = Pair(source=str(tmp_path / "part-*.src"), target=by_list)
    corpus = plain.corpus.model_copy(update={"train": pair})
    task = plain.model_copy(update={"corpus": corpus})
    assert list(read(task, "train")) == list(read(plain, "train"))
    found, wanted = shards_by_name(task, tmp_path / "a"), shards_by_name(plain, tmp_path / "b")
    assert found == wanted
    assert Task.from_json(task.to_json(), where="test") == task


def test_a_drop_in_one_of_many_files_is_named_with_its_file(tmp_path, logged):
    for name, text in (("1.s", "a\n"), ("1.t", "x\n"), ("2.s", "b\n\nc\n"), ("2.t", "y\ny\nz\n")):
        (tmp_path / name).write_text(text)
    pair = Pair(source=str(tmp_path / "*.s"), target=str(tmp_path / "*.t"))
    prepare(task_of(train=pair, dev=pair), tmp_path / "out")
    assert any(f"1 empty (lines {tmp_path / '2.s'}:2 ...)" in line for line in logged.messages)


@pytest.mark.parametrize(
    ("source", "target", "part"),
    [
        ("none-*.s", "a.t", "none-*.s: no file of such a name"),
        ("?.s", "a.t", "train: 2 source files"),
    ],
)
def test_wrong_lists_of_files(tmp_path, source, target, part):
    for name in ("a.s", "b.s", "a.t"):
        (tmp_path / name).write_text("x\n")
    pair = Pair(source=str(tmp_path / source), target=str(tmp_path / target))
    with pytest.raises(DataError) as caught:
        read(task_of(train=pair, dev=pair), "train")
    assert part in str(caught.value)


@pytest.mark.fault("D11")
@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_d11_a_truncated_or_damaged_archive_is_refused(plain, tmp_path, form):
    path = tmp_path / "train.src"
    whole = packed("".join(f"{zlib.crc32(str(i).encode())}\n" for i in range(3000)), form)
    flipped = whole[:100] + b"\xff\xff" + whole[102:]
    # pyarrow's zstd carries no checksum, unlike the zstd command's: only a cut shows.
    for damaged in (whole[:-7], whole[: len(whole) // 2], *([flipped] if form == "gzip" else [])):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            prepare(plain, tmp_path / "out")
        line = str(caught.value).splitlines()[0]
        assert f"train.src: {form} stream damaged or cut off at or before byte" in line
        assert not (tmp_path / "out").exists()


def test_credentials_in_a_path_are_refused():
    with pytest.raises(ConfigError, match="credentials inside a path are refused"):
        Task.from_json(
            {
                "name": "t", "metric": "bleu", "tokenizer": {"kind": "characters"},
                "corpus": {split: {"source": "s3://key:secret@b/x", "target": "y"}
                           for split in ("train", "dev")},
            },
            where="test",
        )  # fmt: skip


@pytest.fixture(scope="module")
def s3():
    """A real S3 server on loopback: (query for URIs, its file system)."""
    server = pytest.importorskip("moto.server")
    from pyarrow import fs

    with pytest.MonkeyPatch.context() as environment:
        for key, value in KEYS.items():
            environment.setenv(key, value)
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        store = fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
        )
        store.create_dir("corpora")
        yield f"?endpoint_override={host}:{port}&scheme=http", store
        running.stop()


def test_object_storage_gives_the_same_shards(plain, tmp_path, s3):
    query, store = s3
    pairs = {}
    for split in ("train", "dev", "test"):
        for side in ("src", "tgt"):
            text = (tmp_path / f"{split}.{side}").read_text()
            lines = text.split("\n")[:-1]
            for part, form in ((lines[:4], "plain"), (lines[4:], "gzip")):
                name = f"corpora/deep/{split}-{form != 'plain':d}.{side}"
                with store.open_output_stream(name) as stream:
                    stream.write(packed("\n".join([*part, ""]), form))
        one, other = (f"s3://corpora/deep/{split}-*.{side}{query}" for side in ("src", "tgt"))
        pairs[split] = Pair(source=one, target=other)
    task = task_of(**pairs)
    account = RowCounts()
    assert list(read(task, "train", counts=account)) == list(read(plain, "train"))
    assert account.rows_in == 40
    assert len(open_corpus(task).digests) == 12
    found, wanted = shards_by_name(task, tmp_path / "a"), shards_by_name(plain, tmp_path / "b")
    assert found == wanted


def test_object_storage_holds_tables_and_dictionaries_too(tmp_path, s3):
    query, store = s3
    words = "".join(f"w{i} W AH0 D\n" for i in range(9))
    sides = {"src": [f"a{i}" for i in range(30)], "tgt": [f"b{i}" for i in range(30)]}
    pq.write_table(pa.table(sides), tmp_path / "a.parquet")
    for name, content in (
        ("a.dict", words.encode()), ("a.parquet", (tmp_path / "a.parquet").read_bytes()),
    ):  # fmt: skip
        with store.open_output_stream(f"corpora/{name}") as stream:
            stream.write(content)
    found = f"s3://corpora/a.parquet{query}"
    table = TableCorpus(kind="table", train=found, dev=found, source="src", target="tgt")
    kinds = {
        side: Tokenizer(kind="characters") for side in ("source_tokenizer", "target_tokenizer")
    }
    rows = list(read(Task(name="t", corpus=table, metric="per", **kinds), "train"))
    assert [(row.source, row.target) for row in rows] == list(zip(*sides.values(), strict=True))
    corpus = LexiconCorpus(path=f"s3://corpora/a.dict{query}", dev_words=2, test_words=2)
    rows = list(read(Task(name="t", corpus=corpus, metric="per", **kinds), "train"))
    assert len(rows) == 5
    assert {row.target for row in rows} == {"W AH D"}


def test_what_object_storage_answers_is_told_in_one_line(s3):
    query, _ = s3
    for name, error, part in (
        (f"s3://corpora/absent.src{query}", DataError, "absent.src"),
        (f"s3://corpora/absent-*.src{query}", DataError, "no file of such a name"),
        ("s3://corpora/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1",
         MachineError, "does not answer"),
    ):  # fmt: skip
        pair = Pair(source=name, target=name)
        with pytest.raises(error) as caught:
            read(task_of(train=pair, dev=pair), "train")
        assert part in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.ray
def test_workers_read_object_storage_by_themselves(plain, tmp_path, s3, local_ray):
    query, store = s3
    pairs = {}
    for split in ("train", "dev", "test"):
        for side in ("src", "tgt"):
            with store.open_output_stream(f"corpora/ray-{split}.{side}") as stream:
                stream.write((tmp_path / f"{split}.{side}").read_bytes())
        one, other = (f"s3://corpora/ray-{split}.{side}{query}" for side in ("src", "tgt"))
        pairs[split] = Pair(source=one, target=other)
    shards = prepare(task_of(**pairs), tmp_path / "ray", executor="ray")
    assert (
        verify(shards.folder).files["train-00000.parquet"]
        == (shards_by_name(plain, tmp_path / "plain")["train-00000.parquet"])
    )
