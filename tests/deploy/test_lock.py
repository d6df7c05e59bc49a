"""The locks of the image agree with the versions that the tests pass with."""

import re
import tomllib
from pathlib import Path


def test_the_lock_has_every_requirement_in_its_tested_version(root: Path) -> None:
    lines = (root / "deploy/requirements.lock").read_text().splitlines()
    found = [re.fullmatch(r"([a-z0-9._-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", x) for x in lines]
    assert all(found), "a line without version or hash"
    locked = {plain(m[1]): m[2] for m in found if m}
    assert len(locked) == len(lines)
    tested = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        tested[plain(name)] = version
    assert {n: v for n, v in locked.items() if n in tested and tested[n] != v} == {}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["demo"], *extras["speech"], *extras["schedule"]]
    names = {plain(re.split(r"[\[<>=]", each)[0]) for each in wanted}
    assert names - set(locked) == set()


def plain(name: str) -> str:
    """Return the name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
