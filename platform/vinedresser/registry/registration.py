"""Registration: a bundle becomes a version in the registry, and champion only through the gate.

A bundle is a committed folder whose `scores.json` holds its decoded scores and the digest of the
references. Readers follow the alias `champion`. It moves last, after the new version was read back
from the registry itself, so that a failure before changes nothing.
"""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from vinedresser.config import SafeName
from vinedresser.errors import BusyError, ConfigError, DamagedError, DataError, MachineError
from vinedresser.metrics import METRICS
from vinedresser.registry.gate import Decision, Gate, StoredScores, decide
from vinedresser.tracking.store import (
    ABSENT,
    EXISTS,
    Store,
    initialise,
    is_reachable,
    locked,
    none_if,
    open_client,
    server_errors,
)
from vinedresser.workspace.commit import Manifest, is_committed, quarantine, verify
from vinedresser.workspace.layout import BundleFolder
from vinedresser.workspace.storage import POSIX, make_folder, parsed_object

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)

Verdict = Literal["promoted", "kept", "unchanged"]

CHAMPION, CHALLENGER = "champion", "challenger"
BUNDLE = "bundle"
DIGEST_TAG, SCORES_TAG = "vinedresser.bundle", "vinedresser.scores"
# When and why a version became champion. One that has been is never promoted by `register`
# again: exporting the same bundle twice must not undo an operator's choice of another.
PROMOTED_TAG = "vinedresser.promoted"
# When and why a version did not become champion.
KEPT_TAG = "vinedresser.kept"
# Characters of a version's tag, on every database that MLflow takes.
_MAX_VERSION_TAG = 5000
# Copied into every version and executed by MLflow's own server.
PYFUNC = Path(__file__).parent / "pyfunc.py"


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        verdict: promoted: this call made it champion; kept: this call left the champion in place;
            unchanged: an earlier call had decided about the same bundle.
        is_champion: whether the alias `champion` is on this version now.
        reason: reason for the verdict, with the numbers.
        scores: the numbers that were compared: metric, split, challenger, champion; None where
            there is no number.
        already: whether the same bundle had been registered before.
        champion_version: version with the alias `champion`; None while there is none.
    """

    name: str
    version: int
    verdict: Verdict
    is_champion: bool
    reason: str
    scores: Mapping[str, Any]
    already: bool
    champion_version: int | None


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


def register(
    bundle: Manifest, *, name: str, store: Store, gate: Gate, run_id: str | None = None
) -> Registered:
    """Put a bundle into the registry, and make it champion if the gate agrees.

    The same bundle is registered once; a second call completes what a killed one left open.

    Args:
        bundle: a verified folder with `scores.json`.
        name: registered model; letters, digits and `._-`.
        store: registry and tracking.
        gate: conditions of promotion.
        run_id: the run that trained it, if tracked.

    Raises:
        DamagedError: what the registry returns of the bundle fails its manifest.
        DataError: no usable `scores.json`.
        ConfigError: a name with other characters, or no such run.
        BusyError: another export of this name is running, or changed the champion meanwhile.
        MachineError: the registry does not answer; nothing was promoted, the call can be repeated.
    """
    try:
        TypeAdapter(SafeName).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"model name {name!r}: expected letters, digits and ._-, a letter or digit first"
        ) from None
    scores = read_scores(bundle.folder)
    with _registry(store) as client, locked(store, f"model {name}"):
        none_if(EXISTS, lambda: client.create_registered_model(name))
        found = _intact_version(client, store, name, bundle.digest)
        version = found or _add(client, store, bundle, name, scores, run_id)
        if found is None:
            with _downloaded(client, store, version):
                pass  # intact, as read back
        newest = _alias(client, name, CHALLENGER)
        if newest is None or int(newest.version) < int(version.version):
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        verdict, decision = _promote(client, store, version, scores, gate)
        champion = _alias(client, name, CHAMPION)
    return Registered(
        name=name,
        version=int(version.version),
        verdict=verdict,
        is_champion=decision.promoted,
        reason=decision.reason,
        scores={
            "metric": scores["metric"],
            "split": gate.split,
            "challenger": decision.challenger,
            "champion": decision.champion,
        },
        already=found is not None,
        champion_version=int(champion.version) if champion else None,
    )


def fetch(uri: str, *, store: Store, cache: Path) -> Manifest:
    """Return a registered bundle's verified local folder, downloaded once per content.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        store: registry and tracking.
        cache: folder that keeps bundles under their digest.

    Raises:
        ConfigError: no such model, alias or version; names those that exist.
        DamagedError: what the registry holds fails its manifest or its registered digest.
        MachineError: the registry does not answer.
    """
    with _registry(store) as client:
        version = _find(client, uri)
        target = cache / _digest_of(version)
        if is_committed(target):
            try:
                cached = verify(target)
                if cached.digest == target.name:
                    return cached
            except DamagedError as error:
                _log.warning("%s; downloading it again", error.args[0])
            quarantine(target)
        make_folder(cache)
        with _downloaded(client, store, version, cache) as found:
            # A second download that ends later finds the same content in place.
            POSIX.publish(found.folder, target)
    return replace(found, folder=target)


@contextlib.contextmanager
def _registry(store: Store) -> Iterator["MlflowClient"]:
    """Return a client of a registry that answers; its errors become MachineError."""
    if not is_reachable(store):
        raise MachineError(
            f"tracking store {store.shown}: does not answer; start it and run the same command"
        )
    client = open_client(store)
    with server_errors(store):
        yield client


def _intact_version(
    client: "MlflowClient", store: Store, name: str, digest: str
) -> "ModelVersion | None":
    """Return the version that holds the bundle; damaged and lost ones do not count."""
    query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    for version in client.search_model_versions(query):
        try:
            with _downloaded(client, store, version):
                return version
        except DamagedError as error:
            _log.warning("%s; registering the bundle again", error.args[0])
    return None


def _add(
    client: "MlflowClient",
    store: Store,
    bundle: Manifest,
    name: str,
    scores: StoredScores,
    run_id: str | None,
) -> "ModelVersion":
    """Upload the bundle as a logged model and make a version of it; no alias is changed."""
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    if run_id is None:
        experiment = initialise(store)
    elif run := none_if(ABSENT, lambda: client.get_run(run_id)):
        experiment = str(run.info.experiment_id)
    else:
        raise ConfigError(f"no run {run_id} in {store.shown}; name another or none")
    tags = {
        DIGEST_TAG: bundle.digest,
        SCORES_TAG: json.dumps(scores, sort_keys=True)[:_MAX_VERSION_TAG],
    }
    model = client.create_logged_model(experiment, name=name, source_run_id=run_id, tags=tags)
    with tempfile.TemporaryDirectory(prefix="vinedresser-") as temporary:
        folder = Path(temporary) / "model"
        # The signature comes from the hints in pyfunc.py; nothing is inferred.
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                run_id=run_id,
            ),
            python_model=str(PYFUNC),
            artifacts={BUNDLE: str(bundle.folder.resolve())},
            pip_requirements=[
                f"vinedresser=={installed('vinedresser')}",
                f"mlflow=={installed('mlflow')}",
            ],
        )
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


def _digest_of(version: "ModelVersion") -> str:
    """Return the digest that a version was registered with; it becomes a folder's name."""
    digest = str(version.tags.get(DIGEST_TAG, ""))
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise DataError(f"models:/{version.name}/{version.version}: not registered by `export`")
    return digest


