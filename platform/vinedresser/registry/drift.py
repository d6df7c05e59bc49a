"""Drift: the champion's decoded score on present data against that of its promotion."""

import json
from dataclasses import dataclass
from typing import Any

from vinedresser.bundle import load_bundle
from vinedresser.data.batching.reader import load_split
from vinedresser.data.shards import ShardSet
from vinedresser.errors import ConfigError
from vinedresser.metrics import is_lower_better, measure
from vinedresser.registry.comparison import hypotheses
from vinedresser.registry.promotion import scores_tag
from vinedresser.registry.versions import (
    CHAMPION,
    downloaded,
    opened_registry,
    read_scores,
    version_with_alias,
)
from vinedresser.tracking.store import Store
from vinedresser.workspace.storage import parsed_object


@dataclass(frozen=True)
class Drift:
    """Champion's score on a split, and by how much it became worse.

    Attributes:
        version: of the champion.
        metric: name of the score.
        before: score when the champion was exported, on the references of that time.
        now: score on the present references.
        is_known: whether the present score had been measured before.
    """

    version: int
    metric: str
    before: float
    now: float
    is_known: bool

    @property
    def worse_by(self) -> float:
        """Points by which the champion is worse now; negative where it is better."""
        return self.now - self.before if is_lower_better(self.metric) else self.before - self.now

    @property
    def reason(self) -> str:
        """One line with both numbers."""
        return (
            f"champion version {self.version}: {self.metric} {self.now:g} on these references, "
            f"{self.before:g} at its export, worse by {self.worse_by:g}"
        )


def measure_drift(
    name: str, shards: ShardSet, split: str, *, store: Store, is_dry: bool = False
) -> Drift | None:
    """Score the champion of a model on a split; keep the score as a tag of its version.

    A score on these references that is known is not measured again.

    Args:
        name: registered model.
        shards: present data.
        split: which part of it.
        store: registry.
        is_dry: return None instead of decoding.

    Raises:
        ConfigError: the model has no champion, or was scored by another metric.
        DataError: the champion reads other frames than the data holds.
    """
    metric, digest = shards.task.metric, shards.reference_digest(split)
    with opened_registry(store) as client:
        champion = version_with_alias(client, name, CHAMPION)
        if champion is None:
            raise ConfigError(f"{name}: no champion; run a pipeline with the step register first")
        version, tag = int(champion.version), scores_tag(digest)
        with downloaded(client, store, champion) as folder:
            own = read_scores(folder.folder)
            before = own.get(split, {}).get(metric)
            if before is None:
                raise ConfigError(
                    f"models:/{name}/{version}: scored by {own['metric']}, not by {metric} on "
                    f"{split}; name its metric in the task"
                )
            stored: Any = parsed_object(champion.tags.get(tag, "").encode())
            if own.get("reference_digest") == digest:
                stored = own
            if stored.get("metric") == metric:
                return Drift(version, metric, before, float(stored[split][metric]), True)
            if is_dry:
                return None
            bundle = load_bundle(folder)
            data = load_split(shards, split)
            now = measure(
                metric,
                hypotheses(bundle, shards, data),
                data.references,
                folds_case=bundle.target_tokenizer.folds_case,
            ).value
        scores = {"metric": metric, "reference_digest": digest, split: {metric: now}}
        client.set_model_version_tag(name, champion.version, tag, json.dumps(scores))
    return Drift(version, metric, before, now, False)
