"""Export: a bundle becomes a version in the registry, and the champion only through the gate.

A bundle is a committed folder whose `scores.json` says how well it decodes and on which
references. The alias `champion` is the one thing that readers follow. It moves last, after the
new version has been read back from the registry itself, so whatever fails before changes nothing.
"""

import contextlib
import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from vinedresser.config import SafeName
from vinedresser.errors import BusyError, ConfigError, DamagedError, DataError, MachineError
from vinedresser.registry.gate import Gate, Scores, Verdict, judge
from vinedresser.tracking import Store, initialise
from vinedresser.tracking.store import connect, is_reachable, locked, logger, server_errors
from vinedresser.workspace.commit import is_committed, quarantine, verify

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
SCORES = "scores.json"
BUNDLE = "bundle"
DIGEST_TAG, SCORES_TAG = "vinedresser.bundle", "vinedresser.scores"
# When and why a version became champion. One that has been is never promoted by `register`
# again: exporting the same bundle twice must not undo an operator's choice of another.
PROMOTED_TAG = "vinedresser.promoted"
LOCK_SECONDS = 60.0
# Of a version's tag, on every database that MLflow takes.
MAX_TAG = 5000
# Copied into every version and executed by MLflow's own server.
SERVED = Path(__file__).parent / "pyfunc.py"


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        is_champion: whether the alias `champion` is on this version now.
        reason: why it is or is not, with the numbers.
        already: whether the same bundle had been registered before.
        champion_version: the version that `champion` is on; None while there is none.
    """

    name: str
    version: int
    is_champion: bool
    reason: str
    already: bool
    champion_version: int | None


def read_scores(bundle: Path) -> dict[str, Any]:
    """A bundle's `scores.json`.

    Raises:
        DataError: absent, not JSON, or without `metric` and `lower_is_better`.
    """
    path = bundle / SCORES
    try:
        scores = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: missing; score the model before it is exported") from None
    except ValueError:
        raise DataError(f"{path}: not JSON; export the model again") from None
    is_named = isinstance(scores, dict) and isinstance(scores.get("metric"), str)
    if not is_named or not isinstance(scores.get("lower_is_better"), bool):
        raise DataError(f"{path}: `metric` and `lower_is_better` are wanted; score the model again")
    return dict(scores)


def _check_name(name: str) -> None:
    try:
        TypeAdapter(SafeName).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"model name {name!r}: letters, digits and ._- are wanted, a letter or digit first"
        ) from None


@contextlib.contextmanager
def _registry(store: Store) -> Iterator["MlflowClient"]:
    """A client of a registry that answers; its trouble becomes MachineError."""
    if not is_reachable(store):
        raise MachineError(
            f"tracking store {store.shown}: does not answer; start it and run the same command"
        )
    client = connect(store)
    with server_errors(store):
        yield client


def register(
    bundle: Path, *, name: str, store: Store, gate: Gate, run_id: str | None = None
) -> Registered:
    """Puts a bundle into the registry, and makes it champion if the gate agrees.

    The same bundle is registered once; a second call finishes what a killed one left open.

    Args:
        bundle: a committed folder with `scores.json`.
        name: registered model; letters, digits and `._-`.
        store: registry and tracking.
        gate: what promotion takes.
        run_id: the run that trained it, if tracked.

    Raises:
        DamagedError: the bundle, or what the registry gives back of it, fails its manifest.
        DataError: no usable `scores.json`.
        ConfigError: a name with other characters, or no such run.
        BusyError: another export of this name is at work, or changed the champion meanwhile.
        MachineError: the registry does not answer; nothing was promoted, the call can be repeated.
    """
    _check_name(name)
    digest, scores = verify(bundle).digest, read_scores(bundle)
    with _registry(store) as client, locked(store, f"model {name}", seconds=LOCK_SECONDS):
        _ensure_model(client, name)
        found = _sound_version(client, store, name, digest)
        version = found or _add(client, store, bundle, name, scores, run_id)
        newest = _alias(client, name, CHALLENGER)
        if newest is None or int(newest.version) < int(version.version):
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        if found is None:
            with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
                _download(client, store, version, Path(temporary))
        verdict = _promote(client, store, version, scores, gate)
        now = _alias(client, name, CHAMPION)
    return Registered(
        name=name,
        version=int(version.version),
        is_champion=verdict.promoted,
        reason=verdict.reason,
        already=found is not None,
        champion_version=int(now.version) if now else None,
    )


def _ensure_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _sound_version(
    client: "MlflowClient", store: Store, name: str, digest: str
) -> "ModelVersion | None":
    """The version that holds this bundle; one whose files are gone or changed does not count."""
    query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    for version in client.search_model_versions(query):
        try:
            with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
                _download(client, store, version, Path(temporary))
        except DamagedError as error:
            logger.warning("%s; registering the bundle anew", error.args[0])
        else:
            return version
    return None


def _add(
    client: "MlflowClient",
    store: Store,
    bundle: Path,
    name: str,
    scores: Scores,
    run_id: str | None,
) -> "ModelVersion":
    """Uploads the bundle as a logged model and makes a version of it; no alias is touched."""
    from mlflow.entities import LoggedModelOutput

    tags = {
        DIGEST_TAG: verify(bundle).digest,
        SCORES_TAG: json.dumps(scores, sort_keys=True)[:MAX_TAG],
    }
    model = client.create_logged_model(
        _experiment_of(client, store, run_id), name=name, source_run_id=run_id, tags=tags
    )
    with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
        folder = Path(temporary) / "model"
        _save(bundle, folder, model, run_id)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.create_model_version(
        name,
        # Neither `models:/<id>` nor, without a run, the id: a database store would look them up
        # in MLflow's process-wide tracking store, and create one in the working directory.
        source=model.artifact_location,
        run_id=run_id,
        tags=tags,
        model_id=model.model_id if run_id or store.is_server else None,
    )


def _experiment_of(client: "MlflowClient", store: Store, run_id: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return initialise(store)
    try:
        return str(client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ConfigError(f"no run {run_id} in {store.shown}; name another or none") from None


def _save(bundle: Path, folder: Path, model: Any, run_id: str | None) -> None:
    """Writes the MLflow model: pyfunc.py, the bundle, a signature; nothing is inferred."""
    import mlflow.pyfunc
    from mlflow.models import Model

    # MLflow keeps the folder's own name and refuses links, so a copy has the name that is fixed.
    copy = folder.parent / BUNDLE
    shutil.copytree(bundle, copy)
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            model_id=model.model_id,
            run_id=run_id,
        ),
        python_model=str(SERVED),
        artifacts={BUNDLE: str(copy)},
        pip_requirements=[
            f"vinedresser=={installed('vinedresser')}",
            f"mlflow=={installed('mlflow')}",
        ],
    )


def _digest_of(version: "ModelVersion") -> str:
    """The digest that a version was registered with; it becomes a folder's name."""
    digest = str(version.tags.get(DIGEST_TAG, ""))
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"models:/{version.name}/{version.version}: not registered by `export`")
    return digest


