"""Manifests against strict schemas: those of Kubernetes, and of KubeRay's definitions.

A key of another name is refused wherever names are not free, so that a misspelt key in the source
fails here and not in a cluster.
"""

import copy
import random
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from vinedresser.cluster.emit import TARGETS, Host
from vinedresser.cluster.manifests import Pods, Tick, cron_of
from vinedresser.errors import ConfigError

TICK = Tick(
    name="Nightly_run", source="pipelines.nightly", workspace="/work space", every="0 3 * * *",
    zone="Europe/Berlin", environment={"VINEDRESSER_PACKAGES": "my_zoo"},
)  # fmt: skip
PODS = Pods(image="registry.example/vinedresser:1")
HOST = Host(Path("/opt/bin/vinedresser"), Path("/home/me"))
# Maps whose keys are free.
FREE = {
    "labels", "matchLabels", "nodeSelector", "rayStartParams", "limits", "requests", "annotations",
}  # fmt: skip


def emitted(target: str) -> list[Any]:
    (text,) = TARGETS[target](TICK, HOST, PODS).values()
    return list(yaml.safe_load_all(text))


def closed(schema: Any) -> Any:
    """Return a schema that refuses unknown keys."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    is_open = made.get("x-kubernetes-preserve-unknown-fields") or made.get(
        "x-kubernetes-int-or-string"
    )
    if isinstance(made.get("properties"), dict) and "type" in made and not is_open:
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def definitions(shared_data: Path) -> dict[str, Draft202012Validator]:
    """Validators of KubeRay's kinds."""
    made = {}
    for file in sorted((shared_data / "kuberay").glob("ray.io_ray*jobs.yaml")):
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
        (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
        schema = closed(version["schema"]["openAPIV3Schema"])
        # The objects' own metadata is Kubernetes'.
        schema["properties"]["metadata"] = {"type": "object", "additionalProperties": False,
            "properties": {"name": {}, "namespace": {}, "labels": {}}}  # fmt: skip
        made[definition["spec"]["names"]["kind"]] = Draft202012Validator(schema)
    if not made:
        pytest.skip("no definitions of KubeRay in ../shared/data/kuberay")
    return made


def problem(manifest: Any, definitions: dict[str, Draft202012Validator]) -> str:
    """Return the reason for which a manifest is refused; empty for a valid one."""
    try:
        if manifest["kind"] in definitions:
            definitions[manifest["kind"]].validate(manifest)
        else:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
    except (ValidationError, kubernetes_validate.ValidationError) as error:
        return str(error.message)
    return ""


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each key of a manifest whose name is not free."""
    if isinstance(value, dict) and (not path or path[-1] not in FREE):
        for key, item in value.items():
            yield (*path, key)
            yield from keys(item, (*path, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from keys(item, (*path, position))


def misspelt(manifest: Any, path: tuple[Any, ...], draw: random.Random) -> Any:
    """Return a manifest with one key spelt wrong."""
    changed = copy.deepcopy(manifest)
    owner = changed
    for step in path[:-1]:
        owner = owner[step]
    key = path[-1]
    at = draw.randrange(len(key))
    wrong = draw.choice([key[:at] + key[at] + key[at:], key[:at] + key[at + 1 :], f"{key}s"])
    owner[wrong if wrong not in owner and wrong else f"{key}x"] = owner.pop(key)
    return changed


@pytest.mark.parametrize("target", ["k8s", "rayjob", "raycronjob"])
def test_manifests_are_valid_and_misspelt_keys_are_refused(
    definitions: dict[str, Draft202012Validator], target: str
) -> None:
    draw = random.Random(0)
    # The kinds of the Prometheus operator are in neither set of schemas.
    manifests = [each for each in emitted(target) if each["kind"] != "PodMonitor"]
    assert [problem(each, definitions) for each in manifests] == ["" for _ in manifests]
    mutations = [(each, path) for each in manifests for path in keys(each)]
    for manifest, path in draw.sample(mutations, min(len(mutations), 70)):
        changed = misspelt(manifest, path, draw)
        # Without its kind a manifest has no schema.
        if path not in {("kind",), ("apiVersion",)}:
            assert problem(changed, definitions), (target, path)


def test_a_policy_that_ray_cron_jobs_do_not_have_is_refused(
    definitions: dict[str, Draft202012Validator],
) -> None:
    manifest = emitted("raycronjob")[0]
    manifest["spec"]["concurrencyPolicy"] = "Forbid"
    assert "concurrencyPolicy" in problem(manifest, definitions)


def test_the_cron_job_repeats_by_exit_code() -> None:
    job, policy = emitted("k8s")
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 3 * * *", "Europe/Berlin")
    assert spec["concurrencyPolicy"] == "Forbid"
    rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Count"]
    assert [rule.get("onExitCodes", {}).get("values") for rule in rules] == [
        [2, 4], None, [3, 75, 137],
    ]  # fmt: skip
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [
        "vinedresser", "schedule", "tick", "pipelines.nightly", "--workspace", "/work space",
        "--exit-code",
    ]  # fmt: skip
    assert policy["spec"]["ingress"] == []


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for item in value.values():
            yield from pods(item)
    elif isinstance(value, list):
        for item in value:
            yield from pods(item)


@pytest.mark.parametrize("target", ["k8s", "rayjob", "raycronjob"])
def test_pods_are_not_root_and_have_time_for_a_checkpoint(target: str) -> None:
    found = [pod for manifest in emitted(target) for pod in pods(manifest)]
    assert len(found) == (1 if target == "k8s" else 4)
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["terminationGracePeriodSeconds"] == 120
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["envFrom"] == [{"secretRef": {"name": "vinedresser", "optional": True}}]
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "90"
        assert variables["VINEDRESSER_PACKAGES"] == "my_zoo"
        assert {"name": "workspace", "mountPath": "/work space"} in container["volumeMounts"]


def test_a_ray_cluster_begins_with_no_worker_and_asks_for_a_token() -> None:
    job, policy, monitor = emitted("rayjob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in cluster["workerGroupSpecs"]] == [0, 0]
    gpu = cluster["workerGroupSpecs"][1]["template"]["spec"]
    assert gpu["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert job["spec"]["entrypoint"].endswith(
        "tick pipelines.nightly --workspace '/work space' --exit-code"
    )
    assert policy["kind"] == "NetworkPolicy"
    labels = {"app.kubernetes.io/name": "vinedresser", "app.kubernetes.io/instance": "nightly-run"}
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert cluster["headGroupSpec"]["template"]["metadata"]["labels"] == labels
    names = [port["name"] for pod in pods(cluster) for port in pod["containers"][0]["ports"]]
    assert set(names) == {monitor["spec"]["podMetricsEndpoints"][0]["port"]}


def test_names_fit_kubernetes() -> None:
    long = Tick(name="A_" * 60, source="x", workspace="/w", every="0 3 * * *")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", f"vinedresser-{long.resource}")


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (timedelta(minutes=15), "*/15 * * * *"),
        (timedelta(hours=1), "0 * * * *"),
        (timedelta(hours=6), "0 */6 * * *"),
        (timedelta(days=1), "0 0 * * *"),
    ],
)
def test_intervals_that_cron_can_express(interval: timedelta, expected: str) -> None:
    assert cron_of(interval) == expected


@pytest.mark.parametrize(
    "interval", [timedelta(minutes=7), timedelta(days=2), timedelta(seconds=90)]
)
def test_intervals_that_it_cannot(interval: timedelta) -> None:
    with pytest.raises(ConfigError, match="interval"):
        cron_of(interval)


@pytest.mark.parametrize("target", ["k8s", "rayjob", "raycronjob"])
def test_an_image_is_asked_for(target: str) -> None:
    with pytest.raises(ConfigError, match="image=registry"):
        TARGETS[target](TICK, HOST, None)