@contextlib.contextmanager
def _downloaded(
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

    where, expected = f"models:/{version.name}/{version.version}", _digest_of(version)
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


def _alias(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    return none_if(ABSENT, lambda: client.get_model_version_by_alias(name, alias))


def _promote(
    client: "MlflowClient", store: Store, version: "ModelVersion", scores: StoredScores, gate: Gate
) -> tuple[Verdict, Decision]:
    """Apply the gate to a verified version and move the alias, as the last step."""
    name, number = version.name, version.version
    champion = _alias(client, name, CHAMPION)
    best: StoredScores | None = None
    if champion is not None:
        # From its verified bundle: the tag is for people and can be edited.
        with _downloaded(client, store, champion) as bundle:
            best = read_scores(bundle.folder)
    decision = decide(scores, best, gate)
    if champion is not None and int(champion.version) == int(number):
        return "unchanged", replace(decision, promoted=True, reason="is the champion already")
    promoted = version.tags.get(PROMOTED_TAG)
    if champion is not None and promoted:
        reason = f"was champion once ({promoted}); to restore it move the alias by hand"
        return "unchanged", replace(decision, promoted=False, reason=reason)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    if not decision.promoted:
        if KEPT_TAG in version.tags:
            return "unchanged", decision
        reason = f"{when}: {decision.reason}"[:_MAX_VERSION_TAG]
        client.set_model_version_tag(name, number, KEPT_TAG, reason)
        return "kept", decision
    # The registry has no conditional write; the workspace's lease does not reach other machines.
    now = _alias(client, name, CHAMPION)
    if (now and now.version) != (champion and champion.version):
        raise BusyError(f"{name}: the champion changed during the export; run it again")
    client.set_registered_model_alias(name, CHAMPION, number)
    client.set_model_version_tag(name, number, PROMOTED_TAG, f"{when}: {decision.reason}")
    return "promoted", decision


def _find(client: "MlflowClient", uri: str) -> "ModelVersion":
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
    found = _alias(client, name, alias) if alias else None
    if found is None:
        aliases = sorted(client.get_registered_model(name).aliases)
        known = ", ".join(sorted(versions, key=int)[-10:])
        raise ConfigError(f"{uri}: {name} has versions {known}; aliases {', '.join(aliases)}")
    return found
