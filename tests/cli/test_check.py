"""`check` as a user meets it: the table, the exit code, and what is left behind."""

import importlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vinedresser.data.shards import ShardSet

pytestmark = pytest.mark.usefixtures("one_thread")

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Iterator[Main]:
    from vinedresser.cli import main as run

    monkeypatch.chdir(tmp_path)
    for key in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "VINEDRESSER_DEBUG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("VINEDRESSER_WORKSPACE", str(tmp_path / "space"))
    monkeypatch.setenv("COLUMNS", "120")
    before = signal.getsignal(signal.SIGTERM)

    def called(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        return run([str(word) for word in words]), *capfd.readouterr()

    yield called
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def file(tmp_path: Path, tiny_study: dict[str, Any]) -> Path:
    """An experiment as a file, on a corpus whose dev rows are in train."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_study["base"]))
    return path


@pytest.mark.slow
def test_a_failure_is_exit_code_4_and_nothing_is_left(
    main: Main, file: Path, tmp_path: Path, reversal: ShardSet
) -> None:
    code, out, err = main("check", file, "--json", "--price", "2")
    assert code == 4
    found = json.loads(out)
    assert found["passed"] is False
    rows = {row["name"]: row for row in found["checks"]}
    failed = {name for name, row in rows.items() if row["passed"] is False}
    assert failed == {"data"}
    assert reversal.meta["overlap"]["dev"]["pairs"] > 0
    assert "leakage=drop" in rows["data"]["pointer"]
    assert rows["time and cost"]["figures"]["price"] > 0
    assert "error" not in err
    # Shards, which `train` takes as they are, and nothing else.
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["shards"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space", "tiny.json"]


@pytest.mark.slow
def test_the_table_says_what_to_do(main: Main, file: Path) -> None:
    code, out, _ = main(
        "check", file, "optim.lr=1e5", "optim.clip_norm=1e5", "batch.max_padded_tokens=64"
    )
    assert code == 4
    lines = out.splitlines()
    assert lines[0] == "tiny: transformer on reversal"
    verdicts = {line.split("  ")[0]: line for line in lines}
    assert " ok " in verdicts["first loss"]
    assert " FAIL " in verdicts["conditioning"]
    pointer = next(line for line in lines if line.startswith("conditioning: "))
    assert "lower optim.lr" in pointer
    assert " failed in " in lines[-1]


def test_a_misspelt_key_is_no_check(main: Main, file: Path, tmp_path: Path) -> None:
    code, out, err = main("check", file, "optim.lrr=1")
    assert (code, out) == (2, "")
    assert "did you mean lr?" in err
    assert not (tmp_path / "space").exists()


def test_what_was_found_before_a_crash_is_shown(
    main: Main, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vinedresser.errors import MachineError

    def fails(*_args: object, **_options: object) -> None:
        raise MachineError("out of memory at 8 x 8 tokens")

    module = importlib.import_module("vinedresser.health.preflight.checks")
    monkeypatch.setattr(module, "check_memory", fails)
    code, out, err = main("check", file)
    assert code == 3
    assert "out of memory" in err
    assert "batch invariance" in out
    assert "data: " in out  # its pointer
    assert "failed in" not in out


@pytest.mark.parametrize("trials", [1, 6])
def test_of_a_study_the_time_is_said_to_be_of_one_trial(
    main: Main,
    trials: int,
    tiny_study: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vinedresser.health.preflight.check import CheckResult

    module = importlib.import_module("vinedresser.health.preflight.checks")
    found = [CheckResult("time", True, "1 h [bold]", "", pointer="[/] is no markup")]
    monkeypatch.setattr(module, "checks", lambda *_a, **_k: iter(found))
    (tmp_path / "study.json").write_text(json.dumps({**tiny_study, "num_trials": trials}))
    code, out, _ = main("check", "study.json")
    assert code == 0
    assert ("a sweep of 6 takes up to 6 times as much" in out) == (trials == 6)
    assert "1 h [bold]" in out
    assert "time: [/] is no markup" in out
    assert out.splitlines()[-1].startswith("all passed")
