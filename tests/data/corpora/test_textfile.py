"""Large text files are inspected once as long as they stay what they are."""

import os
from pathlib import Path

import pytest

from vinedresser.data.corpora import textfile
from vinedresser.data.corpora.textfile import inspect_all


def test_a_large_file_is_inspected_again_only_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(textfile, "REMEMBERED_BYTES", 10)
    inspected, inspect = list[str](), textfile.inspect_text
    monkeypatch.setattr(
        textfile, "inspect_text", lambda name: (inspected.append(name), inspect(name))[1]
    )
    file, small = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one\ntwo\nthree\n")
    small.write_text("one\n")
    names = [str(file), str(small)]
    first = inspect_all(names)
    assert inspect_all(names) == first
    assert inspected == 2 * names  # a file that changed a moment ago is not remembered
    monkeypatch.setattr(textfile, "_SETTLED_NS", -(10**18))
    inspect_all(names)
    inspected.clear()
    assert inspect_all(names) == first
    assert inspected == [str(small)]
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("ONE\ntwo\nthree\n")
    os.utime(file, ns=times)  # of equal size and time; the time of the inode cannot be set
    inspected.clear()
    assert inspect_all(names) != first
    assert inspected == names
