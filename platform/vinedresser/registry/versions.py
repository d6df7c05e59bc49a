"""Versions of registered models: found by URI, downloaded and verified, with their scores."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vinedresser.errors import ConfigError, DamagedError, DataError, MachineError
from vinedresser.metrics import METRICS
from vinedresser.tracking.store import (
    ABSENT,
    Store,
    is_reachable,
    none_if,
    open_client,
    server_errors,
)
from vinedresser.workspace.commit import Manifest, verify
from vinedresser.workspace.layout import BundleFolder
from vinedresser.workspace.storage import POSIX, parsed_object

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
DIGEST_TAG, SCORES_TAG = "vinedresser.bundle", "vinedresser.scores"
# Characters of a version's tag, on every database that MLflow takes.
MAX_VERSION_TAG = 5000


def read_scores(bundle: Path) -> dict[str, Any]:
    """Return a bundle's `scores.json`.

    Raises:
        DataError: absent, not JSON, or without a `metric` that is known.
    """
    path = BundleFolder(bundle).scores
    if not path.is_file():
        raise DataError(f"{path}: missing; score the model before it is exported")
    scores = parsed_object(POSIX.read(path))
    if scores.get("metric") not in METRICS:
        raise DataError(
            f"{path}: expected JSON with `metric`, one of {', '.join(METRICS)}; score it again"
        )
    return scores


def is_made(store: Store) -> bool:
    """Return whether a store is a server, or a database that exists."""
    file = store.uri.removeprefix("sqlite:///")
    return file == store.uri or Path(file).exists()


@contextlib.contextmanager
def opened_registry(store: Store) -> Iterator["MlflowClient"]:
    """Return a client of a registry that answers; its errors become MachineError."""
    if not is_reachable(store):
        raise MachineError(
            f"tracking store {store.shown}: does not answer; start it and run the same command"
        )
    client = open_client(store)
    with server_errors(store):
        yield client


def every(search: Callable[..., Any]) -> Iterator[Any]:
    """Return the results of all pages of a search of MLflow's client."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def registered_bundles(store: Store) -> dict[str, list[str]]:
    """Return digest of a bundle -> its names in the registry: `NAME@ALIAS`, `NAME/VERSION`.

    Raises:
        MachineError: the registry does not answer.
    """
    found: dict[str, list[str]] = {}
    if not is_made(store):
        return found
    with opened_registry(store) as client:
        aliases = [
            (model.name, int(version), f"{model.name}@{alias}")
            for model in every(client.search_registered_models)
            for alias, version in sorted(model.aliases.items())
        ]
        for version in every(client.search_model_versions):
            key = version.name, int(version.version)
            names = [f"{version.name}/{version.version}"]
            names += [name for model, number, name in aliases if (model, number) == key]
            if digest := version.tags.get(DIGEST_TAG):
                found.setdefault(digest, []).extend(names)
    return found


def registered_digest(version: "ModelVersion") -> str:
    """Return the digest that a version was registered with; it becomes a folder's name."""
    digest = str(version.tags.get(DIGEST_TAG, ""))
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"models:/{version.name}/{version.version}: not registered by `export`")
    return digest


@contextlib.contextmanager
def downloaded(
    client: "MlflowClient", store: Store, version: "ModelVersion", parent: Path | None = None
) -> Iterator[Manifest]:
    """Download a version's bundle into a temporary folder and check it.

    Args:
        client: of the store.
        store: registry and tracking.
        version: which.
        parent: folder of the temporary folder.

    Raises:
        DamagedError: files missing, changed, or not those that were registered.
        DataError: the version was not registered by `register`.
    """
    from mlflow.artifacts import download_artifacts

    where, expected = f"models:/{version.name}/{version.version}", registered_digest(version)
    source = client.get_model_version_download_uri(version.name, version.version)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as temporary:
        # The bundle is the only folder in there, under the name that its folder had.
        folders = none_if(
            ABSENT,
            lambda: download_artifacts(
                artifact_uri=f"{source.rstrip('/')}/artifacts",
                dst_path=temporary,
                tracking_uri=store.uri,
            ),
        )
        found = next(Path(folders).iterdir(), None) if folders else None
        if found is None:
            raise DamagedError(f"{where}: its files are gone; register the bundle again")
        try:
            manifest = verify(found)
        except DamagedError as error:
            raise DamagedError(f"{where}, as downloaded: {error.args[0]}") from None
        if manifest.digest != expected:
            raise DamagedError(
                f"{where}: holds bundle {manifest.digest[:12]}, {expected[:12]} was registered"
            )
        yield manifest


def version_with_alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """Return the version that an alias is on; None if there is none."""
    return none_if(ABSENT, lambda: client.get_model_version_by_alias(name, alias))


def find_version(client: "MlflowClient", uri: str) -> "ModelVersion":
    """Return the version behind `models:/name@alias` or `models:/name/3`."""
    match = re.fullmatch(r"models:/([A-Za-z0-9][\w.-]*)(?:@([\w-]+)|/(\d+))", uri)
    if match is None:
        raise ConfigError(f"{uri}: expected models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    versions = {str(one.version): one for one in client.search_model_versions(f"name = '{name}'")}
    if not versions:
        names = sorted({one.name for one in client.search_model_versions()})
        raise ConfigError(f"{uri}: no model {name}; there are {', '.join(names) or 'none'}")
    if alias is None and number in versions:
        return versions[number]
    found = version_with_alias(client, name, alias) if alias else None
    if found is None:
        aliases = sorted(client.get_registered_model(name).aliases)
        known = ", ".join(sorted(versions, key=int)[-10:])
        raise ConfigError(f"{uri}: {name} has versions {known}; aliases {', '.join(aliases)}")
    return found
