"""Registration: a bundle becomes a version in the registry, and champion only through the gate.

A bundle is a committed folder whose `scores.json` holds its decoded scores and the digest of the
references. Readers follow the alias `champion`. It moves last, after the new version was read back
from the registry itself, so that a failure before changes nothing.
"""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vinedresser.data.shards import ShardSet
from vinedresser.errors import ConfigError, DamagedError
from vinedresser.registry.gate import Gate, StoredScores
from vinedresser.registry.promotion import KEPT_TAG, PROMOTED_TAG, Challenge, Verdict, promote
from vinedresser.registry.versions import (
    CHALLENGER,
    CHAMPION,
    DIGEST_TAG,
    MAX_VERSION_TAG,
    SCORES_TAG,
    downloaded,
    find_version,
    is_made,
    opened_registry,
    read_scores,
    registered_digest,
    version_with_alias,
)
from vinedresser.tracking.store import (
    ABSENT,
    EXISTS,
    Store,
    initialise,
    locked,
    none_if,
)
from vinedresser.workspace.commit import Manifest, is_committed, quarantine, verify
from vinedresser.workspace.holds import hold
from vinedresser.workspace.storage import POSIX, make_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_log = logging.getLogger(__name__)

# Name of the bundle among the artifacts of a version.
BUNDLE = "bundle"
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


def register(
    bundle: Manifest,
    *,
    name: str,
    store: Store,
    gate: Gate,
    run_id: str | None = None,
    data: Callable[[], ShardSet] | None = None,
) -> Registered:
    """Put a bundle into the registry, and make it champion if the gate agrees.

    The same bundle is registered once; a second call completes what a killed one left open. A
    champion that was scored on other references is scored on those of `data`; see promotion.py.

    Args:
        bundle: a verified folder with `scores.json`.
        name: registered model; letters, digits and `._-`.
        store: registry and tracking.
        gate: conditions of promotion.
        run_id: the run that trained it, if tracked.
        data: returns the shard set of the challenger's task; called where both are to be scored.

    Raises:
        DamagedError: what the registry returns of the bundle fails its manifest.
        DataError: no usable `scores.json`.
        ConfigError: a name with other characters, or no such run.
        BusyError: another export of this name is running, or changed the champion meanwhile.
        MachineError: the registry does not answer; nothing was promoted, the call can be repeated.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ConfigError(
            f"model name {name!r}: expected letters, digits and ._-, a letter or digit first"
        )
    scores = read_scores(bundle.folder)
    with opened_registry(store) as client, locked(store, f"model {name}"):
        none_if(EXISTS, lambda: client.create_registered_model(name))
        found = _intact_version(client, store, name, bundle.digest)
        version = found or _add(client, store, bundle, name, scores, run_id)
        if found is None:
            with downloaded(client, store, version):
                pass  # intact, as read back
        newest = version_with_alias(client, name, CHALLENGER)
        if newest is None or int(newest.version) < int(version.version):
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        challenge = Challenge(bundle, scores, gate, data)
        verdict, decision = promote(client, store, version, challenge)
        champion = version_with_alias(client, name, CHAMPION)
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


def is_decided(digest: str, *, name: str, store: Store) -> bool:
    """Return whether the gate has decided about a bundle that is a version of a model."""
    if not is_made(store):
        return False
    query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    with opened_registry(store) as client:
        found = client.search_model_versions(query)
    return any({PROMOTED_TAG, KEPT_TAG} & set(version.tags) for version in found)


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
    with opened_registry(store) as client:
        version = find_version(client, uri)
        target = cache / registered_digest(version)
        hold(target)
        if is_committed(target):
            try:
                cached = verify(target)
                if cached.digest == target.name:
                    return cached
            except DamagedError as error:
                _log.warning("%s; downloading it again", error.args[0])
            quarantine(target)
        make_folder(cache)
        with downloaded(client, store, version, cache) as found:
            # A second download that ends later finds the same content in place.
            POSIX.publish(found.folder, target)
    return replace(found, folder=target)


def _intact_version(
    client: "MlflowClient", store: Store, name: str, digest: str
) -> "ModelVersion | None":
    """Return the version that holds the bundle; damaged and lost ones do not count."""
    query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
    for version in client.search_model_versions(query):
        try:
            with downloaded(client, store, version):
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
        SCORES_TAG: json.dumps(scores, sort_keys=True)[:MAX_VERSION_TAG],
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
