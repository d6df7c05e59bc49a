"""Write the locks of the image: deploy/requirements.lock and deploy/build.lock.

`make lock` runs it on x86-64 Linux with Python 3.11. Versions are those of constraints.txt; the
newest of packages that it does not list (CUDA, for torch from PyPI).
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = {
    "requirements.lock": [f"{ROOT}[demo,schedule,speech]"],
    "build.lock": ["hatchling>=1.27"],
}


def locked(requirements: list[str]) -> str:
    """Return one line per package, as pip would install them from PyPI alone."""
    # Without variables and settings: a local index would give other wheels, and other hashes.
    command = [
        sys.executable, "-m", "pip", "--isolated", "install", "--index-url", "https://pypi.org/simple",
        "--dry-run", "--ignore-installed", "--quiet", "--report", "-",
        "--constraint", str(ROOT / "constraints.txt"), *requirements,
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    lines = []
    for package in report["install"]:
        name, version = (package["metadata"][key] for key in ("name", "version"))
        if name != "vinedresser":
            digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name.lower()}=={version} --hash=sha256:{digest}\n")
    return "".join(sorted(lines))


if __name__ == "__main__":
    for name, requirements in LOCKS.items():
        (ROOT / "deploy" / name).write_text(locked(requirements))