def _download(client: "MlflowClient", store: Store, version: "ModelVersion", folder: Path) -> Path:
    """Fetches a version's bundle under `folder` and checks it against manifest and registry.

    Raises:
        DamagedError: files missing, changed, or not those that were registered.
        DataError: the version was not registered by `register`.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    where = f"models:/{version.name}/{version.version}"
    expected = _digest_of(version)
    source = client.get_model_version_download_uri(version.name, version.version)
    try:
        got = download_artifacts(
            artifact_uri=f"{source.rstrip('/')}/artifacts/{BUNDLE}",
            dst_path=str(folder),
            tracking_uri=store.uri,
        )
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise DamagedError(f"{where}: its files are gone; register the bundle again") from None
    except FileNotFoundError:
        raise DamagedError(f"{where}: its files are gone; register the bundle again") from None
    try:
        found = verify(Path(got)).digest
    except DamagedError as error:
        raise DamagedError(f"{where}, as downloaded: {error.args[0]}") from None
    if found != expected:
        raise DamagedError(f"{where}: holds bundle {found[:12]}, {expected[:12]} was registered")
    return Path(got)


def _alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _promote(
    client: "MlflowClient", store: Store, version: "ModelVersion", scores: Scores, gate: Gate
) -> Verdict:
    """Judges a verified version and moves the alias, the last thing that is done."""
    name, number = version.name, version.version
    champion = _alias(client, name, CHAMPION)
    if champion is not None and int(champion.version) == int(number):
        return Verdict(True, "is the champion already")
    promoted = version.tags.get(PROMOTED_TAG)
    if champion is not None and promoted:
        return Verdict(
            False, f"was champion once ({promoted}); to bring it back move the alias by hand"
        )
    best = None if champion is None else _scores_of(client, store, champion)
    verdict = judge(scores, best, gate)
    if not verdict.promoted:
        return verdict
    # The registry has no compare-and-set; the workspace's lock does not reach other machines.
    now = _alias(client, name, CHAMPION)
    if (now and now.version) != (champion and champion.version):
        raise BusyError(f"{name}: the champion changed during the export; run it again")
    when = datetime.now(UTC).isoformat(timespec="seconds")
    client.set_registered_model_alias(name, CHAMPION, number)
    client.set_model_version_tag(name, number, PROMOTED_TAG, f"{when}: {verdict.reason}")
    return verdict


def _scores_of(client: "MlflowClient", store: Store, version: "ModelVersion") -> Scores:
    """A version's scores, from its verified bundle; the tag is for people and can be edited."""
    with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
        return read_scores(_download(client, store, version, Path(temporary)))


