"""Code of a submitted job: the files of a folder in one zip file, and their digest."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

from vinedresser.errors import ConfigError

# Ray stores the package in the memory of the head node and refuses more than 500 MB.
_LIMIT_MB = 50

# Folders without code; those whose name begins with a dot are others.
_NO_CODE = {
    "__pycache__", "build", "dist", "mlruns", "node_modules", "site-packages", "venv", "workspace",
}  # fmt: skip


def pack(folder: Path, target: Path) -> str:
    """Write the code of a folder to a zip file; return the digest of names and contents.

    Raises:
        ConfigError: the code is larger than a package may be.
    """
    files = code_files(folder)
    sizes = {file: file.stat().st_size for file in files}
    if (total := sum(sizes.values())) > _LIMIT_MB * 1e6:
        largest = sorted(files, key=sizes.__getitem__, reverse=True)[:3]
        named = ", ".join(f"{f.relative_to(folder)} ({sizes[f] / 1e6:.1f} MB)" for f in largest)
        raise ConfigError(
            f"{folder}: {total / 1e6:.0f} MB of code in {len(files)} files, at most {_LIMIT_MB} MB "
            f"are sent; the largest: {named}; keep data elsewhere, or list it in .gitignore"
        )
    digest = hashlib.sha256()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            name, content = file.relative_to(folder).as_posix(), file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            # A fixed time: equal code gives an equal file, which Ray then stores once.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return digest.hexdigest()


def code_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are code, sorted: in a git checkout, those not ignored.

    Hidden files (.git, .venv, .env, caches), folders of results and of virtual environments and
    links to folders are never code.
    """
    listed, found = _listed_by_git(folder), []
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if _is_code(name) and not Path(parent, name, "pyvenv.cfg").exists()
        ]
        found += [Path(parent, name) for name in names if _is_code(name)]
    return sorted(file for file in found if file.is_file() and (listed is None or file in listed))


def _is_code(name: str) -> bool:
    """Return whether a file or folder of this name may be code."""
    return not (name.startswith(".") or name in _NO_CODE or name.endswith((".egg-info", ".pyc")))


def _listed_by_git(folder: Path) -> set[Path] | None:
    """Return the files that git tracks or would add; None outside a checkout or without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return {folder / name for name in found.decode(errors="surrogateescape").split("\0") if name}
