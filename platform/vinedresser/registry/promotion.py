"""Promotion: the champion alias moves to a challenger that passes the gate, and to no other."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from vinedresser.bundle import load_bundle
from vinedresser.data.shards import ShardSet
from vinedresser.errors import BusyError, DataError
from vinedresser.registry.comparison import compare_models
from vinedresser.registry.gate import Decision, Gate, StoredScores, are_comparable, decide
from vinedresser.registry.versions import (
    CHAMPION,
    MAX_VERSION_TAG,
    SCORES_TAG,
    downloaded,
    read_scores,
    version_with_alias,
)
from vinedresser.tracking.store import Store
from vinedresser.workspace.commit import Manifest
from vinedresser.workspace.storage import parsed_object

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Verdict = Literal["promoted", "kept", "unchanged"]

# When and why a version became champion. One that has been is never promoted by `register`
# again: exporting the same bundle twice must not undo an operator's choice of another.
PROMOTED_TAG = "vinedresser.promoted"
# When and why a version did not become champion.
KEPT_TAG = "vinedresser.kept"


@dataclass(frozen=True)
class Challenge:
    """A bundle that may become champion.

    Attributes:
        bundle: of the challenger.
        scores: its `scores.json`.
        gate: conditions of promotion.
        data: returns the shard set on which both models are scored where their scores cannot be
            compared; None if there is none.
    """

    bundle: Manifest
    scores: StoredScores
    gate: Gate
    data: Callable[[], ShardSet] | None


def _decide(
    client: "MlflowClient", store: Store, champion: "ModelVersion", challenge: Challenge
) -> Decision:
    """Apply the gate against a champion, which is scored again where its scores do not compare."""
    scores, gate, data = challenge.scores, challenge.gate, challenge.data
    with downloaded(client, store, champion) as bundle:
        # From its verified bundle: the tag of all its scores is for people.
        best = read_scores(bundle.folder)
        stored = champion.tags.get(scores_tag(scores.get("reference_digest")))
        if stored and not are_comparable(scores, best):
            best = parsed_object(stored.encode())
        is_known = are_comparable(scores, best) and not gate.confidence
        if data is None or is_known or not decide(scores, None, gate).promoted:
            return decide(scores, best, gate)
        try:
            shards = data()
            models = load_bundle(challenge.bundle), load_bundle(bundle)
            resampled = compare_models(*models, shards, gate.split)
        except DataError as error:
            return Decision(False, f"the champion cannot be scored: {error.args[0]}")
    both = [
        {
            "metric": resampled.metric,
            "reference_digest": shards.reference_digest(gate.split),
            gate.split: {resampled.metric: value},
        }
        for value in resampled.values
    ]
    client.set_model_version_tag(
        champion.name,
        champion.version,
        scores_tag(both[1]["reference_digest"]),
        json.dumps(both[1]),
    )
    return decide(both[0], both[1], gate, resampled)


def scores_tag(reference_digest: Any) -> str:
    """Return the tag of a version that holds its score on references, by their digest."""
    return f"{SCORES_TAG}/{str(reference_digest)[:12]}"


def promote(
    client: "MlflowClient", store: Store, version: "ModelVersion", challenge: Challenge
) -> tuple[Verdict, Decision]:
    """Apply the gate to a verified version and move the alias, as the last step."""
    name, number = version.name, version.version
    champion = version_with_alias(client, name, CHAMPION)
    if champion is None:
        decision = decide(challenge.scores, None, challenge.gate)
    elif int(champion.version) == int(number):
        decision = decide(challenge.scores, challenge.scores, challenge.gate)
        return "unchanged", replace(decision, promoted=True, reason="is the champion already")
    else:
        decision = _decide(client, store, champion, challenge)
    promoted = version.tags.get(PROMOTED_TAG)
    if champion is not None and promoted:
        reason = f"was champion once ({promoted}); to restore it move the alias by hand"
        return "unchanged", replace(decision, promoted=False, reason=reason)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    if not decision.promoted:
        if KEPT_TAG in version.tags:
            return "unchanged", decision
        reason = f"{when}: {decision.reason}"[:MAX_VERSION_TAG]
        client.set_model_version_tag(name, number, KEPT_TAG, reason)
        return "kept", decision
    # The registry has no conditional write; the workspace's lease does not reach other machines.
    now = version_with_alias(client, name, CHAMPION)
    if (now and now.version) != (champion and champion.version):
        raise BusyError(f"{name}: the champion changed during the export; run it again")
    client.set_registered_model_alias(name, CHAMPION, number)
    client.set_model_version_tag(name, number, PROMOTED_TAG, f"{when}: {decision.reason}")
    return "promoted", decision