def _find(client: "MlflowClient", uri: str) -> "ModelVersion":
    """The version behind `models:/name@alias` or `models:/name/3`."""
    match = re.fullmatch(r"models:/([A-Za-z0-9][\w.-]*)(?:@([\w-]+)|/(\d+))", uri)
    if match is None:
        raise ConfigError(f"{uri}: models:/NAME@ALIAS or models:/NAME/VERSION is wanted")
    name, alias, number = match.groups()
    versions = {str(one.version): one for one in client.search_model_versions(f"name = '{name}'")}
    if not versions:
        names = sorted({one.name for one in client.search_model_versions()})
        raise ConfigError(f"{uri}: no model {name}; there are {', '.join(names) or 'none'}")
    if alias is None and number in versions:
        return versions[number]
    found = _alias(client, name, alias) if alias else None
    if found is None:
        aliases = sorted(client.get_registered_model(name).aliases)
        known = ", ".join(sorted(versions, key=int)[-10:])
        raise ConfigError(f"{uri}: {name} has versions {known}; aliases {', '.join(aliases)}")
    return found


def fetch(uri: str, *, store: Store, cache: Path) -> Path:
    """The verified local folder of a registered bundle, downloaded once per content.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        store: registry and tracking.
        cache: folder that keeps bundles under their digest.

    Raises:
        ConfigError: no such model, alias or version; says what there is.
        DamagedError: what the registry holds fails its manifest or its registered digest.
        MachineError: the registry does not answer.
    """
    with _registry(store) as client:
        version = _find(client, uri)
        target = cache / _digest_of(version)
        if is_committed(target):
            try:
                if verify(target).digest == target.name:
                    return target
            except DamagedError as error:
                logger.warning("%s; fetching it anew", error.args[0])
            quarantine(target)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary:
            got = _download(client, store, version, Path(temporary))
            # A second fetch that finishes later finds the same content in place.
            try:
                got.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        verify(target)
        return target
